"""Encoders against torchvision's, heads, and weights from files."""

import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models.resnet import BLOCKS, STEMS, Encoder
from simclr_ddp.models.simclr import SimCLR, projection_head
from simclr_ddp.models.weights import initialize, read_weights
from simclr_ddp.runs import checkpoint
from tests.support.ranks import Ranks

ARCHS = tuple(BLOCKS)
TINY = 1 / 16


def on_meta(arch: str, width: float = 1.0, stem: str = "imagenet") -> Encoder:
    with torch.device("meta"):
        return Encoder(arch, width, stem)


def torchvision_model(arch: str) -> nn.Module:
    model = getattr(torchvision.models, arch)(weights=None)
    model.fc = nn.Identity()
    return model


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_parameters_are_torchvisions(arch: str) -> None:
    ours = on_meta(arch)
    with torch.device("meta"):
        theirs = torchvision_model(arch)
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_forward_is_torchvisions(arch: str) -> None:
    torch.manual_seed(0)
    ours, theirs = Encoder(arch), torchvision_model(arch)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for mode in (False, True):  # evaluation first: training changes the statistics
            h = ours.train(mode)(images)
            torch.testing.assert_close(h, theirs.train(mode)(images), rtol=1e-4, atol=1e-5)
            assert h.std() > 1e-3
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("width", "millions", "out"), [(1, 24, 2048), (2, 94, 4096), (4, 375, 8192)])
def test_published_sizes_of_wide_resnet50(width: int, millions: int, out: int) -> None:
    encoder = on_meta("resnet50", width)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions
    assert encoder.width_out == out


@pytest.mark.parametrize(
    ("arch", "width", "out"), [("resnet18", 0.25, 128), ("resnet34", 2, 1024), ("resnet50", 0.5, 1024)]
)
@pytest.mark.parametrize("stem", STEMS)
def test_output_width(arch: str, width: float, out: int, stem: str) -> None:
    encoder = on_meta(arch, width, stem)
    assert encoder(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, out) and encoder.width_out == out
    assert encoder.conv1.out_channels == 64 * width


@pytest.mark.parametrize(
    ("stem", "size", "after_stem", "last"), [("imagenet", 224, 56, 7), ("cifar", 32, 32, 4), ("stl", 96, 32, 4)]
)
def test_resolutions(stem: str, size: int, after_stem: int, last: int) -> None:
    encoder = on_meta("resnet18", 1, stem)
    x = encoder.maxpool(encoder.conv1(torch.empty(1, 3, size, size, device="meta")))
    assert x.shape[-2:] == (after_stem, after_stem)
    x = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))
    assert x.shape[-2:] == (last, last)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_blocks_start_as_identities(arch: str) -> None:
    encoder = Encoder(arch, TINY)
    last = "bn2" if arch == "resnet18" else "bn3"
    zero = {
        k
        for k, v in encoder.state_dict().items()
        if k.endswith(("bn1.weight", "bn2.weight", "bn3.weight")) and not v.any()
    }
    blocks = [f"layer{s + 1}.{i}" for s, depth in enumerate(BLOCKS[arch][1]) for i in range(depth)]
    assert zero == {f"{b}.{last}.weight" for b in blocks}
    assert all(
        isinstance(m, CrossRankBatchNorm) for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )
    x = torch.rand(2, encoder.layer1[1].conv1.in_channels, 8, 8)
    torch.testing.assert_close(encoder.layer1[1](x), x)


def test_convolutions_have_he_variance() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.5)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            count = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=4 / math.sqrt(count)), name


