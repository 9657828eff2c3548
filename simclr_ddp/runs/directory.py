"""A run's directory: its name, its lock, and config.yaml."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from simclr_ddp.config import options
from simclr_ddp.config.identity import changed_keys
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.system import console, files
from simclr_ddp.system.errors import one_line

if TYPE_CHECKING:
    from simclr_ddp.distributed.runtime import Runtime


# The options in the names of directories that were made before the data counted by its content.
NAMED_BEFORE = {
    "": "seed precision",
    "data": "train size",
    "data.augmentation": "crop_scale flip strength jitter order greyscale blur solarize mean std",
    "model": "arch width stem init",
    "head": "kind layers hidden out",
    "loss": "kernel temperature gamma mix_weight mix_level second_temperature order norm_p distance_p precision gather "
    "backend radius",
    "optim": "name global_batch_size micro_batch_size epochs steps base_learning_rate scaling warmup_epochs "
    "weight_decay momentum schedule trust_coefficient",
    "probe": "enabled learning_rate validation_fraction",
}


def default_run_dir(settings: Pretrain, content: str = "") -> Path:
    """Return the directory of a training run: the same settings and data, wherever the file is, give the same one.

    A directory with the name that it had in earlier versions is found too.

    content  fingerprint of the file data.train, which is read if it is not given

    Raises ValueError for a name with /, and OSError or ValueError if the file can't be read.
    """
    if "/" in settings.name:
        raise ValueError(f"name={settings.name}: it leads to another folder; use a name without /, or set run_dir")
    if settings.run_dir:
        return Path(settings.run_dir)
    data = settings.data.train if settings.data.train == "spirograph" else content or _content(settings.data.train)
    values = options.dotted(settings)
    before = {
        k: values[k] for k in (f"{at}.{name}".strip(".") for at in NAMED_BEFORE for name in NAMED_BEFORE[at].split())
    }
    now, old = (
        Path("runs", f"{settings.name}-{files.short_hash(keys)}")
        for keys in (changed_keys(settings) | {"data": data}, before)
    )
    if now.is_dir():
        return now
    return old if old.is_dir() else _of_moved_data(settings, before) or now


def _of_moved_data(settings: Pretrain, before: dict[str, Any]) -> Path | None:
    """Find a directory under its earlier name, which the former path of the same training images is part of."""
    from simclr_ddp.data.beton import Beton  # here, so that --help needs no numpy and torch
    from simclr_ddp.runs.checkpoint import trained_on

    if settings.data.train == "spirograph":
        return None
    for folder in sorted(Path("runs").glob(f"{escape(settings.name)}-*")):
        try:
            path = options.read_yaml(folder / "config.yaml").get("data.train")
        except (ValueError, OSError):  # of another run, which must not prevent this one
            continue
        if folder.name == f"{settings.name}-{files.short_hash(before | {'data.train': path})}":
            content = trained_on(folder / "checkpoints")
            if content and Beton(Path(settings.data.train)).is_known_as(content):
                return folder
    return None


def _content(train: str) -> str:
    from simclr_ddp.data.beton import Beton  # here, so that --help needs no numpy

    return Beton(Path(train)).fingerprint()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the run directory, creating it if needed; all ranks end if it can't be written or another run holds it."""
    from simclr_ddp.distributed import collectives  # here, because launch needs no torch to name the directory

    fault = ""
    with ExitStack() as held:
        if collectives.is_main():
            try:
                if not held.enter_context(files.locked(run_dir / ".lock")):
                    console.warn(f"{run_dir} is on a file system without locks: nothing prevents a second run in it")
            except BlockingIOError:
                fault = (
                    f"run_dir={run_dir}: another process is training in it; wait for it, set another run_dir, or where "
                    "srun starts torchrun, start one per node (srun --ntasks-per-node=1 torchrun ...)"
                )
            except OSError as error:
                fault = f"run_dir={run_dir}: it can't be written ({error.strerror}); choose another run_dir"
        fault = collectives.broadcast_object(fault)
        if fault:
            collectives.fail_together(fault)
        yield


def read_settings(run_dir: Path) -> Pretrain:
    """Read the settings in a run directory's config.yaml. Raises ValueError if it is no run directory."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run directory: it holds no config.yaml")
    values = {k: v for k, v in options.read_yaml(path).items() if not k.startswith("starts")}
    return options.build(Pretrain, [(str(path), values)])


def record_start(run_dir: Path, settings: Pretrain, runtime: "Runtime", step: int) -> None:
    """Write config.yaml: the resolved settings, and for every start so far the step, versions and hardware."""
    from simclr_ddp.runs.provenance import describe

    path = run_dir / "config.yaml"
    starts: list[Any] = []
    if path.exists():
        try:
            starts = [s for s in options.read_yaml(path).get("starts", []) if s["step"] < step]
        except (ValueError, TypeError, KeyError) as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            console.warn(f"{path} is damaged ({one_line(error, 120)}): it is kept as {aside.name} and written again")
    starts.append({"step": step} | describe(runtime))
    text = OmegaConf.to_yaml(OmegaConf.create(options.plain(settings) | {"starts": starts}))
    files.replace_atomically(path, lambda temporary: temporary.write_text(text))
