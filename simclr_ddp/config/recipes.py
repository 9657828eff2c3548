"""The configs that the package brings along: `pretrain cifar10` is `pretrain configs/pretrain/cifar10.yaml`."""

import difflib
from pathlib import Path

KINDS = {"Finetune": "finetune", "Slurm": "slurm", "Sweep": "sweep"}  # by class of the settings; all others: pretrain


def folder() -> Path:
    """Folder of the configs: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str, kind: str = "pretrain") -> str:
    """Return the path of a config file, which may be given as the bare name of one that the package brings along.

    kind  its folder in configs/: pretrain, finetune, slurm or sweep

    Raises ValueError for a bare name that is neither a file nor such a config.
    """
    if "/" in name or "." in name or not name or Path(name).is_file():
        return name
    files = {path.stem: path for path in sorted((folder() / kind).glob("*.yaml"))}
    if name in files:
        return str(files[name])
    near = difflib.get_close_matches(name, files, 1)
    hint = f"did you mean {near[0]}?" if near else f"give FILE.yaml or one of {', '.join(files)}"
    raise ValueError(f"config {name} is neither a file nor the name of an included config; {hint}")
