"""A model card: what an encoder is, how it was trained, what was measured, as the README.md of an exported folder."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from simclr_ddp import __version__
from simclr_ddp.evaluation.report import describe_data, metrics, number, title
from simclr_ddp.models.resnet import BLOCKS
from simclr_ddp.runs import evaluations
from simclr_ddp.runs.encoder import Loaded, Spec
from simclr_ddp.runs.export_formats import LOADS, preprocessing

RECIPE = (
    *(
        "data.train",
        "loss.kernel",
        "loss.temperature",
        "head.kind",
        "head.out",
        "optim.name",
        "optim.base_learning_rate",
    ),
    *("optim.weight_decay", "optim.global_batch_size", "optim.epochs", "optim.steps", "data.augmentation.crop_scale"),
    *("data.augmentation.strength", "model.init", "seed"),
)


def model_card(loaded: Loaded, form: str, folder: Path) -> str:
    """Markdown for the files in a folder, with the front matter that Hugging Face's hub reads."""
    spec, settings = loaded.spec, loaded.settings
    library = {"timm": "timm", "onnx": "onnx"}.get(form, "pytorch")
    step = "at an unknown step" if loaded.step is None else f"after {loaded.step:,} steps"
    hashes = [f"* `{path.name}`: sha256 `{sha256(path.read_bytes()).hexdigest()}`" for path in _files(folder)]
    return f"""---
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- self-supervised
- contrastive
---

# {settings.get("name") or loaded.folder.name}

Image encoder {_architecture(spec)}: images of {spec.size} x {spec.size}
pixels to representations of {loaded.encoder.width_out} numbers. It was trained without labels by
[contrastive learning](https://arxiv.org/abs/2002.05709) with simclr_ddp {__version__}, and is saved {step}.

```python
{LOADS[form].format(arch=spec.arch, size=spec.size)}
```

## Preprocessing

{_table(preprocessing(loaded))}

## Training

{_table(_recipe(settings))}

## Evaluation

{_evaluations(loaded)}

## Hashes

Weights: `{loaded.hash}` (of all tensors, as simclr_ddp names them).

{_lines(hashes)}
"""


def _architecture(spec: Spec) -> str:
    own = f", {spec.width:g} times as wide, with the stem {spec.stem}"
    return spec.arch + (own if spec.arch in BLOCKS else "")


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that describe the training, without those that are not set."""
    known = {key: settings[key] for key in RECIPE if settings.get(key) not in (None, "")}
    if not known.get("optim.steps"):
        known.pop("optim.steps", None)
    return known or {"settings": "unknown"}


def _files(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "." and path.suffix != ".md"
    ]


def _lines(lines: list[str]) -> str:
    return "\n".join(lines)


def _table(values: dict[str, Any]) -> str:
    return _lines(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])


def _evaluations(loaded: Loaded) -> str:
    """Metrics of these weights in the run directory."""
    found = [e for e in evaluations.read_all(loaded.folder)[0] if e.record.get("hash") == loaded.hash]
    if not found:
        return "None is in the run directory."
    lines = ["| protocol | images | trained on | metrics |", "|---|---|---|---|"]
    for evaluation in found:
        shown = [f"{title(key)} {number(key, value)}" for key, value in metrics(evaluation.trained).items()]
        train = evaluation.record.get("train", {})
        data = f"{train['source']} (content {train['fingerprint']})" if train else ""
        lines.append(f"| {evaluation.name} | {describe_data(evaluation.record)} | {data} | {', '.join(shown[:8])} |")
    return _lines(lines)
