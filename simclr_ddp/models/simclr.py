"""Projection head, and the SimCLR module that joins encoder, head and probe.

Batch norm is over all ranks throughout.
"""

from typing import NamedTuple

from torch import Tensor, nn

from simclr_ddp.distributed import batch_norm
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.backbone import Backbone


def projection_head(kind: str, width: int, layers: int = 2, hidden: int | None = None, out: int = 128) -> nn.Module:
    """Projection head g of Chen et al. 2020: representations [B, width] -> raw projections [B, out].

    none       the representation itself (out is ignored)
    linear     dense layer without bias, batch norm without shift
    nonlinear  (layers - 1) times a dense layer without bias, batch norm and ReLU; then a linear head
    """
    if kind == "none":
        return nn.Identity()
    modules: list[nn.Module] = []
    for _ in range(layers - 1 if kind == "nonlinear" else 0):
        modules += [nn.Linear(width, hidden or width, bias=False), CrossRankBatchNorm(hidden or width), nn.ReLU()]
        width = hidden or width
    return nn.Sequential(*modules, nn.Linear(width, out, bias=False), CrossRankBatchNorm(out, shift=False))


class Output(NamedTuple):
    h: Tensor  # [V, B, D] representations
    y: Tensor  # [V, B, d] raw projections
    logits: Tensor | None  # [V, B, classes] of the probe, computed from detached representations


class SimCLR(nn.Module):
    """Encoder, projection head and, for labelled classes, a linear probe on the detached representation.

    All views pass the encoder in one forward, so batch-norm statistics cover all views.
    """

    def __init__(self, encoder: Backbone, head: nn.Module, classes: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = head
        self.probe = nn.Linear(encoder.width_out, classes) if classes else None
        self._norms = batch_norm.count_together(self)

    def forward(self, images: Tensor) -> Output:
        """Apply encoder, head and probe to images [V, B, 3, H, W], float."""
        if self.training:
            batch_norm.count_batches(self._norms)
        flat = images.flatten(0, 1).contiguous(memory_format=self.encoder.memory_format)
        h = self.encoder(flat)
        y = self.projection_head(h)
        logits = self.probe(h.detach()).unflatten(0, images.shape[:2]) if self.probe is not None else None
        return Output(h.unflatten(0, images.shape[:2]), y.unflatten(0, images.shape[:2]), logits)
