"""The package as a library: its public names in models and loops that are not those of its commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

from simclr_ddp import (
    LARS,
    CrossRankBatchNorm,
    Encoder,
    KernelInfoNCE,
    embed_images,
    load_encoder,
    parameter_groups,
)
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.distributed import collectives
from simclr_ddp.distributed.runtime import Runtime
from simclr_ddp.evaluation.features import representations
from tests.support.encoder_run import make_run
from tests.support.ranks import Ranks

# --- images that are in no data set -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG files of different sizes: in colour, in grey, and one that EXIF turns."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, (mode, height, width) in enumerate((("RGB", 40, 60), ("L", 33, 21), ("RGB", 16, 16), ("RGB", 90, 70))):
        pixels = generator.integers(256, size=(height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        if i == 3:
            exif[0x0112] = 6
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.jpg", exif=exif)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def run(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", "spirograph", data__size=48)


def test_images_have_the_representations_of_a_data_set(run: Path, photos: list[Path], tmp_path: Path) -> None:
    write_dataset(str(photos[0].parent), tmp_path / "all.beton", mode="raw")  # not encoded again: one is turned
    loaded, dataset = load_encoder(run), open_dataset(str(tmp_path / "all.beton"), "train")
    runtime = Runtime(torch.device("cpu"), "fp32", 1)
    loading: dict[str, Any] = {"batch_size": 4, "workers": 0, "loader": "torch", "title": ""}
    expected = representations(loaded.encoder, dataset, loaded.spec, runtime, **loading)
    photos = [photos[0].parent / name for name in dataset.file.names() or []]  # write_dataset shuffles
    pictures = [Image.open(photo) for photo in photos]
    for images in (photos, [str(photo) for photo in photos], pictures):
        found = embed_images(loaded, images)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert expected.std(0).max() > 0.01
    in_parts = embed_images(loaded, pictures, batch_size=3)
    torch.testing.assert_close(in_parts, expected, rtol=1e-4, atol=1e-5)
    (tall,) = (picture for picture in pictures if picture.getexif())
    turned = Image.fromarray(np.asarray(tall.transpose(Image.Transpose.ROTATE_270)))  # without EXIF
    assert torch.equal(loaded.transform(turned), loaded.transform(tall))


def test_arrays_are_images(run: Path) -> None:
    loaded = load_encoder(run)
    arrays = np.random.default_rng(1).integers(256, size=(3, 50, 30, 3), dtype=np.uint8)
    expected = embed_images(loaded, [Image.fromarray(array) for array in arrays])
    for images in (arrays, torch.from_numpy(arrays), list(arrays)):
        assert torch.equal(embed_images(loaded, images), expected)
    assert embed_images(loaded, []).shape == (0, expected.shape[1])


def test_transparency_is_white_and_deep_images_are_read_from_their_files(run: Path, tmp_path: Path) -> None:
    loaded = load_encoder(run)
    clear = Image.new("RGBA", (60, 60), (200, 0, 0, 0))
    assert torch.equal(loaded.transform.pixels(clear), torch.full((3, 48, 48), 255, dtype=torch.uint8))
    deep = Image.fromarray(np.full((60, 60), 65535, np.uint16))
    deep.save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="image of mode I;16: has more than 8 bits; convert it"):
        loaded.transform(deep)
    white = embed_images(loaded, [Image.new("RGB", (60, 60), "white")])
    assert torch.equal(embed_images(loaded, [tmp_path / "deep.png"]), white)


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        ("photo.jpg", 1, r"images=photo\.jpg: is one path; give a list"),
        (np.zeros((2, 8, 8, 3)), 1, r"images: \[2, 8, 8, 3\] float64; must be uint8 \[n, H, W, 3\], RGB"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1, r"images: \[2, 3, 8, 8\] uint8; must be"),
        ([5], 1, "images: a int is no image; give paths"),
        (["/nothing.jpg"], 1, r"/nothing\.jpg does not exist"),
        ([], 0, "batch_size=0: must be 1 or above"),
    ],
)
def test_what_is_no_image(run: Path, images: Any, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_images(load_encoder(run), images, batch_size=batch_size)


# --- batch norm of other models ---------------------------------------------------------------------------------------


def other_model() -> nn.Module:
    """Batch norms of all kinds, with settings of their own; float64."""
    torch.manual_seed(0)
    third = nn.Sequential(nn.Unflatten(1, (2, 2, 1, 2)), nn.BatchNorm3d(2, momentum=0.3), nn.Flatten())
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.SyncBatchNorm(4, eps=1e-3),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 8),
        nn.BatchNorm1d(8, affine=False),
        third,
    ).double()


def trained_on(images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the images and buffers after a step on this rank's images; the loss is a sum."""
    model = CrossRankBatchNorm.convert(other_model())
    own = images[collectives.local_slice(len(images))].clone().requires_grad_()
    out = model(own)
    (out**3).sum().backward()
    return out.detach(), own.grad, dict(model.named_buffers())


