"""The set kept on the device: the other loaders' views bit for bit, in few launches, the host never waited for."""

import json
import os
import re
import signal
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ddp import linear_eval, pretrain
from simclr_ddp.config.options import build, parse_override, read_yaml
from simclr_ddp.config.schema import Doctor, Pretrain
from simclr_ddp.data import batches, device_loader
from simclr_ddp.data.beton import PICTURES, Beton, Picture, write
from simclr_ddp.data.crops import crop_boxes, cut_views, evaluation_box
from simclr_ddp.data.dataset import open_dataset
from simclr_ddp.data.write import write_dataset
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system import signals
from simclr_ddp.training import examination, forecast
from tests.support import processes

ARCHIVES = Path(os.environ.get("SIMCLR_DATA", Path(__file__).parents[3] / "shared" / "data"))
CONFIG = Path(__file__).parents[2] / "configs" / "pretrain" / "cifar10_gpu.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .beton file of 300 CIFAR-10 images, 30 of each class; test.beton beside it holds 100."""
    if not (ARCHIVES / "cifar10.tar.gz").is_file():
        pytest.skip("no cifar10.tar.gz: SIMCLR_DATA=FOLDER names where it lies")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(ARCHIVES / "cifar10.tar.gz") as archive:
        few = [m for m in archive if re.search(r"train/\w+/00[012]\d.jpg$|test/\w+/000\d.jpg$", m.name)]
        archive.extractall(folder, few, filter="data")
    for split in ("train", "test"):
        write_dataset(str(folder / split), folder / f"{split}.beton")
    return folder / "train.beton"


def noise(path: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Beton:
    """A .beton file of raw images of those heights and widths."""
    generator = np.random.default_rng(seed)
    rows = [(Picture(generator.integers(0, 256, 3 * h * w, dtype=np.uint8).tobytes(), h, w, True),) for h, w in sizes]
    write(path, rows, {"image": PICTURES}, len(rows), {}, overwrite=True)
    return Beton(path)


def views_of(images: Beton, index: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """[B, V, size, size, 3] by the device loader."""
    kept = device_loader.resident(images, size, CPU, 1)
    places = (torch.from_numpy(part) for part in device_loader.entries(images, index, boxes))
    return device_loader.cut(kept, torch.from_numpy(index), *places).permute(1, 0, 3, 4, 2).numpy()


def reference(images: Beton, index: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    return np.stack([cut_views(images, int(i), b, size) for i, b in zip(index, boxes, strict=True)])


# pixels


@pytest.mark.parametrize("size", [32, 20, 24, 48])
def test_views_of_cifar_have_pillows_bits(cifar: Path, size: int) -> None:
    images = Beton(cifar)
    index = np.random.default_rng(0).permutation(images.count)
    boxes = crop_boxes(3, 1, index, images.sizes[index], 2)
    assert np.array_equal(views_of(images, index, boxes, size), reference(images, index, boxes, size))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 48), st.integers(1, 48)), min_size=1, max_size=3), st.data())
def test_views_of_images_of_any_sizes_have_pillows_bits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], draw: st.DataObject
) -> None:
    size = draw.draw(st.sampled_from([1, 2, 7, 8, 32, 33]))
    images = noise(tmp_path_factory.getbasetemp() / "any.beton", sizes, seed=sum(map(sum, sizes)))
    index = np.arange(len(sizes)).repeat(8)
    boxes = np.empty((len(index), 2, 4), np.int32)
    generator = np.random.default_rng(draw.draw(st.integers(0, 1000)))
    for i, view in np.ndindex(boxes.shape[:2]):
        extent = [generator.integers(1, side + 1) for side in sizes[index[i]]]
        corner = [generator.integers(0, side - e + 1) for side, e in zip(sizes[index[i]], extent, strict=True)]
        boxes[i, view] = corner + extent
    assert np.array_equal(views_of(images, index, boxes, size), reference(images, index, boxes, size))


