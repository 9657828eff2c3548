"""Wrapper of DistributedDataParallel."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from simclr_ddp.distributed.collectives import world_size


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel; return the model itself if there is one rank."""
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # Buffers are batch-norm statistics, which CrossRankBatchNorm keeps equal on all ranks. torch renamed this option.
    name = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, name: False}
    return ddp(model, **options)


def settle_buckets(model: nn.Module, forward_and_backward: Any) -> None:
    """Run two passes without an update, after which DDP's gradient buckets no longer change.

    DDP regroups its buckets after the first backward pass, in the order in which gradients became ready. This changes
    the order of additions in the all-reduce from the second step on, so a resumed run would differ from an
    uninterrupted one in its first step. Two passes before the first step of every start make the buckets final;
    batch-norm statistics are restored and gradients dropped.
    """
    if world_size() == 1:
        return
    buffers = [b.clone() for b in model.buffers()]
    for _ in range(2):
        forward_and_backward()
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
