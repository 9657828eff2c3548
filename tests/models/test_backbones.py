"""Encoders of timm and of the user: the same runs on any ranks, resumed bit for bit, and clear errors."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr_ddp import export, load_encoder, pretrain
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.batch_norm import CrossRankBatchNorm
from simclr_ddp.models import weights
from simclr_ddp.models.backbones import ForeignEncoder, make_encoder, timm_arguments
from simclr_ddp.models.weights import initialize
from simclr_ddp.runs.encoder import Spec, export_encoder, spec_metadata
from tests.support import parity_run, tiny_run
from tests.support.parity_run import STEPS, assert_equal_runs, model_at, relative_difference
from tests.support.ranks import Ranks

VIT = "timm/vit_tiny_patch16_224,patch_size=5,embed_dim=16,depth=2,num_heads=2"
CONVNEXT = "timm/convnext_atto,depths=[1,1,1,1],dims=[8,8,16,16],ls_init_value=0.1"
OWN = """
import torch, simclr_ddp

@simclr_ddp.backbone
def tiny():
    convolution = torch.nn.Conv2d(3, 8, 3, 2)
    return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

@simclr_ddp.backbone
def dropping():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))

@simclr_ddp.backbone
def pictures():
    return torch.nn.Identity()

@simclr_ddp.backbone
def nothing():
    return 5

def unmarked():
    raise AssertionError("it is not called")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with functions of a user."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "size"), [(VIT, 20), (CONVNEXT, 32)])
def test_ten_steps_are_those_of_one_rank(arch: str, size: int, images: Path, ranks: Ranks, tmp_path: Path) -> None:
    more = [f"model.arch={arch}", "model.width=0.5", f"data.size={size}", "data.loader=torch"]
    for world_size in (1, 2, 4):
        arguments = parity_run.settings(images, tmp_path / str(world_size), *more)
        ranks.run(world_size, parity_run.train, arguments)
    first, last = model_at(tmp_path / "1", 1), model_at(tmp_path / "1", STEPS)
    changes = [relative_difference(first[k], last[k]) for k in last if last[k].dim() > 1 and "probe" not in k]
    assert min(changes) > 1e-4 and max(changes) > 0.01
    for world_size in (2, 4):
        assert_equal_runs(tmp_path / str(world_size), tmp_path / "1", (1, STEPS))
    loaded = load_encoder(tmp_path / "1")
    assert loaded.spec.arch == arch and loaded.encoder.width_out == 16
    assert torch.isfinite(loaded.encoder.eval()(torch.zeros(2, 3, size, size, dtype=torch.float32))).all()


@pytest.mark.parametrize(("arch", "size"), [(VIT, 20), (CONVNEXT, 32)])
def test_a_run_resumes_bit_for_bit(arch: str, size: int, images: Path, tmp_path: Path) -> None:
    more = [f"model.arch={arch}", "model.width=0.5", f"data.size={size}", "data.loader=torch", "optim.name=adamw"]
    more.append("optim.base_learning_rate=0.001")
    assert pretrain.main(tiny_run.settings(images, tmp_path / "complete", *more)) == 0
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "checkpoints/step-00000020.pt"):
        shutil.copy(tmp_path / "complete" / name, tmp_path / "cut" / name)
    assert pretrain.main(tiny_run.settings(images, tmp_path / "cut", *more)) == 0
    tiny_run.assert_same_run(tmp_path / "cut", tmp_path / "complete")


def test_the_users_function_is_trained_and_loaded(own: str, images: Path, tmp_path: Path) -> None:
    more = [f"model.arch={own}:tiny", "model.width=0.5", "optim.steps=2", "data.loader=torch"]
    assert pretrain.main(tiny_run.settings(images, tmp_path / "run", *more)) == 0
    loaded = load_encoder(tmp_path / "run")
    assert loaded.encoder.width_out == 8 and isinstance(loaded.encoder.network[1], CrossRankBatchNorm)
    assert set(load_file(tmp_path / "run" / "encoder.safetensors")) == set(
        nn.Sequential(*loaded.encoder.network).state_dict()
    )


def test_a_name_in_a_foreign_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "unwanted_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    (package / "nets.py").write_text("def f():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for arch in ("unwanted_package.nets:f", "unwanted_package.nothing:f", "unwanted_package:f"):
        with pytest.raises(ValueError, match=r"has no function f with the decorator|there is no module"):
            make_encoder(arch, size=32)


@pytest.mark.parametrize("form", ["safetensors", "torch_export", "timm", "torchvision"])
def test_other_encoders_are_exported(form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = Spec(VIT, 1.0, "imagenet", 20, [0.5] * 3, [0.5] * 3)
    torch.manual_seed(0)
    export_encoder(tmp_path / "encoder.safetensors", make_encoder(VIT, size=20), spec_metadata(spec, 7))
    status = export.main([str(tmp_path / "encoder.safetensors"), f"format={form}", f"output={tmp_path / 'out'}"])
    printed = capfd.readouterr()
    if form in ("timm", "torchvision"):
        assert status == 2 and f"format={form}: holds the ResNets of this tool; choose format=onnx" in printed.err
        assert not (tmp_path / "out").exists()
    else:
        assert status == 0 and "read again: representations" in printed.out
        assert f"Image encoder {VIT}: images of 20 x 20" in (tmp_path / "out/README.md").read_text()


# --- modules ----------------------------------------------------------------------------------------------------------


def of_batch_norms(images: Tensor) -> tuple[Tensor, Tensor]:
    """Representations of this rank's images in training mode, and the running variances afterwards."""
    torch.manual_seed(0)
    encoder = make_encoder("timm/mobilenetv3_small_050", size=32).double().train()
    h = encoder(images[collectives.local_slice(len(images))])
    return h.detach(), torch.cat([b for n, b in encoder.named_buffers() if n.endswith("running_var")])


def test_batch_norms_of_timm_are_over_all_ranks(ranks: Ranks) -> None:
    """Also those that have an activation of their own."""
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=0).double().train()
    expected = plain(images)
    ((h, variances),) = ranks.run(1, of_batch_norms, images)
    torch.testing.assert_close(h, expected.detach(), rtol=1e-8, atol=1e-8)
    found = ranks.run(2, of_batch_norms, images)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), h, rtol=1e-8, atol=1e-8)
    for _, others in found:
        torch.testing.assert_close(others, variances, rtol=1e-8, atol=1e-10)


