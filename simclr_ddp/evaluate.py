"""Compare and report evaluations: `python -m simclr_ddp.evaluate RUN... key=value ...`

RUN is a run directory, a checkpoint or an encoder.safetensors, and becomes a column of the report. Runs that differ in
the seed share a column: write them with commas between them (runs/a0,runs/a1,runs/a2), or give a folder that holds
their directories. The report has every evaluation of each run's current encoder, with settings, intervals, the random
encoder and seconds, and compares the first column with each other one: two runs on the same images (McNemar's test and
a paired bootstrap), two groups of runs by Welch's interval.

`protocols` runs evaluations that are missing, each by its own command, and reuses those that are finished:
`python -m simclr_ddp.evaluate RUN protocols=all`. The report is printed, and written as report.md, report.json and
report.tex to `output`, by default to RUN if only one is given and it is a folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simclr_ddp.config import command, options, schema
from simclr_ddp.config.schema import Evaluate
from simclr_ddp.system import console
from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import replace_atomically

if TYPE_CHECKING:
    from simclr_ddp.runs.evaluations import Evaluation

# Protocol -> command and its options. Fine-tuning is a training run: start it yourself, and the report includes it.
PROTOCOLS: dict[str, tuple[str, type]] = {
    "linear": ("linear_eval", schema.LinearEval),
    "knn": ("knn", schema.Knn),
    "label_free": ("label_free", schema.LabelFree),
    "transformations": ("transformations", schema.Transformations),
}
# Options that can't change a metric, or are compared by what they name.
WITHOUT_EFFECT = {
    *("run", "train", "test", "validation", "output", "cache"),
    *("batch_size", "device", "threads", "loader", "workers", "timeout"),
}

COMPARED = {"top1", "mse"}  # metrics that are compared by results per image
FAILED = "not measured: "


class Encoder(NamedTuple):
    """The current encoder of a run, which evaluations must have measured."""

    path: Path  # as given
    folder: Path  # that holds its evaluations
    step: int | None
    hash: str  # "" if there are no weights, but only evaluations


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    given = [a for a in arguments if not a.startswith("-") and not command.is_option(a, Evaluate)]
    rest = [a for a in arguments if a not in given]
    return command.run(lambda settings: evaluate(settings, given), Evaluate, "RUN...", __doc__ or "", rest)


def evaluate(settings: Evaluate, given: list[str]) -> int:
    """Run the missing evaluations, print the report and write it; return the exit status."""
    from simclr_ddp.evaluation import report

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "evaluate is one process, which starts the evaluations; start it without torchrun, and with ranks=N"
        )
    if not given:
        raise ValueError("no runs given; write python -m simclr_ddp.evaluate runs/a runs/b")
    columns = {name: [identify(path) for path in paths] for name, paths in named(given).items()}
    notes = []
    for protocol in asked_protocols(settings.protocols):
        for encoder in [encoder for column in columns.values() for encoder in column]:
            why = why_left_out(protocol, encoder, settings) if settings.protocols == "all" else ""
            notes += [f"{encoder.path}: {why}"] if why else run_missing(protocol, encoder, settings)
    groups = []
    for name, column in columns.items():
        found, faults = zip(*(finished(encoder) for encoder in column), strict=True)
        groups.append(report.Group(name, [str(encoder.path) for encoder in column], list(found)))
        notes += [fault for of_run in faults for fault in of_run]
    if not any(of_run for group in groups for of_run in group.evaluations):
        raise ValueError(
            f"{given[0]}: has no evaluation of its current encoder; run some with protocols=all"
            + "".join(f" ({note})" for note in notes[:1])
        )
    content = report.build(groups, notes)
    if len(groups) > 1 and not settings.protocols and not content["comparisons"]:
        raise ValueError(content["notes"][-1])
    text = report.markdown(content)
    console.say(text)
    folder, status = output_folder(settings, given), 1 if any(note.startswith(FAILED) for note in notes) else 0
    if folder is None:
        console.say("(output=FOLDER writes this report as report.md, report.json and report.tex)")
        return status
    texts = {"md": text, "json": json.dumps(content, indent=1, allow_nan=False) + "\n", "tex": report.latex(content)}
    for suffix, written in texts.items():
        write(folder / f"report.{suffix}", written)
    console.say(f"written to {folder / 'report.md'}, report.json and report.tex")
    return status


def named(given: list[str]) -> dict[str, list[Path]]:
    """Columns of the report, by name: the runs of each argument."""
    columns = [[run for part in parts(text) for run in runs_in(Path(part))] for text in given]
    short = [",".join(path.resolve().name for path in column) for column in columns]
    short = [Path(text).resolve().name if "," not in text else name for text, name in zip(given, short, strict=True)]
    names = short if len(set(short)) == len(short) else given
    if len(set(names)) < len(names):
        raise ValueError(f"{' '.join(given)}: a run is given twice; give each once")
    return dict(zip(names, columns, strict=True))


def parts(text: str) -> list[str]:
    """The runs of an argument: itself if it exists, otherwise the texts between its commas."""
    return [text] if Path(text).exists() else [part for part in text.split(",") if part]


def runs_in(path: Path) -> list[Path]:
    """The path if it is a run or a file, otherwise the run directories that it holds. Raises ValueError for neither."""
    if not path.exists():
        raise ValueError(f"{path}: does not exist; give run directories, checkpoints or folders of runs")
    if path.is_file() or is_run(path):
        return [path]
    found = sorted(inside for inside in path.iterdir() if inside.is_dir() and is_run(inside))
    if not found:
        raise ValueError(f"{path}: is neither a run nor a folder that holds runs; give run directories")
    return found


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "encoder.safetensors", "evaluations"))


def identify(path: Path) -> Encoder:
    """Step and hash of the encoder, which is read; without one, only the evaluations of a run can be reported."""
    from simclr_ddp.runs.evaluations import exported

    file = path / "encoder.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors" and file.exists():
        return Encoder(path, file.parent, *exported(file))
    if path.is_dir() and not any((path / "checkpoints").glob("*.pt")):
        return Encoder(path, path, None, "")
    from simclr_ddp.runs.encoder import load_encoder

    loaded = load_encoder(path)
    return Encoder(path, loaded.folder, loaded.step, loaded.hash)


def finished(encoder: Encoder) -> "tuple[list[Evaluation], list[str]]":
    """Evaluations of this encoder, the newest first and one of each, and a sentence about each file left out."""
    from simclr_ddp.runs import evaluations

    found, faults = evaluations.read_all(encoder.folder)
    last = max((e.record["step"] or 0 for e in found), default=0)
    step = encoder.step if encoder.hash else last
    of_encoder: dict[str, Evaluation] = {}
    for e in sorted(found, key=lambda e: ("random" in e.record["results"], e.path.stat().st_mtime_ns), reverse=True):
        weights = e.record.get("hash", encoder.hash)  # earlier versions recorded the step only
        if weights == encoder.hash if "hash" in e.record and encoder.hash else e.record["step"] == step:
            of_encoder.setdefault(e.key, e)
        else:
            faults.append(f"{e.path}: it measured other weights (step {e.record['step']}) than the run has now")
    return list(of_encoder.values()), faults


def asked_protocols(text: str) -> list[str]:
    """The protocols of protocols=..., which is all or names with commas between them. Raises ValueError for others."""
    if text == "all":
        return list(PROTOCOLS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PROTOCOLS:
            raise ValueError(f"protocols={text}: {name} is unknown; choose from {', '.join(PROTOCOLS)}, or write all")
    return names


def why_left_out(protocol: str, encoder: Encoder, settings: Evaluate) -> str:
    """Why protocols=all leaves a protocol out, or ""."""
    if protocol != "transformations":
        return ""
    checkpoint = encoder.folder / "checkpoints" / f"step-{encoder.step or 0:08d}.pt"
    if encoder.path.suffix != ".pt" and not checkpoint.exists():
        return "transformations are left out, since there is no checkpoint with the projection head"
    own = own_images(encoder)
    if "spirograph" in (settings.train or own.get("train"), settings.test or own.get("test")):
        return "transformations are left out, since generated images are no photographs"
    return ""


def own_images(encoder: Encoder) -> dict[str, str]:
    """Training and test images of the encoder's run, if they are known."""
    from simclr_ddp.runs.directory import read_settings

    if not (encoder.folder / "config.yaml").exists():
        return {}
    data = read_settings(encoder.folder).data
    return {"train": data.train, "test": data.test}


