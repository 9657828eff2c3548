"""Encoders in the formats of other tools: torchvision, timm and Hugging Face, ONNX, torch.export.

Each writer puts files into a folder, reads them again with the tool that they are for, and compares the
representations of random images with those of the encoder.
"""

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_ddp.models.backbones import make_encoder
from simclr_ddp.models.resnet import BLOCKS
from simclr_ddp.runs.encoder import Loaded, Spec, export_encoder, export_tensors, spec_metadata
from simclr_ddp.system.files import replace_atomically

TOLERANCE = 1e-4  # largest difference of representations, relative to their largest value
LOADS = {  # how a file is loaded, for the model card
    "safetensors": 'import simclr_ddp\n\nloaded = simclr_ddp.load_encoder("encoder.safetensors")',
    "torchvision": (
        "import torch, torchvision\n\nencoder = torchvision.models.{arch}()\nencoder.fc = torch.nn.Identity()\n"
        'encoder.load_state_dict(torch.load("encoder.pth", weights_only=True))'
    ),
    "timm": 'import timm\n\nencoder = timm.create_model("local-dir:FOLDER", pretrained=True)  # this folder',
    "onnx": (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("encoder.onnx")\n'
        '(h,) = session.run(None, {{"images": images}})  # float32 [B, 3, {size}, {size}]'
    ),
    "torch_export": 'import torch\n\nencoder = torch.export.load("encoder.pt2").module()',
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def fault(spec: Spec, form: str) -> str:
    """Why a format can't hold the encoder, or ""."""
    if missing := [name for name in NEEDS.get(form, ()) if find_spec(name) is None]:
        return f"format={form}: {', '.join(missing)} not installed; pip install '.[onnx]'"
    if form in ("torchvision", "timm") and spec.arch not in BLOCKS:
        return (
            f"format={form}: holds the ResNets of this tool; choose format=onnx or format=torch_export for {spec.arch}"
        )
    if form in ("torchvision", "timm") and (spec.stem != "imagenet" or spec.width != 1):
        why = f"model.stem={spec.stem}" if spec.stem != "imagenet" else f"model.width={spec.width:g}"
        return (
            f"format={form}: its {spec.arch} can't have {why}; choose format=onnx or format=torch_export, which hold "
            "any encoder"
        )
    return ""


def write(loaded: Loaded, form: str, folder: Path) -> str:
    """Write the encoder's files of a format to a folder; return how they were checked.

    Raises ValueError if what was written has other representations, and OSError if it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder, size = loaded.encoder.float().eval(), loaded.spec.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator)
    with torch.no_grad():
        expected = encoder(images)
    found = WRITERS[form](loaded, images, folder)
    replace_atomically(folder / "preprocessing.json", partial(_write_json, preprocessing(loaded)))
    if found is None:
        return "not read again, since timm is not installed"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{folder}: the {form} encoder has other representations, by {difference:.1e} of the largest; report this"
        )
    return f"read again: representations of random images differ by {difference:.0e} of the largest"


def preprocessing(loaded: Loaded) -> dict[str, Any]:
    """What an image must become before it enters the encoder."""
    transform = loaded.transform
    complete = transform.size <= 32 and not transform.crop
    return {
        "size": transform.size,
        "crop": "the complete image" if complete else "the centred square",
        "crop_fraction": 1.0 if complete else transform.crop or 0.875,  # of the short side
        "interpolation": "bilinear, antialiased",
        "channels": "RGB",
        "range": [0.0, 1.0],
        "mean": list(transform.mean),
        "std": list(transform.std),
        "representation": loaded.encoder.width_out,
    }


def _safetensors(loaded: Loaded, images: Tensor, folder: Path) -> Tensor:
    file = folder / "encoder.safetensors"
    spec = loaded.spec
    export_encoder(file, loaded.encoder, spec_metadata(spec, loaded.step))
    again = make_encoder(spec.arch, spec.width, spec.stem, spec.size)
    again.load_state_dict(load_file(file))
    return _forward(again, images)


def _torchvision(loaded: Loaded, images: Tensor, folder: Path) -> Tensor:
    file = folder / "encoder.pth"
    replace_atomically(file, lambda temporary: torch.save(loaded.encoder.state_dict(), temporary))
    again = torchvision.models.get_model(loaded.spec.arch)
    again.fc = nn.Identity()
    again.load_state_dict(torch.load(file, weights_only=True))
    return _forward(again, images)


def _timm(loaded: Loaded, images: Tensor, folder: Path) -> Tensor | None:
    spec, asked = loaded.spec, preprocessing(loaded)
    config = {
        "architecture": spec.arch,
        "num_classes": 0,
        "num_features": loaded.encoder.width_out,
        "global_pool": "avg",
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, spec.size, spec.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": asked["crop_fraction"],
            "crop_mode": "squash" if asked["crop"] == "the complete image" else "center",
            "mean": asked["mean"],
            "std": asked["std"],
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    export_tensors(folder / "model.safetensors", loaded.encoder.state_dict(), {"format": "pt"})
    replace_atomically(folder / "config.json", partial(_write_json, config))
    if find_spec("timm") is None:
        return None
    import timm

    return _forward(timm.create_model(f"local-dir:{folder}", pretrained=True), images)


def _onnx(loaded: Loaded, images: Tensor, folder: Path) -> Tensor:
    import onnxruntime

    program = torch.onnx.export(
        loaded.encoder,
        (images,),
        input_names=["images"],
        output_names=["h"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    file = folder / "encoder.onnx"
    replace_atomically(file, lambda temporary: program.save(str(temporary)))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in images.split(2)])


def _program(loaded: Loaded, images: Tensor, folder: Path) -> Tensor:
    program = torch.export.export(loaded.encoder, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = folder / "encoder.pt2"
    replace_atomically(file, lambda temporary: _save_program(program, temporary))
    again = torch.export.load(str(file)).module()
    return torch.cat([_forward(again, part) for part in images.split(2)])


def _save_program(program: torch.export.ExportedProgram, temporary: Path) -> None:
    with temporary.open("wb") as file:  # a name that does not end in .pt2 gives a warning
        torch.export.save(program, file)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


@torch.no_grad()
def _forward(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if isinstance(module, nn.Module) and not isinstance(module, torch.fx.GraphModule):
        module.eval()  # the module of an exported program is what it was
    return module(images)


WRITERS: dict[str, Callable[[Loaded, Tensor, Path], Tensor | None]] = {
    "safetensors": _safetensors,
    "torchvision": _torchvision,
    "timm": _timm,
    "onnx": _onnx,
    "torch_export": _program,
}
