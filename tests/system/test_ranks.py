"""The variables of a rank, and what the end of a command asks of the ranks (`test_hangs.py`: real processes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ddp import pretrain
from tests.support.processes import ROOT

CODE = """
from simclr_ddp.system import ranks
def now():
    print(ranks.have_met(), ranks.is_left_behind())
group = [True]
now()
ranks.join(lambda: group[0])
now()
group[0] = False
now()
"""


def test_a_process_is_left_behind_until_it_leaves_its_group() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False False", "True True", "True False"], done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2 RANK=0", "WORLD_SIZE=2: MASTER_ADDR, MASTER_PORT not set; start with torchrun"),
        ("WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE=2: RANK not set; "),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR= MASTER_PORT=1", "WORLD_SIZE=2: MASTER_ADDR not set; "),
        ("WORLD_SIZE=two RANK=0", "WORLD_SIZE=two: must be a whole number; "),
        ("WORLD_SIZE=", "WORLD_SIZE=: must be a whole number; "),
        ("WORLD_SIZE=0", "WORLD_SIZE=0: must be at least 1; "),
        ("RANK=-1", "RANK=-1: must be a whole number; "),
        ("RANK=1", "RANK=1: WORLD_SIZE not set; "),
        ("RANK=0 MASTER_ADDR=a MASTER_PORT=1", "RANK=0: WORLD_SIZE not set; "),
        ("WORLD_SIZE=2 RANK=2", "RANK=2: must be less than WORLD_SIZE=2; "),
        ("LOCAL_WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2: must be less than LOCAL_WORLD_SIZE=2; "),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a MASTER_PORT=x", "MASTER_PORT=x: must be a whole number; "),
    ],
)
def test_variables_that_are_set_in_part_are_named(
    variables: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, _, value in (text.partition("=") for text in variables.split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    assert pretrain.main(["device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert said in json.loads((tmp_path / "error").read_text())["message"]["message"], "torchrun's report ends with it"
