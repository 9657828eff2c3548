"""`make demo`: from nothing to a trained, evaluated encoder and its pictures, on the generated Spirograph set.

Trains on all GPUs (as many as divide the batch), or as two processes on the CPU, by the commands a user would type;
each is printed before it runs. Started again, it goes on where it was, or shows the finished run.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

RUN_DIR = Path("runs/demo")


def main() -> int:
    ranks = max(r for r in range(1, 1 + (torch.cuda.device_count() or 2)) if 256 % r == 0)  # the default batch
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}", "-m"]
    for command in (
        [*torchrun, "simclr_ddp.pretrain", f"run_dir={RUN_DIR}"],
        ["simclr_ddp.linear_eval", str(RUN_DIR)],
        ["simclr_ddp.visualize", str(RUN_DIR)],
    ):
        print(f"\n$ {Path(sys.executable).name} -m {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if status:
            return status
    print(f"\n{summary(RUN_DIR)}")
    return 0


def summary(run_dir: Path) -> str:
    """The evaluation beside that of the untrained encoder, and where the files are."""
    results = json.loads((run_dir / "linear_eval.json").read_text())["results"]
    trained, random = results["trained"]["mse"], results["random"]["mse"]
    return (
        f"linear regression of the four generating numbers, mean squared error on the test images: "
        f"{trained:.4f} trained, {random:.4f} untrained encoder\n"
        f"the run:     {run_dir}/ (config.yaml, metrics.jsonl, checkpoints/, encoder.safetensors, linear_eval.json)\n"
        f"its figures: {run_dir}/figures/ (curves.png, views.png, and maps of the test images: pca_*.png, tsne_*.png)"
    )


if __name__ == "__main__":
    sys.exit(main())
