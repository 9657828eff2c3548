"""The loss in a module of PyTorch Lightning: `torchrun --nproc_per_node=2 docs/examples/in_lightning.py`"""

import os

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simclr_ddp import CrossRankBatchNorm, KernelInfoNCE


class Contrastive(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = CrossRankBatchNorm.convert(model)  # instead of Trainer(sync_batchnorm=True)
        self.objective = KernelInfoNCE(temperature=0.2)  # negatives of all processes

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        y = self.model(torch.cat(batch)).unflatten(0, (2, -1))
        loss: Tensor = self.objective(y[0], y[1])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(model: nn.Module, views: Tensor, steps: int = 3) -> nn.Module:
    """Train on two views [2, N, ...] of every image, all of which are one batch; return the model.

    Lightning gives each process every W-th image, and DistributedDataParallel averages the gradients.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    loader = DataLoader(TensorDataset(*views), batch_size=views.shape[1] // processes, drop_last=True)
    module = Contrastive(model)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.model


if __name__ == "__main__":
    network = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    train(network, torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0)))