def run_missing(protocol: str, encoder: Encoder, settings: Evaluate) -> list[str]:
    """Run an evaluation unless it is finished; return a note if it failed, whose error has then been printed."""
    name, cls = PROTOCOLS[protocol]
    overrides = overrides_of(name, cls, settings)
    wanted = options.build(cls, [(options.COMMAND_LINE, {"run": str(encoder.path)} | overrides)])
    if any(is_that(e, protocol, wanted, encoder) for e in finished(encoder)[0]):
        console.say(f"{protocol} of {encoder.path}: finished before")
        return []
    words = [str(encoder.path), *(f"{key}={options.shown(value)}" for key, value in overrides.items())]
    ranks = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={settings.ranks}"]
    start = [*(ranks if settings.ranks > 1 else []), *["-m"] * (settings.ranks > 1), f"simclr_ddp.{name}", *words]
    shown = " ".join(start)
    console.say(f"\npython -m {shown}")
    status = subprocess.run([sys.executable, "-m", *start]).returncode
    return [f"{FAILED}{protocol} of {encoder.path}, exit status {status} of python -m {shown}"] if status else []


def overrides_of(name: str, cls: type, settings: Evaluate) -> dict[str, Any]:
    """Options for a command: those of evaluate that it has, then those of set.COMMAND.KEY."""
    keys = options.options(cls).keys() & {"train", "test", "device"}
    found = {key: value for key in sorted(keys) if (value := getattr(settings, key)) not in ("", "auto")}
    for key, value in settings.set.items():
        owner, _, rest = key.partition(".")
        if not rest or owner not in [known for known, _ in PROTOCOLS.values()]:
            commands = ", ".join(sorted(known for known, _ in PROTOCOLS.values()))
            raise ValueError(f"set.{key}={value}: is no option of an evaluation; write set.COMMAND.KEY with {commands}")
        if owner == name:
            found[rest] = options.checked(cls, options.COMMAND_LINE, rest, value)
    return found