def test_every_crop_of_32_pixels_has_pillows_bits(tmp_path: Path) -> None:
    """All 528 along each axis, in images of the two extremes and noise between."""
    images = noise(tmp_path / "x.beton", [(32, 32)])
    pairs = np.array([(start, extent) for start in range(32) for extent in range(1, 33 - start)])
    boxes = np.stack([pairs[:, 0], pairs[::-1, 0], pairs[:, 1], pairs[::-1, 1]], axis=1).astype(np.int32)[:, None]
    index = np.zeros(len(boxes), np.int64)
    assert np.array_equal(views_of(images, index, boxes, 32), reference(images, index, boxes, 32))


def test_white_stays_white(tmp_path: Path) -> None:
    """The largest sums there are: rounding must not carry them beyond a byte."""
    rows = [(Picture(b"\xff" * 3 * 40 * 50, 40, 50, True),)]
    write(tmp_path / "x.beton", rows, {"image": PICTURES}, 1, {})
    images = Beton(tmp_path / "x.beton")
    index = np.zeros(200, np.int64)
    boxes = crop_boxes(0, 0, np.arange(200), images.sizes[index], 2)
    assert (views_of(images, index, boxes, 16) == 255).all()


def test_evaluation_sees_what_the_torch_loader_sees(cifar: Path) -> None:
    dataset = open_dataset(str(cifar), "test")
    index = np.array([5, 3, 39, 0, 11])
    found = {}
    for loader in ("torch", "device"):
        options = {"size": 48, "batch_size": 2, "workers": 0, "loader": loader, "device": CPU}
        found[loader] = list(batches.evaluation_batches(dataset, index, **options))
    for ours, expected in zip(found["device"], found["torch"], strict=True):
        assert torch.equal(ours.inputs, expected.inputs) and torch.equal(ours.labels, expected.labels)
        assert torch.equal(ours.sample, expected.sample)
    assert evaluation_box(32, 32, 48) != (0, 0, 32, 32), "the box is not trivial"


# on the device


