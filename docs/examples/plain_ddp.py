"""The loss in a loop with DistributedDataParallel: `torchrun --nproc_per_node=2 docs/examples/plain_ddp.py`"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_ddp import CrossRankBatchNorm, KernelInfoNCE


def train(model: nn.Module, views: Tensor, steps: int = 3) -> nn.Module:
    """Train on this process's part of two views [2, N, ...] of every image; return the model."""
    model = CrossRankBatchNorm.convert(model)  # statistics of all processes
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    objective = KernelInfoNCE(temperature=0.2)  # negatives of all processes
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = views[:, rank::count]
    for _ in range(steps):
        y = parallel(mine.flatten(0, 1)).unflatten(0, (2, -1))
        loss = objective(y[0], y[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    dist.init_process_group()
    network = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    train(network, torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0)))
    dist.destroy_process_group()
