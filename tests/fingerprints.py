"""The bits that training computes: `python -m tests.fingerprints OUT.json`

Runs a dozen configurations of `simclr_ddp.pretrain` for 20 steps each, as real processes, and writes a hash of all
parameters and buffers of each, with the commit, the packages and the processor that computed them. Run before and
after a change that must change no number, on one machine: `parameters` must be equal. Between machines, or versions of
torch, they need not be; processors that differ in AVX-512 alone agree under

    DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m tests.fingerprints OUT.json
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from simclr_ddp.config.options import read_yaml
from simclr_ddp.data.write import write_dataset
from tests.conftest import write_images
from tests.support import processes

COMMON = (
    *("device=cpu", "threads=1", "data.size=16", "data.workers=1", "data.loader=torch", "model.width=0.125"),
    *("model.stem=cifar", "head.out=16", "optim.global_batch_size=8", "optim.steps=20", "optim.warmup_epochs=1"),
    *("checkpoint.every_steps=0", "checkpoint.every_minutes=0"),
)
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "cosine, fp32, LARS": (1, ("precision=fp32",)),
    "cosine, fp32, LARS, loader ffcv": (1, ("precision=fp32", "data.loader=ffcv")),
    "cosine, fp32, LARS, loader device": (1, ("precision=fp32", "data.loader=device")),
    "cosine, fp32, 2 ranks": (2, ("precision=fp32",)),
    "cosine, fp32, 4 ranks": (4, ("precision=fp32",)),
    "cosine, fp64, 2 ranks": (2, ("precision=fp64",)),
    "gaussian, fp64": (1, ("precision=fp64", "loss.kernel=gaussian")),
    "laplacian, fp32, SGD": (1, ("precision=fp32", "loss.kernel=laplacian", "optim.name=sgd")),
    "exponential, fp32, AdamW": (
        1,
        (
            *("precision=fp32", "loss.kernel=exponential", "loss.gamma=0.5"),
            *("optim.name=adamw", "optim.scaling=none", "optim.base_learning_rate=1e-3"),
        ),
    ),
    "simple_sum, bf16": (1, ("precision=bf16", "loss.kernel=simple_sum")),
    "concat_sum, fp64, 2 ranks": (2, ("precision=fp64", "loss.kernel=concat_sum")),
    "arccos, fp32": (1, ("precision=fp32", "loss.kernel=arccos", "loss.temperature=0.5")),
    "spectral, fp32, 2 ranks": (2, ("precision=fp32", "loss.kernel=spectral")),
    "cosine, fp16": (1, ("precision=fp16",)),
    "cosine, fp32, 2 ranks, micro-batches": (2, ("precision=fp32", "optim.micro_batch_size=4")),
    "cosine, fp32, checkpointed stages": (1, ("precision=fp32", "model.checkpoint_stages=true")),
    "spirograph, fp32": (1, ("precision=fp32", "data.train=spirograph", "data.size=32")),
}


def fingerprint(run_dir: Path) -> str:
    (path,) = (run_dir / "checkpoints").glob("step-*.pt")
    found = hashlib.sha256()
    for name, value in sorted(torch.load(path, weights_only=True)["model"].items()):
        found.update(name.encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def environment(run_dir: Path) -> dict[str, object]:
    """What computed the run, as its own record says, without what differs from case to case."""
    (start,) = read_yaml(run_dir / "config.yaml")["starts"]
    kept = ("git_commit", "python", "packages", "processor", "cores", "threads")
    return {key: start[key] for key in kept} | {"instructions": torch.backends.cpu.get_cpu_capability()}


def main(out: Path) -> None:
    results, computed_by = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.beton"
        write_dataset(str(write_images(Path(folder) / "train", 40)), data)
        for name, (ranks, arguments) in CASES.items():
            run_dir = Path(folder) / name.replace(" ", "_").replace(",", "")
            options = (f"data.train={data}", *COMMON, *arguments, f"run_dir={run_dir}")
            status, output = processes.run("simclr_ddp.pretrain", *options, ranks=ranks)
            assert status == 0, output
            results[name] = fingerprint(run_dir)
            computed_by = computed_by or environment(run_dir)
            print(f"{results[name]}  {name}", flush=True)
    record = {"command": f"python -m tests.fingerprints {out}", "torch": torch.__version__}
    out.write_text(json.dumps(record | computed_by | {"parameters": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
