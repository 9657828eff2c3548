"""Write an encoder for other tools: `python -m simclr_ddp.export RUN format=NAME key=value ...`

format=torchvision writes a state dict for torchvision's class, format=timm a folder that timm and Hugging Face's hub
read, format=onnx and format=torch_export a network of any architecture for any batch size, and
format=safetensors the encoder of a checkpoint for this tool. torchvision and timm have no ResNet of another width or
with a 3x3 stem.

The folder also gets preprocessing.json, which says what an image must become before it enters the encoder, and a model
card README.md with recipe, metrics and hashes. What was written is read again with the tool that it is for, and its
representations of random images are compared with those of the encoder.
"""

import sys
from pathlib import Path

from simclr_ddp.config import command
from simclr_ddp.config.schema import Export
from simclr_ddp.system import console
from simclr_ddp.system.files import replace_atomically


def main(argv: list[str] | None = None) -> int:
    return command.run(export, Export, "RUN", __doc__ or "", argv)


def export(settings: Export) -> int:
    """Write one format of the encoder of `settings.run`; return the exit status."""
    from simclr_ddp.evaluation.model_card import model_card
    from simclr_ddp.evaluation.subject import open_encoder
    from simclr_ddp.runs import export_formats

    loaded, _ = open_encoder(settings.run, settings.size, settings.crop)
    if fault := export_formats.fault(loaded.spec, settings.format):
        raise ValueError(fault)
    folder = Path(settings.output) if settings.output else loaded.folder / "export" / settings.format
    card_file = folder / "README.md"
    if card_file.exists() and "pipeline_tag: image-feature-extraction" not in card_file.read_text(errors="replace"):
        raise ValueError(
            f"output={folder}: its README.md is no model card; choose a folder for the files of this export"
        )
    checked = export_formats.write(loaded, settings.format, folder)
    card = model_card(loaded, settings.format, folder)
    replace_atomically(card_file, lambda temporary: temporary.write_text(card))
    step = "" if loaded.step is None else f" of step {loaded.step}"
    console.say(f"{loaded.file}{step}: written to {folder}; {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
