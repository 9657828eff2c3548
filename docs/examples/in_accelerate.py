"""The loss in a loop of Hugging Face Accelerate: `accelerate launch docs/examples/in_accelerate.py`"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simclr_ddp import CrossRankBatchNorm, KernelInfoNCE


def train(model: nn.Module, views: Tensor, steps: int = 3) -> nn.Module:
    """Train on two views [2, N, ...] of every image, all of which are one batch; return the model."""
    accelerator = Accelerator(cpu=True)
    model = CrossRankBatchNorm.convert(model)  # statistics of all processes
    objective = KernelInfoNCE(temperature=0.2)  # negatives of all processes
    loader = DataLoader(TensorDataset(*views), batch_size=views.shape[1] // accelerator.num_processes, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(steps):
        for batch in loader:
            y = parallel(torch.cat(batch)).unflatten(0, (2, -1))
            loss = objective(y[0], y[1])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return model


if __name__ == "__main__":
    network = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    train(network, torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0)))
