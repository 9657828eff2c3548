"""Train and evaluate an encoder on generated images, and plot the result: `make demo`

It uses all GPUs (as many as divide the batch), or two processes on the CPU, and prints each command before it runs.
Started again, it resumes, or shows the finished run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from launch.cluster.job import count_gpus
from simclr_ddp.runs.directory import read_settings
from simclr_ddp.runs.evaluations import of_run

RUN_DIR = Path("runs/demo")


def main() -> int:
    argparse.ArgumentParser("python -m launch.demo", description=__doc__).parse_args()
    ranks = max(r for r in range(1, 1 + (int(count_gpus() or 0) or 2)) if 256 % r == 0)  # the default batch
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
    try:
        print(f"\n{summary(RUN_DIR)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def summary(run_dir: Path) -> str:
    """The evaluation of the trained and of an untrained encoder, and where the files are."""
    data = read_settings(run_dir).data
    found, left_out = of_run(run_dir, train=data.train, test=data.test)
    linear = [evaluation.record["results"] for evaluation in found if evaluation.name == "linear"]
    both = [results for results in linear if "random" in results]
    if not both:
        raise ValueError("; ".join(left_out) or f"{run_dir} has no evaluation of its last step; remove the directory")
    trained, random = both[-1]["trained"]["mse"], both[-1]["random"]["mse"]
    return (
        f"linear regression of the four generating numbers, mean squared error on the test images: "
        f"{trained:.4f} trained, {random:.4f} untrained encoder\n"
        f"run:   {run_dir}/ (config.yaml, metrics.jsonl, checkpoints/, encoder.safetensors, evaluations/)\n"
        f"plots: {run_dir}/figures/ (curves.png, views.png, and maps of the test images: pca_*.png, tsne_*.png)"
    )


if __name__ == "__main__":
    sys.exit(main())
