import subprocess
import sys

BLOCKED = """
import os, time
import numpy as np
from simclr_ddp.data import torch_loader

def cut_views(*_):
    print(os.getpid(), flush=True)
    time.sleep(1000)

torch_loader.cut_views = cut_views
cuts = [(np.zeros(1, np.int64), np.zeros((1, 2, 4), np.int32))]
next(torch_loader.read_views(None, 8, cuts, 1, 2, False))
"""


def test_a_decoding_process_ends_with_its_parent() -> None:
    """Also one that is blocked, for example by a file system that does not answer."""
    parent = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and int(parent.stdout.readline()) != parent.pid
    parent.kill()
    assert parent.communicate(timeout=60) == ("", None)  # the output ends when nothing can write to it any more
