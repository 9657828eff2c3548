"""Encoder, projection head, and the SimCLR module that joins them.

Encoders are torchvision's residual blocks with torchvision's parameter names, every channel count multiplied by a
width, and cross-rank batch norm throughout.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr_ddp import distributed
from simclr_ddp.distributed import CrossRankBatchNorm

BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
STEMS = ("cifar", "stl", "imagenet")


class Encoder(nn.Module):
    """ResNet without its classifier: images [B, 3, H, W] -> representations h [B, width_out].

    arch   resnet18, 34, 50, 101 or 152
    width  multiplies every channel count, the stem's 64 included; width_out = 512 * width (2048 * width from 50 on)
    stem   imagenet: 7x7 convolution of stride 2 and 3x3 max-pool of stride 2; cifar: 3x3 convolution of stride 1
           (Chen et al. 2020, B.9); stl: 3x3 convolution of stride 1 and 3x3 max-pool of stride 3
    checkpoint_stages  of each of the four stages keep the input alone, and compute it again in the backward pass:
           the same gradients and statistics, in the memory of the largest stage, for most of a forward pass more

    He initialisation; the last batch norm of every block starts at zero (Goyal et al. 2017), so blocks start as
    identities. Raises ValueError for an unknown arch or stem, or a width that leaves no channel.
    """

    def __init__(self, arch: str, width: float = 1.0, stem: str = "imagenet", checkpoint_stages: bool = False) -> None:
        super().__init__()
        if arch not in BLOCKS:
            raise ValueError(f"model.arch={arch} is not known: one of {', '.join(BLOCKS)} is wanted")
        if stem not in STEMS:
            raise ValueError(f"model.stem={stem} is not known: one of {', '.join(STEMS)} is wanted")
        block, depths = BLOCKS[arch]
        channels = [round(64 * width * 2**stage) for stage in range(4)]
        if channels[0] < 1:
            raise ValueError(f"model.width={width} leaves no channel in the first layer: at least 1/64 is wanted")
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
            x = recomputed(stage, x) if self.checkpoint_stages and torch.is_grad_enabled() else stage(x)
        return x.mean((2, 3))

    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


def recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    """stage(x), of which autograd keeps nothing but x and the buffers: the backward pass computes it again.

    The second pass starts from the buffers of the first, whose running means batch norm over ranks takes as the origin
    of its sums, and leaves none of its changes: running statistics are updated once. Chen et al. 2016
    (arXiv 1604.06174).
    """
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    outer = nullcontext(), _Buffers(stage, before)
    result: Tensor = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: outer)
    return result


class _Buffers(AbstractContextManager[None]):
    """Within, the module has copies of these values as its buffers. Can be entered again: backward may run twice."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.own = [(m, dict(m._buffers)) for m in self.module.modules()]
        for name, value in self.values.items():
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._buffers[leaf] = value.clone()

    def __exit__(self, *_: object) -> None:
        for module, buffers in self.own:
            module._buffers.update(buffers)


def projection_head(kind: str, width: int, layers: int = 2, hidden: int | None = None, out: int = 128) -> nn.Module:
    """The head g of Chen et al. 2020: representations [B, width] -> raw projections [B, out].

    none       the representation itself (out is not used)
    linear     dense without bias, batch norm without shift
    nonlinear  (layers - 1) times dense without bias, batch norm, ReLU; then a linear head
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
    logits: Tensor | None  # [V, B, classes] of the probe, from detached representations


class SimCLR(nn.Module):
    """Encoder, head and, where there are classes, a linear probe on the detached representation.

    All views go through the encoder in one forward, so batch-norm statistics are those of all of them together.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, classes: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = head
        self.probe = nn.Linear(encoder.width_out, classes) if classes else None
        self._norms = distributed.count_together(self)

    def forward(self, images: Tensor) -> Output:
        """images [V, B, 3, H, W] float."""
        if self.training:
            distributed.count_batches(self._norms)
        flat = images.flatten(0, 1).contiguous(memory_format=self.encoder.memory_format)
        h = self.encoder(flat)
        y = self.projection_head(h)
        logits = self.probe(h.detach()).unflatten(0, images.shape[:2]) if self.probe is not None else None
        return Output(h.unflatten(0, images.shape[:2]), y.unflatten(0, images.shape[:2]), logits)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pt / .pth file that holds nothing but tensors and plain values.

    A training checkpoint of ours, or a state dict under `model` or `state_dict`, is unpacked; a prefix `module.`
    or `encoder.` is stripped. Nothing is unpickled beyond what weights_only=True allows.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise ValueError(f"weights {path} do not exist: give a .safetensors or .pt file, or a finished run's directory")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # safetensors', pickle's and zip's errors have no common class
        raise ValueError(f"weights {path} can't be read: {' '.join(str(error).split())[:200]}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"weights {path} hold no state dict: a file of named tensors is wanted")
    for prefix in ("module.", "encoder."):
        if any(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): v for key, v in loaded.items() if key.startswith(prefix)}
    return loaded


def initialize(encoder: Encoder, init: str, arch: str, width: float) -> str:
    """Fill an encoder by `model.init`; returns one phrase on what was loaded.

    init  random, torchvision (its newest ImageNet weights of arch, downloaded by rank 0 if not cached), or a file

    Tensors that the encoder lacks (a classifier) or has in another shape (the stem) are left out and named. Raises
    ValueError if fewer than 95 % of the encoder's tensors are found, or if the file has further blocks: a deeper
    encoder's tensors would all fit.
    """
    if init == "random":
        return "random"
    if init == "torchvision":
        if width != 1:
            raise ValueError(f"model.init=torchvision has no weights of model.width={width}: width 1 is wanted")
        weights = _torchvision_weights(arch)
    else:
        weights = read_weights(init)
    own = encoder.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    # Weights older than torch 0.4.1, some of torchvision's among them, don't count their batches.
    missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    further = [k for k in weights if k not in own and k.startswith("layer")]
    if len(missing) > 0.05 * len(own) or further:
        raise ValueError(
            f"model.init={init} fits only {len(fitting)} of the {len(own)} tensors of {arch} x {width:g} "
            f"({(missing or further)[0]} is the first that does not): weights of the same arch and width are wanted"
        )
    encoder.load_state_dict(fitting, strict=False)
    left = f"; random: {', '.join(missing)}" if missing else ""
    unused = [k for k in weights if k not in fitting]
    left += f"; not used: {', '.join(unused[:4])}{' ...' if len(unused) > 4 else ''}" if unused else ""
    return f"{len(fitting)} of {len(own)} tensors from {init}{left}"


def _torchvision_weights(arch: str) -> dict[str, Tensor]:
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    if distributed.local_rank() != 0:
        distributed.barrier()  # the first rank of each machine downloads
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"model.init=torchvision: {url} can't be downloaded ({error}): bring the file into {folder}"
        ) from error
    if distributed.local_rank() == 0:
        distributed.barrier()
    return weights
