"""Stands for `python -m simclr_ddp.pretrain` in tests of sweeps: the same files, signals and statuses, no training.

Its metric is loss.temperature. Kernels stand for ways to end: laplacian fails, arccos is killed, spectral stands still
in its second epoch until it is told to stop, as all do while there is a file `hold` in the sweep's directory;
exponential takes two seconds to save its end. Each start adds a line to the file `starts`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf


def main() -> None:
    settings = OmegaConf.load(sys.argv[1])
    run_dir, metrics = Path(settings.run_dir), Path(settings.run_dir) / "metrics.jsonl"

    def pause(number: int, frame: FrameType | None) -> None:
        os.write(1, b"paused\n")
        os._exit(75)

    signal.signal(signal.SIGTERM, pause)
    with (run_dir / "starts").open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    if settings.loss.kernel == "laplacian":
        print("Traceback\nerror: step 3: it diverges (--debug shows where)", flush=True)
        sys.exit(2)
    if settings.loss.kernel == "arccos":
        os.kill(os.getpid(), signal.SIGKILL)
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    end = time.monotonic() + 120  # whatever becomes of the test
    hold = run_dir.parent.parent / "hold"
    for epoch in range(done + 1, settings.optim.epochs + 1):
        while epoch == 2 and (settings.loss.kernel == "spectral" or hold.exists()) and time.monotonic() < end:
            time.sleep(0.01)
        line = {"step": epoch, "epoch": float(epoch), "loss": 1.0, "probe_top1": settings.loss.temperature}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if settings.loss.kernel == "exponential":
        time.sleep(2)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(settings))
    print(f"finished: {run_dir}", flush=True)


if __name__ == "__main__":
    main()
