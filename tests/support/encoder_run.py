"""A run directory whose encoder is not trained, for tests of what is done with an encoder: written in no time."""

from pathlib import Path

import torch

from simclr_ddp.config import options
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.models.resnet import Encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.runs.encoder import encoder_metadata, export_encoder

STEP = 8
CHECKPOINT = f"checkpoints/step-{STEP:08d}.pt"


def make_run(folder: Path, train: Path | str, test: Path | str = "", **changed: object) -> Path:
    """Write config.yaml, a checkpoint and encoder.safetensors of random weights; `changed` are options, a__b is a.b."""
    given = {"data.train": str(train), "data.test": str(test), "data.size": 16, "model.width": 0.125, "head.out": 16}
    given |= {key.replace("__", "."): value for key, value in changed.items()}
    settings = options.build(Pretrain, [("the test", given)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(settings.model.arch, settings.model.width, settings.model.stem)
        head = projection_head(settings.head.kind, encoder.width_out, settings.head.layers, None, settings.head.out)
        model = SimCLR(encoder, head)
        for module in model.modules():  # batch norms that do something
            if hasattr(module, "running_mean"):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(options.to_yaml(settings))
    saved = {"step": STEP, "model": model.state_dict(), "config": options.plain(settings)}
    torch.save(saved, folder / CHECKPOINT)
    export_encoder(folder / "encoder.safetensors", encoder, encoder_metadata(settings, STEP))
    return folder
