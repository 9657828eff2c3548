"""Replaces `python -m simclr_ddp.pretrain` in tests of sweeps: the same files, signals and statuses, no training.

Its metric is loss.temperature. Kernels stand for ways to end: laplacian fails, arccos is killed, spectral hangs
in its second epoch until it is stopped, as all do while there is a file `hold` in the sweep's directory; exponential
takes a second to save its end, and simple_sum ends with a metric that is not a number. A file `fixed` in the sweep's
directory makes laplacian finish. Each start adds a line to the file `starts`.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import yaml


def main() -> None:
    settings = yaml.safe_load(Path(sys.argv[1]).read_text())
    run_dir, kernel = Path(settings["run_dir"]), settings["loss"]["kernel"]
    metrics = run_dir / "metrics.jsonl"

    def pause(number: int, frame: FrameType | None) -> None:
        os.write(1, b"paused\n")
        os._exit(75)

    signal.signal(signal.SIGTERM, pause)
    with (run_dir / "starts").open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    if kernel == "laplacian" and not (run_dir.parent.parent / "fixed").exists():
        print("Traceback\nerror: step 3: it diverges (--debug shows where)", flush=True)
        sys.exit(2)
    if kernel == "arccos":
        os.kill(os.getpid(), signal.SIGKILL)
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    end = time.monotonic() + 120  # whatever becomes of the test
    hold = run_dir.parent.parent / "hold"
    for epoch in range(done + 1, settings["optim"]["epochs"] + 1):
        while epoch == 2 and (kernel == "spectral" or hold.exists()) and time.monotonic() < end:
            time.sleep(0.01)
        top1 = settings["loss"]["temperature"]
        if kernel == "simple_sum" and epoch > 1:
            top1 = float("nan")
        line = {"step": epoch, "epoch": float(epoch), "loss": 1.0, "probe_top1": top1}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if kernel == "exponential":
        time.sleep(1)
    shutil.copy(sys.argv[1], run_dir / "config.yaml")
    print(f"finished: {run_dir}", flush=True)


if __name__ == "__main__":
    main()