class Launches(TorchDispatchMode):
    """Names of the operations that compute: neither views, nor what asks for a tensor's device or memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        name = function._schema.name
        if name.startswith("aten::") and not function.is_view and "empty" not in name:
            self.names.append(name)
        return function(*arguments, **(options or {}))


def test_a_step_is_cut_in_few_launches_without_waiting_for_the_host() -> None:
    """On fake CUDA tensors, which hold no values: whatever needs one on the host raises."""
    with FakeTensorMode():
        kept = device_loader.Resident(
            torch.zeros(100, 32, 3, 32, dtype=torch.uint8, device="cuda"),
            torch.zeros(528, 32, 32, device="cuda"),
            torch.zeros(528, 32, 32, device="cuda"),
        )
        epoch = torch.zeros(4, 16, dtype=torch.int64, device="cuda")
        places = torch.zeros(4, 16, 2, dtype=torch.int64, device="cuda")
        with Launches() as launches:
            index, columns, rows = next(iter(zip(epoch, places, places, strict=True)))
            views = device_loader.cut(kept, index, columns, rows)
    assert views.device.type == "cuda" and views.dtype == torch.uint8
    assert views.shape == (2, 16, 3, 32, 32) and views.is_contiguous()
    assert len(launches.names) <= 13, launches.names


def test_the_set_is_decoded_once_for_all_who_ask(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    whole = Beton.image
    monkeypatch.setattr(Beton, "image", lambda self, i: decoded.append(i) or whole(self, i))
    dataset = open_dataset(str(cifar), "train")
    options = {"workers": 2, "loader": "device", "device": CPU}
    for _ in range(2):
        share = batches.Share(0, 100, 0, 1)
        assert len(list(batches.training_batches(dataset, share, range(7), size=32, crop_scale=(1, 1), **options))) == 7
        assert len(list(batches.evaluation_batches(dataset, np.arange(9), size=48, batch_size=4, **options))) == 3
    assert sorted(decoded) == list(range(300))


def test_the_next_epochs_crops_are_made_meanwhile_and_no_more() -> None:
    made = []

    def items():  # type: ignore[no-untyped-def]
        for i in range(5):
            made.append(i)
            yield i

    with closing(device_loader.ahead(items())) as following:
        assert next(following) == 0
    assert made in ([0], [0, 1])
    assert list(device_loader.ahead(items())) == [0, 1, 2, 3, 4]

    def fails():  # type: ignore[no-untyped-def]
        yield 0
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(device_loader.ahead(fails()))


# room


def test_memory_is_said_and_is_what_it_takes(tmp_path: Path) -> None:
    images = noise(tmp_path / "x.beton", [(20, 30), (24, 8), (20, 8)])
    kept = device_loader.resident(images, 16, CPU, 1)
    taken = sum(part.nbytes for part in kept)
    assert device_loader.kept_bytes(images, 16) == taken
    assert f"{taken / 1e6:,.0f} MB per rank: 3 of up to 30 x 24 pixels" in batches.describe_loader(
        images, "device", 1, 8, 2, 16
    )


def test_a_set_without_room_is_refused_in_one_line(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = device_loader.kept_bytes(Beton(cifar), 32)
    monkeypatch.setattr(device_loader, "SHARE", wanted / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    device_loader.check_room(Beton(cifar), 32, CPU)
    monkeypatch.setattr(device_loader, "SHARE", device_loader.SHARE / 2)
    arguments = [f"data.train={cifar}", f"run_dir={tmp_path / 'run'}", "data.loader=device", *TINY]
    assert pretrain.main(arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: data.loader=device: ") and f"{wanted:,} bytes" in line and "data.loader=auto" in line
    settings = build(Doctor, [("here", dict(parse_override(a) for a in arguments))])
    (finding,) = examination.guarded(examination.decoding, settings, open_dataset(str(cifar), "train"), 1)
    assert finding.level == "error" and f"{wanted:,} bytes" in finding.text


# whole runs

TINY = (
    "device=cpu",
    "threads=1",
    "compile=false",
    "data.workers=1",
    "model.width=0.125",
    "head.hidden=32",
    "optim.global_batch_size=32",
    "optim.warmup_epochs=0.5",
    "log.every_steps=1",
)


def test_a_run_is_the_other_loaders_bit_for_bit(images: Path, tmp_path: Path) -> None:
    losses = {}
    for loader in ("torch", "device"):
        arguments = [f"data.train={images}", f"run_dir={tmp_path / loader}", f"data.loader={loader}", *TINY]
        assert pretrain.main([*arguments, "optim.steps=4", "data.size=16", "precision=fp32"]) == 0
        lines = read_metrics(tmp_path / loader / "metrics.jsonl")
        losses[loader] = [(line["loss"], line.get("probe_top1")) for line in lines]
    assert len(losses["torch"]) == 4 and losses["torch"] == losses["device"]
    assert any(probe is not None for _, probe in losses["torch"])


def test_cifar10_gpu_trains_pauses_resumes_and_evaluates(cifar: Path, tmp_path: Path) -> None:
    """The config for a GPU as it is, but tiny and on the CPU."""
    run_dir, steps = tmp_path / "run", 40
    arguments = [str(CONFIG), f"data.train={cifar}", f"data.test={cifar.with_name('test.beton')}", f"run_dir={run_dir}"]
    arguments += [*TINY, f"optim.steps={steps}"]
    process = processes.start("simclr_ddp.pretrain", *arguments)
    processes.wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGTERM)
    status, output = processes.finish(process)
    assert status == signals.PAUSED, output
    assert "images are decoded once and kept on the device" in output
    assert pretrain.main(arguments) == 0
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sum("probe_top1" in line for line in lines) == steps // (300 // 32)
    quick = ("device=cpu", "threads=1", "loader=device", "strengths=[0.01]", "random_encoder=false")
    assert linear_eval.main([str(run_dir), *quick]) == 0
    (file,) = run_dir.glob("evaluations/*.json")
    assert 0 < json.loads(file.read_text())["results"]["trained"]["top1"] <= 1


def test_the_checkpoint_of_cifar10_gpu_can_travel() -> None:
    settings = build(Pretrain, [(str(CONFIG), read_yaml(CONFIG))])
    assert 99e6 < forecast.checkpoint_bytes(settings) < 102e6
