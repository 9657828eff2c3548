"""Results of evaluations in a run directory: evaluations/<checkpoint>-<data>-<protocol>.json, one file for each.

A file is a record of what was measured on what: step and hash of the encoder, source and content hash of training and
test images, every setting, every metric. `record["protocol"]` holds the name of the protocol, such as knn, and the
settings that can change its metrics; a record without it is a linear evaluation, described by its settings. Results per
image are in an .npz file of the same name. Nothing here imports torch, since launch reads these files too.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

from simclr_ddp.system.errors import one_line
from simclr_ddp.system.files import replace_atomically, short_hash

if TYPE_CHECKING:
    import numpy as np

FOLDER, OLD = "evaluations", "linear_eval.json"  # OLD: the only file of earlier versions
LINEAR = {"name": "linear"}  # the protocol of a record that names none
PROTOCOL = ("convention", "strengths", "validation_fraction", "seed", "tolerance", "max_iterations", "size")


class Evaluation(NamedTuple):
    path: Path
    record: dict[str, Any]

    @property
    def measured(self) -> str:
        """Name of the data and the protocol."""
        return f"{data_name(self.record)}-{protocol_name(self.record)}"

    @property
    def key(self) -> str:
        """Hashes of the data and the protocol: metrics are comparable only if these are equal."""
        return self.measured.split(".", 1)[1]

    @property
    def name(self) -> str:
        """Name of the protocol, such as linear or knn."""
        return protocol_name(self.record).split(".", 1)[0]

    @property
    def trained(self) -> dict[str, Any]:
        """Metrics of the trained encoder."""
        found: dict[str, Any] = self.record["results"]["trained"]
        return found


def weights_hash(tensors: Iterable[tuple[str, bytes | memoryview]]) -> str:
    """Hash an encoder's tensors, given by name and bytes, to 16 hex digits: equal in a checkpoint and an export."""
    found = sha256()
    for name, data in sorted(tensors, key=lambda pair: pair[0]):
        found.update(f"{name} {len(data)}\n".encode())
        found.update(data)
    return found.hexdigest()[:16]


def exported(path: Path) -> tuple[int | None, str]:
    """Step and hash of the encoder in a .safetensors file. Raises ValueError for another file."""
    data = memoryview(path.read_bytes())
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:begin]))
        step = header.pop("__metadata__", {}).get("step", "")
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        found = weights_hash((name, data[begin + first : begin + end]) for name, (first, end) in places.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read as safetensors ({one_line(error, 80)})") from error
    return int(step) if step.isdigit() else None, found


def data_name(record: dict[str, Any]) -> str:
    hashes: dict[str, Any] = {
        split: record[split]["fingerprint"] for split in ("train", "test", "validation") if split in record
    }
    return f"{_word(Path(record['test']['source']).stem)}.{short_hash(hashes)}"


def protocol_name(record: dict[str, Any]) -> str:
    """Name of the protocol, with a hash of the settings that can change the metrics of the trained encoder."""
    return f"{_word(record.get('protocol', LINEAR)['name'])}.{short_hash(protocol(record))}"


def protocol(record: dict[str, Any]) -> dict[str, Any]:
    """Settings that can change the metrics of the trained encoder."""
    if "protocol" in record:
        return {key: value for key, value in record["protocol"].items() if key != "name"}
    settings = record["settings"]
    found = {key: settings.get(key) for key in PROTOCOL} | {"precision": record["runtime"]["precision"]}
    if not found["size"] or found["size"] == record.get("own_size"):
        found["size"] = 0  # that of the run
    if settings.get("metric", "top1") != "top1":
        found["metric"] = settings["metric"]
    if "validation" in record:  # its content is part of the data
        found["validation"] = Path(record["validation"]["source"]).name
        del found["validation_fraction"]
    return found | {key: settings[key] for key in ("views", "crop") if settings.get(key)}


def write(folder: Path, record: dict[str, Any], arrays: "dict[str, np.ndarray] | None" = None) -> Path:
    """Write a record below the folder and return its path. Only an equal evaluation is replaced.

    arrays  results per image of the test images, in the order of their file: `labels` and `predictions` int64 [n] of
            classes, or `squared_error` float64 [n] of numbers
    """
    path = folder / FOLDER / f"{_file_name(record)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_arrays(path.with_suffix(".npz"), arrays)
    text = json.dumps(record, indent=1) + "\n"
    replace_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def _write_arrays(path: Path, arrays: "dict[str, np.ndarray] | None") -> None:
    if arrays is None:
        path.unlink(missing_ok=True)  # of an equal evaluation that kept them
        return
    import numpy as np  # here, since launch imports this module

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    replace_atomically(path, write)


def read_arrays(path: Path) -> "dict[str, np.ndarray]":
    """Read the results per image of the evaluation in `path`. Raises ValueError if there are none."""
    import numpy as np

    file = path.with_suffix(".npz")
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no results per image ({file.name}); evaluate again to write them") from error
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} can't be read ({one_line(error, 80)}); evaluate again to write it") from error