def test_only_wide_encoders_are_channels_last() -> None:
    """The narrow ones crash in their backward pass where a processor has no AVX-512, which many tests here would."""
    assert Encoder("resnet18", 0.125).memory_format == torch.channels_last
    assert Encoder("resnet18", 0.1).memory_format == torch.contiguous_format


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20",), "model.arch=resnet20: unknown value; choose one of resnet18"),
        (("resnet18", 1.0, "tiny"), "model.stem=tiny: unknown value; choose one of cifar"),
        (("resnet18", 0.001), "model.width=0.001: leaves no channel"),
    ],
)
def test_unknown_encoders(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(*arguments)


# --- heads ----------------------------------------------------------------------------------------------------------


def structure(head: nn.Module) -> list[str]:
    """One word a layer, in the notation of the reference code."""
    words = []
    for module in head.children():
        if isinstance(module, nn.Linear):
            words.append(
                f"dense {module.in_features}-{module.out_features}" + (" bias" if module.bias is not None else "")
            )
        elif isinstance(module, CrossRankBatchNorm):
            words.append(f"norm {module.num_features}" + (" shift" if module.bias is not None else ""))
        else:
            words.append(type(module).__name__.lower())
    return words


def test_heads_of_the_reference_code() -> None:
    assert isinstance(projection_head("none", 32), nn.Identity)
    assert structure(projection_head("linear", 32, layers=3, out=8)) == ["dense 32-8", "norm 8"]
    hidden = ["dense 32-32", "norm 32 shift", "relu"]
    assert structure(projection_head("nonlinear", 32)) == [*hidden, "dense 32-128", "norm 128"]
    assert structure(projection_head("nonlinear", 32, layers=3, out=8)) == [*hidden, *hidden, "dense 32-8", "norm 8"]
    narrow = ["dense 32-16", "norm 16 shift", "relu", "dense 16-16", "norm 16 shift", "relu", "dense 16-8", "norm 8"]
    assert structure(projection_head("nonlinear", 32, layers=3, hidden=16, out=8)) == narrow


def test_simclr_joins_them_in_one_forward() -> None:
    torch.manual_seed(0)
    model = SimCLR(Encoder("resnet18", TINY, "cifar"), projection_head("nonlinear", 32, out=8), classes=3)
    views = torch.randn(2, 5, 3, 16, 16)
    out = model(views)
    assert (out.h.shape, out.y.shape, out.logits.shape) == ((2, 5, 32), (2, 5, 8), (2, 5, 3))
    assert model.encoder.bn1.num_batches_tracked == 1, "both views share their statistics"
    torch.testing.assert_close(out.h.flatten(0, 1), model.encoder(views.flatten(0, 1)))
    out.logits.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.probe.weight.grad is not None
    assert SimCLR(Encoder("resnet18", TINY), nn.Identity())(views).logits is None


# --- weights from files ---------------------------------------------------------------------------------------------


def trained(arch: str = "resnet18", width: float = TINY, stem: str = "imagenet") -> dict[str, Tensor]:
    """A state dict that is not that of any fresh encoder."""
    state = Encoder(arch, width, stem).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {k: torch.rand(v.shape, generator=generator).to(v.dtype) for k, v in state.items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def write(kind: str, folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    head = {"projection_head.0.weight": torch.ones(2, 32)}
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "training checkpoint":
        whole = {"step": 3, "model": prefixed(state, "encoder.") | head, "optimizers": [{"state": {}}], "world_size": 1}
        path = checkpoint.save(folder, whole, 3, 1)
    elif kind == "state_dict":
        torch.save({"state_dict": prefixed(state, "module."), "epoch": 7}, path)
    elif kind == "module.encoder.":
        torch.save(prefixed(prefixed(state, "encoder.") | head, "module."), path)
    elif kind == "legacy format":
        torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(prefixed(state, kind.removeprefix("plain")), path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "plain",
        "legacy format",
        "module.",
        "encoder.",
        "module.encoder.",
        "state_dict",
        "training checkpoint",
    ],
)
def test_initialize_from_a_file(kind: str, tmp_path: Path) -> None:
    state = trained()
    path = write(kind, tmp_path, state)
    encoder = Encoder("resnet18", TINY)
    sentence = initialize(encoder, str(path), "resnet18", TINY)
    assert sentence == f"{len(state)} of {len(state)} tensors from {path}"
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_another_stem_stays_random_and_is_named(tmp_path: Path) -> None:
    state = trained() | {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    path = write("safetensors", tmp_path, state)
    encoder = Encoder("resnet18", TINY, "cifar")
    before = encoder.conv1.weight.clone()
    sentence = initialize(encoder, str(path), "resnet18", TINY)
    assert "119 of 120 tensors" in sentence and "random: conv1.weight;" in sentence
    assert "not used: conv1.weight, fc." in sentence and "fc.weight" in sentence and "fc.bias" in sentence
    assert torch.equal(encoder.conv1.weight, before)
    assert torch.equal(encoder.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_weights_that_do_not_count_their_batches(tmp_path: Path) -> None:
    """torchvision's first weights of ResNet-18 and 34 were made before batch norm counted."""
    state = {k: v for k, v in trained().items() if not k.endswith("num_batches_tracked")}
    encoder = Encoder("resnet18", TINY)
    sentence = initialize(encoder, str(write("plain", tmp_path, state)), "resnet18", TINY)
    assert "100 of 120" in sentence and "random" not in sentence
    assert torch.equal(encoder.bn1.running_mean, state["bn1.running_mean"])


@pytest.mark.parametrize(
    ("arch", "width"),
    [("resnet34", TINY), ("resnet50", TINY), ("resnet18", 2 * TINY)],
    ids=["deeper", "other", "wider"],
)
def test_weights_of_another_arch(arch: str, width: float, tmp_path: Path) -> None:
    """Those of a ResNet-34 hold a tensor of the right shape for every one of a ResNet-18."""
    path = write("safetensors", tmp_path, trained(arch, width))
    encoder = Encoder("resnet18", TINY)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="give weights of the same arch and width"):
        initialize(encoder, str(path), "resnet18", TINY)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_weights_of_other_tools_are_refused_with_their_prefix(tmp_path: Path) -> None:
    """As MoCo, solo-learn and DINO name them."""
    state = trained()
    for prefixes, said in (
        (["module.encoder_q."], "named module.encoder_q.conv1.weight, expected is conv1.weight; save those"),
        (["backbone."], "save those with the prefix backbone. without it"),
        (["student.module.backbone.", "teacher.module.backbone."],
         "save one group with the prefix student.module.backbone. and teacher.module.backbone. without it"),
    ):  # fmt: skip
        torch.save({"state_dict": {p + k: v for p in prefixes for k, v in state.items()}}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            initialize(Encoder("resnet18", TINY), str(tmp_path / "other.pth"), "resnet18", TINY)
        assert "only 0 of the 120 tensors of resnet18 x 0.0625 fit" in str(caught.value)
    torch.save({"student": state, "teacher": state, "epoch": 3}, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match="no state dict but a dict of student, teacher, epoch; give a file of named"):
        read_weights(tmp_path / "dino.pth")
    wider = write("safetensors", tmp_path, trained("resnet18", 2 * TINY))
    with pytest.raises(
        ValueError, match=r"conv1.weight, which has the shape \[8, 3, 7, 7\], expected is \[4, 3, 7, 7\]"
    ):
        initialize(Encoder("resnet18", TINY), str(wider), "resnet18", TINY)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(tmp_path / "missing.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all" * 100)
        with pytest.raises(ValueError, match="can't be read"):
            read_weights(tmp_path / name)
    torch.save({"step": 3, "notes": "text"}, tmp_path / "no_state.pt")
    with pytest.raises(ValueError, match="hold no state dict"):
        read_weights(tmp_path / "no_state.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="hold no state dict"):
        read_weights(tmp_path / "tensor.pt")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_nothing_in_a_file_is_executed(kind: str, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    path = tmp_path / "weights.pt"
    content = {"conv1.weight": torch.ones(2), "extra": Malicious(witness)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="can't be read"):
        read_weights(path)
    with pytest.raises(ValueError, match="can't be used"):
        checkpoint.load(path)
    assert not witness.exists()
    torch.load(path, weights_only=False) if kind != "bare pickle" else pickle.loads(path.read_bytes())
    assert witness.exists(), "the file was harmless and the test worthless"


def test_torchvisions_weights_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision.models.resnet18(weights=None)
    for p in theirs.parameters():
        nn.init.uniform_(p)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / name)
    encoder = Encoder("resnet18", 1, "cifar")
    sentence = initialize(encoder, "torchvision", "resnet18", 1)
    assert "from torchvision; random: conv1.weight; not used:" in sentence
    for key in ("layer1.0.conv1.weight", "layer4.1.bn2.running_var", "bn1.weight"):
        assert torch.equal(encoder.state_dict()[key], state[key]), key
    with pytest.raises(ValueError, match=r"no weights exist for model.width=0.5; set model.width=1"):
        initialize(encoder, "torchvision", "resnet18", 0.5)
    assert initialize(Encoder("resnet18", 1), "auto", "resnet18", 1).startswith("100 of 120 tensors from torchvision")


def test_auto_is_random_without_imagenet_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fault: Exception = OSError("no network")

    def download(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    encoder = Encoder("resnet18", 1)
    before = encoder.conv1.weight.clone()
    sentence = initialize(encoder, "auto", "resnet18", 1)
    assert sentence.startswith("random, since") and "can't be downloaded (no network)" in sentence
    assert "set model.width=1" in initialize(Encoder("resnet18", TINY), "auto", "resnet18", TINY)
    fault = RuntimeError("invalid hash value")
    with pytest.raises(ValueError, match=r"\(invalid hash value\); copy the file to .*, or set model.init=random"):
        initialize(encoder, "torchvision", "resnet18", 1)
    assert torch.equal(encoder.conv1.weight, before)


def load_where_one_rank_fails() -> str:
    def load(*_: object, **__: object) -> dict[str, Tensor]:
        if collectives.rank() == 1:
            raise OSError("no disk")
        return torchvision.models.resnet18(weights=None).state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", load)
        return initialize(Encoder("resnet18", 1), "auto", "resnet18", 1)


def test_ranks_start_from_random_weights_together(ranks: Ranks) -> None:
    first, second = ranks.run(2, load_where_one_rank_fails)
    assert first == second and "random, since" in first and "(no disk)" in first


def test_random_is_left_alone() -> None:
    encoder = Encoder("resnet18", TINY)
    before = encoder.conv1.weight.clone()
    assert initialize(encoder, "random", "resnet18", TINY) == "random" and torch.equal(encoder.conv1.weight, before)