def test_names_and_numbers_are_those_of_timm() -> None:
    torch.manual_seed(0)
    encoder = make_encoder(VIT, size=20)
    assert isinstance(encoder, ForeignEncoder) and encoder.fixed_size and encoder.width_out == 16
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=20, patch_size=5, embed_dim=16, depth=2, num_heads=2
    )
    network.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(encoder.eval()(x), network.eval()(x))
    holder = nn.ModuleDict({"encoder": make_encoder(VIT, size=20)})
    holder.load_state_dict({f"encoder.{name}": value for name, value in network.state_dict().items()})
    torch.testing.assert_close(holder["encoder"].eval()(x), network(x))


def test_position_embeddings_of_a_file_are_interpolated(tmp_path: Path) -> None:
    large = make_encoder(VIT, size=40)
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    encoder = make_encoder(VIT, size=20)
    text = initialize(encoder, str(tmp_path / "large.safetensors"), VIT, 1.0, 20)
    state = encoder.state_dict()
    assert text.startswith(f"{len(state)} of {len(state)} tensors from")
    assert torch.equal(state["blocks.0.attn.qkv.weight"], large.state_dict()["blocks.0.attn.qkv.weight"])
    assert state["pos_embed"].shape != large.state_dict()["pos_embed"].shape


def test_weights_of_timm_come_with_the_input_that_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is replaced by random weights: tests have no network."""
    given = make_encoder("timm/resnet10t", size=32)
    monkeypatch.setattr(weights, "create_timm", lambda arch, size, pretrained: (given.network, False))
    encoder = make_encoder("timm/resnet10t", size=32)
    text = initialize(encoder, "timm", "timm/resnet10t", 1.0, 32)
    assert "they were trained with data.size=176 data.augmentation.mean=[0.485, 0.456, 0.406]" in text
    assert torch.equal(encoder.state_dict()["conv1.0.weight"], given.state_dict()["conv1.0.weight"])


def test_arguments_of_timm() -> None:
    assert timm_arguments("timm/x.y_z") == ("x.y_z", {})
    assert timm_arguments("timm/x,a=1,b=[1,2],c=avg") == ("x", {"a": 1, "b": [1, 2], "c": "avg"})


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm/resnet_18", "model.arch=timm/resnet_18: timm has no model resnet_18; did you mean timm/resnet18?"),
        ("timm/vit_tiny_patch16_224,nothing=1", "timm can't make it for images of 32 pixels"),
        ("timm/resnet10t,drop_rate=0.1", "it is ResNet at rate 0.1"),
        ("timm/convnext_atto,drop_path_rate=0.1", "is DropPath at rate"),
        ("timm/resnet10t,checkpoint_path=/tmp/x.pth", "checkpoint_path=/tmp/x.pth is no argument of an architecture"),
        ("timm/resnet10t,1", "timm has no model resnet10t,1; did you mean timm/resnet10t?"),
        ("no_such_module_here:f", "there is no module no_such_module_here; add its folder to PYTHONPATH"),
        ("shutil:which", "has no function which with the decorator @simclr_ddp.backbone above it"),
        ("{own}.inside:tiny", "there is no module"),
        ("timm/vit_tiny_patch16_224,patch_drop_rate=0.5", "is PatchDropout at rate 0.5"),
        ("timm/resnet18.nonsense", "timm can't make it"),
        ("{own}:unmarked", "has no function unmarked with the decorator"),
        ("{own}:dropping", "1 is Dropout at rate 0.5, whose random numbers belong to no image"),
        ("{own}:pictures", r"returns shape \[1, 3, 32, 32\] for one image; must be \[1, D\]"),
        ("{own}:nothing", "returns a int; must be a torch.nn.Module"),
    ],
)
def test_what_is_no_encoder(arch: str, message: str, own: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_encoder(arch.format(own=own), size=32)
    assert "\n" not in str(raised.value)


def test_options_that_others_have_no_use_for(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = tiny_run.settings(images, tmp_path / "run", f"model.arch={VIT}", "data.size=20", "optim.steps=1")
    assert pretrain.main(settings) == 0
    assert "model.width=0.125: no effect with model.arch=timm/vit_tiny" in capfd.readouterr().err
    assert pretrain.main([*settings, "model.checkpoint_stages=true", f"run_dir={tmp_path / 'other'}"]) == 2
    assert "checkpoint_stages=true: the stages of model.arch=timm/vit_tiny" in capfd.readouterr().err
    assert pretrain.main([*settings, "model.arch=resnet19", f"run_dir={tmp_path / 'other'}"]) == 2
    assert "did you mean resnet18?" in capfd.readouterr().err
    for init, text in (("torchvision", "has no weights of model.arch=timm/"), ("timm", "model.init=timm: ")):
        arguments = [*settings, f"model.init={init}", f"run_dir={tmp_path / init}"]
        if init == "timm":
            arguments.append("model.arch=resnet18")
        assert pretrain.main(arguments) == 2
        assert text in capfd.readouterr().err
