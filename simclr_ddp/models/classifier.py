"""The model of supervised training: an encoder and a linear classifier."""

import torch
from torch import Tensor, nn

from simclr_ddp.distributed import batch_norm
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.backbone import Backbone
from simclr_ddp.models.resnet import Encoder


class Classifier(nn.Module):
    """Map images [B, 3, H, W] to logits [B, classes] by an encoder and a linear classifier, which starts at zero.

    neck         layers between the two, such as the first of the projection head
    frozen       the encoder (with the neck) is in evaluation mode, gets no gradient and stays as it is
    freeze_bn    batch norm uses its running statistics, which stay as they are; its scale and shift are trained
    bn_momentum  weight of a batch in the running statistics
    """

    def __init__(
        self,
        encoder: Backbone,
        classes: int,
        *,
        neck: nn.Sequential | None = None,
        frozen: bool = False,
        freeze_bn: bool = False,
        bn_momentum: float = batch_norm.MOMENTUM,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = nn.Sequential() if neck is None else neck
        widths = [encoder.width_out, *(layer.out_features for layer in self.neck if isinstance(layer, nn.Linear))]
        self.classifier = nn.Linear(widths[-1], classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.frozen, self.freeze_bn = frozen, freeze_bn
        encoder.requires_grad_(not frozen)
        self.neck.requires_grad_(not frozen)
        self._norms = batch_norm.count_together(self)
        for norm in self._norms:
            norm.momentum = bn_momentum

    def forward(self, images: Tensor) -> Tensor:
        if updated := [norm for norm in self._norms if norm.training]:
            batch_norm.count_batches(updated)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            h = self.neck(self.encoder(images.contiguous(memory_format=self.encoder.memory_format)))
        logits: Tensor = self.classifier(h)
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.neck.eval()
        elif self.freeze_bn:
            for module in self.modules():
                if isinstance(module, CrossRankBatchNorm):
                    module.eval()
        return self

    def stages(self) -> list[nn.Module]:
        """Return the parts that share a learning rate, from the classifier to the first convolution."""
        last = [self.classifier, *([self.neck] if len(self.neck) else [])]
        if not isinstance(self.encoder, Encoder):
            return [*last, self.encoder]
        stem = nn.ModuleList([self.encoder.conv1, self.encoder.bn1])
        return [*last, *reversed(self.encoder.stages()), stem]

    def after_encoder(self) -> dict[str, Tensor]:
        """Return the tensors of the neck and of the classifier (weight [K, D] and bias [K])."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}


def first_layers(head: nn.Module, layers: int) -> nn.Sequential:
    """Return the first dense layers of a projection head, each with the batch norm and ReLU that follow it.

    Raises ValueError if it has fewer. Chen et al. 2020 (SimCLR v2) fine-tune from the first layer of the head.
    """
    modules = list(head) if isinstance(head, nn.Sequential) else []
    starts = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)] + [len(modules)]
    if layers >= len(starts):
        raise ValueError(f"from_layer={layers}: the projection head has {len(starts) - 1} layers; choose at most those")
    return nn.Sequential(*modules[: starts[layers]])