def is_that(evaluation: "Evaluation", protocol: str, wanted: Any, encoder: Encoder) -> bool:
    """Whether a finished evaluation has the protocol, the settings and the images that are asked for."""
    from simclr_ddp.runs.evaluations import fingerprint

    record, values = evaluation.record, options.plain(wanted)
    per_image = evaluation.path.with_suffix(".npz").exists()  # missing: written by an earlier version
    if evaluation.name != protocol or not (per_image or COMPARED.isdisjoint(evaluation.trained)):
        return False
    defaults = {key: field.default for key, field in options.options(PROTOCOLS[protocol][1]).items()}
    for key in values.keys() - WITHOUT_EFFECT:
        default = values[key] if isinstance(values[key], list) else defaults[key]  # lists were options from the start
        if record["settings"].get(key, default) != values[key]:
            return False
    own = own_images(encoder)
    if bool(values.get("validation")) != ("validation" in record):
        return False
    for split in ("train", "validation", "test"):
        source = values.get(split) or own.get(split, "")
        if split == "test" and not source and protocol in ("knn", "label_free"):  # which then take the training images
            source = values.get("train") or own.get("train", "")
        content = fingerprint(source)
        measured = record.get(split, {})
        if measured and source and (measured["fingerprint"] != content if content else measured["source"] != source):
            return False
    return True


def output_folder(settings: Evaluate, given: list[str]) -> Path | None:
    """Folder of the report, which is created; None: it is only printed."""
    if not settings.output and (len(given) > 1 or not Path(given[0]).is_dir()):
        return None
    folder = Path(settings.output or given[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, text: str) -> None:
    try:
        replace_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise OSError(
            f"the report can't be written to {path} ({one_line(error, 80)}); choose another folder with output=..."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
