"""ResNet encoder with the stem, width and batch norm used in contrastive pretraining."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.backbone import Backbone

BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
STEMS = ("cifar", "stl", "imagenet")


class Encoder(Backbone):
    """ResNet without classifier, mapping images [B, 3, H, W] to representations h [B, width_out].

    arch   resnet18, resnet34, resnet50, resnet101 or resnet152
    width  multiplies every channel count, including the stem's 64; width_out = 512 * width (2048 * width from resnet50)
    stem   imagenet: 7x7 convolution of stride 2 and 3x3 max-pool of stride 2; cifar: 3x3 convolution of stride 1
           (Chen et al. 2020, B.9); stl: 3x3 convolution of stride 1 and 3x3 max-pool of stride 3
    checkpoint_stages  keep only the input of each of the four stages and recompute the stage in the backward pass: the
           same gradients and statistics in the memory of the largest stage, at the cost of most of a forward pass

    Initialisation follows He et al.; the last batch norm of every block starts at zero (Goyal et al. 2017), so blocks
    start as identities. Raises ValueError for an unknown arch or stem, or a width that leaves no channel.
    """

    def __init__(self, arch: str, width: float = 1.0, stem: str = "imagenet", checkpoint_stages: bool = False) -> None:
        super().__init__()
        if arch not in BLOCKS:
            raise ValueError(f"model.arch={arch}: unknown value; choose one of {', '.join(BLOCKS)}")
        if stem not in STEMS:
            raise ValueError(f"model.stem={stem}: unknown value; choose one of {', '.join(STEMS)}")
        block, depths = BLOCKS[arch]
        channels = [round(64 * width * 2**stage) for stage in range(4)]
        if channels[0] < 1:
            raise ValueError(f"model.width={width}: leaves no channel in the first layer; must be at least 1/64")
        self.in_channels = channels[0]
        # On processors without AVX-512, oneDNN's backward pass of a strided 1x1 convolution of fewer than 8 channels
        # in channels-last writes beyond its memory (torch 2.11 and 2.14).
        self.memory_format = torch.channels_last if channels[0] >= 8 else torch.contiguous_format
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = CrossRankBatchNorm(channels[0])
        self.relu = nn.ReLU(inplace=True)
        pools = {"imagenet": nn.MaxPool2d(3, 2, 1), "stl": nn.MaxPool2d(3, 3), "cifar": nn.Identity()}
        self.maxpool = pools[stem]
        self.layer1 = self._stage(block, channels[0], depths[0], stride=1)
        self.layer2 = self._stage(block, channels[1], depths[1], stride=2)
        self.layer3 = self._stage(block, channels[2], depths[2], stride=2)
        self.layer4 = self._stage(block, channels[3], depths[3], stride=2)
        self.width_out = self.in_channels
        self.checkpoint_stages = checkpoint_stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], channels: int, depth: int, stride: int) -> nn.Module:
        out = channels * block.expansion
        downsample = None
        if stride != 1 or self.in_channels != out:
            convolution = nn.Conv2d(self.in_channels, out, 1, stride=stride, bias=False)
            downsample = nn.Sequential(convolution, CrossRankBatchNorm(out))
        blocks = [block(self.in_channels, channels, stride, downsample, norm_layer=CrossRankBatchNorm)]
        blocks += [block(out, channels, norm_layer=CrossRankBatchNorm) for _ in range(depth - 1)]
        self.in_channels = out
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages():
            x = recompute(stage, x) if self.checkpoint_stages and torch.is_grad_enabled() else stage(x)
        return x.mean((2, 3))

    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


def recompute(stage: nn.Module, x: Tensor) -> Tensor:
    """Apply the stage, keeping only x and the buffers: the backward pass recomputes it.

    The second pass starts from the same buffers, since cross-rank batch norm uses the running mean as the origin of its
    sums, and its changes are discarded: running statistics are updated once. Chen et al. 2016 (arXiv 1604.06174).
    """
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    outer = nullcontext(), _Buffers(stage, before)
    result: Tensor = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: outer)
    return result


class _Buffers(AbstractContextManager[None]):
    """Replace a module's buffers by copies of `values`; can be entered again, since backward may run twice."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.original = [(m, dict(m._buffers)) for m in self.module.modules()]
        for name, value in self.values.items():
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._buffers[leaf] = value.clone()

    def __exit__(self, *_: object) -> None:
        for module, buffers in self.original:
            module._buffers.update(buffers)