def test_converted_models_use_the_statistics_of_all_ranks(ranks: Ranks) -> None:
    images = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = other_model()
    plain[1] = nn.BatchNorm2d(4, eps=1e-3).double()
    x = images.clone().requires_grad_()
    out = plain(x)
    (out**3).sum().backward()
    for world_size in (1, 2):
        found = ranks.run(world_size, trained_on, images)
        torch.testing.assert_close(torch.cat([f[0] for f in found]), out.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad, rtol=1e-9, atol=1e-9)
        for _, _, buffers in found:
            assert list(buffers) == [name for name, _ in plain.named_buffers()]
            for name, buffer in plain.named_buffers():
                torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-12)


def test_conversion_keeps_parameters_and_names() -> None:
    model = other_model().eval()
    before, names = dict(model.named_parameters()), list(model.state_dict())
    assert CrossRankBatchNorm.convert(model) is model
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == names and not any(m.training for m in model.modules())
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [CrossRankBatchNorm] * 3
    assert isinstance(CrossRankBatchNorm.convert(nn.BatchNorm1d(3)), CrossRankBatchNorm)


def test_a_layer_in_two_places_stays_one_layer() -> None:
    norm = nn.BatchNorm1d(3)
    model = CrossRankBatchNorm.convert(nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm), norm))
    assert model[0] is model[2] is model[1][1] and isinstance(model[0], CrossRankBatchNorm)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "model.1: BatchNorm1d with track_running_stats=False"),
        (nn.BatchNorm2d(3, momentum=None), "momentum=None; give it running statistics and a momentum"),
        (type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(3), "model.1: Own has a forward of its own"),
    ],
)
def test_batch_norms_that_cannot_be_converted(norm: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossRankBatchNorm.convert(nn.Sequential(nn.Linear(3, 3), norm))


# --- LARS for other models --------------------------------------------------------------------------------------------


def test_lars_leaves_norms_tokens_and_positions_unadapted() -> None:
    vit = VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16)
    convnext = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)])
    convnext.features.append(nn.LayerNorm([4, 2, 2]))  # of more than one dimension
    for model, free in (
        (vit, {"class_token", "encoder.pos_embedding"}),
        (convnext, {"features.4.weight", "features.1.0.layer_scale"}),
    ):
        names = {p: n for n, p in model.named_parameters()}
        weights, others = ({names[p] for p in group} for group in parameter_groups(model))
        assert weights | others == set(names.values()) and not weights & others
        assert free < others and not [n for n in weights if "norm" in n or "ln" in n or n.endswith("bias")]
        linear = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert set(linear) <= weights
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in {
        n for n, p in vit.named_parameters() if any(p is w for w in parameter_groups(vit)[0])
    }


def test_parametrised_weights_are_weights() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    weights, others = parameter_groups(nn.Sequential(layer))
    assert sorted(p.shape for p in weights) == [(5, 1), (5, 4)] and [tuple(p.shape) for p in others] == [(5,)]


def loop(kind: str, images: Tensor, steps: int = 3) -> dict[str, Tensor]:
    """Complete parameters after steps of LARS on two views [2, N, 3, H, W], of which each rank has a part."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Encoder("resnet18", 1 / 16, "cifar"), nn.Linear(32, 8)).double()
    trained = model
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (collectives.world_size(),))
        fully_shard(model[0].layer4, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        trained = DistributedDataParallel(model)
    weights, others = parameter_groups(model)
    optimizer = LARS([{"params": weights}, {"params": others, "adapt": False}], lr=0.5, weight_decay=1e-2)
    loss, own = KernelInfoNCE(temperature=0.2), collectives.local_slice(images.shape[1])
    for _ in range(steps):
        y = trained(images[:, own].flatten(0, 1)).unflatten(0, (2, -1))
        optimizer.zero_grad()
        loss(*y).backward()
        optimizer.step()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {n: p.detach() for n, p in whole.items()}


def test_lars_steps_of_sharded_parameters_are_those_of_one_process(ranks: Ranks) -> None:
    """In FSDP2 and DDP, with batch norm and negatives over both ranks."""
    images = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (alone,) = ranks.run(1, loop, "plain", images)
    torch.manual_seed(0)
    first = dict(nn.Sequential(Encoder("resnet18", 1 / 16, "cifar"), nn.Linear(32, 8)).double().named_parameters())
    for kind in ("ddp", "fsdp"):
        for found in ranks.run(2, loop, kind, images):
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)
    assert all(not torch.equal(value, first[name]) for name, value in alone.items() if "weight" in name)


# --- what torch can do with the loss ----------------------------------------------------------------------------------


def test_torch_func_says_what_to_use_instead() -> None:
    loss, y = KernelInfoNCE(), torch.randn(4, 3)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(ValueError, match=r"torch.func can't transform it.*use torch.autograd.grad") as raised:
            transform(lambda a: loss(a, y))(y)
        assert "\n" not in str(raised.value)


def test_a_compiled_step_has_the_gradient_of_an_eager_one() -> None:
    torch.manual_seed(0)
    model, loss = nn.Linear(6, 4), KernelInfoNCE(temperature=0.5)
    x = torch.randn(2, 8, 6)

    def step(x: Tensor) -> Tensor:
        return loss(*model(x))

    gradients = []
    for run_step in (step, torch.compile(step, backend="aot_eager")):
        model.zero_grad()
        run_step(x).backward()
        gradients.append(model.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_a_repr_names_kernel_and_temperature() -> None:
    assert repr(KernelInfoNCE("laplacian", 0.3)).startswith("KernelInfoNCE(kernel='laplacian', temperature=0.3,")