def trial_write(folder: Path, size: int = 1 << 16) -> str:
    """Write and delete a file of `size` bytes in a folder of results, such as FOLDER; return an error message or ""."""
    trial = folder / ".trial"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_atomically(trial, lambda temporary: temporary.write_bytes(bytes(size)))
        finally:
            trial.unlink(missing_ok=True)
            if not any(trial.parent.iterdir()):
                trial.parent.rmdir()
    except OSError as error:
        return (
            f"results can't be written to {folder} ({error.strerror}); free space there, or choose another "
            "folder with output=..."
        )
    return ""


def read_all(run_dir: Path) -> tuple[list[Evaluation], list[str]]:
    """Read every evaluation in a run directory, and a sentence about each file that can't be read."""
    found, faults = [], []
    for path in (run_dir / OLD, *sorted((run_dir / FOLDER).glob("*.json"))):
        if path.name.startswith(".") or not path.exists():
            continue
        try:
            evaluation = Evaluation(path, json.loads(path.read_text()))
            assert evaluation.measured and isinstance(evaluation.record["step"], int | None)
            assert all(math.isfinite(evaluation.trained.get(name) or 0) for name in ("top1", "mse"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            why = one_line(error, 80) if isinstance(error, OSError) else "it is no complete record of an evaluation"
            faults.append(f"{path} can't be read: {why}")
        else:
            found.append(evaluation)
    return found, faults


def of_run(
    run_dir: Path, *, step: int | None = None, train: str = "", test: str = ""
) -> tuple[list[Evaluation], list[str]]:
    """Evaluations of a finished run's encoder on its test images, and a sentence about each other one.

    step         last step of the run; encoder.safetensors replaces it
    train, test  data.train and data.test of the run. Without test images of its own, those of every evaluation count
    """
    found, left_out = read_all(run_dir)
    if not found:
        return found, left_out
    encoder, weights = run_dir / "encoder.safetensors", ""
    if encoder.exists():
        step, weights = exported(encoder)
    fitting = []
    for evaluation in found:
        fault = _foreign(evaluation.record, step, weights, train, test)
        if fault:
            left_out.append(f"{evaluation.path}: {fault}")
        else:
            fitting.append(evaluation)
    return fitting, left_out


def _foreign(record: dict[str, Any], step: int | None, weights: str, train: str, test: str) -> str:
    """Why the record isn't one of that encoder on that run's test images; "" if it is."""
    if None not in (step, record["step"]) and record["step"] != step:
        return f"it measured step {record['step']:,}, and the run is at step {step:,}"
    if record["step"] is None and not (weights and "hash" in record):
        return "the step that it measured is not known"
    if weights and record.get("hash", weights) != weights:
        return "it measured other weights of this step than the run has now"
    measured, fitted = record["test"], record.get("train", {})
    if measured.get("split") == "train" or measured["fingerprint"] == fitted.get("fingerprint"):
        return f"it measured training images, {measured['source']}"
    if train and _same(measured, train, "train"):
        return f"it measured the training images of the run, {measured['source']}"
    if test and not _same(measured, test, "test"):
        name = f"{data_name(record)}-{protocol_name(record)}"
        return f"it measured {measured['source']}, and data.test of the run is {test}; evaluation={name} shows it"
    return ""


def _same(measured: dict[str, Any], source: str, split: str) -> bool:
    """Whether a record's images are those of a source: by content, or by name if the source is not here."""
    if source == "spirograph":  # generated in the form of the run: data.spirograph
        return str(measured["fingerprint"]).startswith(f"spirograph-{split}-")
    content = fingerprint(source)
    return bool(measured["fingerprint"] == content if content else measured["source"] == source)


def fingerprint(source: str) -> str:
    """Content hash of a .beton file; "" if it can't be opened here."""
    try:
        return _fingerprint(source, Path(source).stat().st_mtime_ns)
    except OSError:
        return ""


@lru_cache
def _fingerprint(source: str, _: int) -> str:
    from simclr_ddp.data.beton import Beton  # here, since it imports numpy

    try:
        return Beton(source).fingerprint()
    except (ValueError, OSError):
        return ""


def _file_name(record: dict[str, Any]) -> str:
    checkpoint = "encoder" if record["step"] is None else f"step{record['step']:08d}"
    settings = f"{protocol_name(record)}{'' if 'random' in record['results'] else '.trained'}"
    return f"{checkpoint}.{record['hash'][:8]}-{data_name(record)}-{settings}"


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text)[:40] or "data"
