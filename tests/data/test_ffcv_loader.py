"""FFCV's loader with our operation: the torch loader's views bit for bit, and none of FFCV's ways to hang or leak."""

import io
import itertools
import os
import re
import sys
import tarfile
import threading
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simclr_ddp import pretrain
from simclr_ddp.data import batches
from simclr_ddp.data.beton import ALLOCATION, DESCRIPTOR, HEADER, INT, PICTURE, PICTURES, Beton, Picture, write
from simclr_ddp.data.crops import crop_boxes, cut_views, resize_crop
from simclr_ddp.data.write import write_dataset
from simclr_ddp.runs.metrics import read_metrics
from simclr_ddp.system import machine
from simclr_ddp.training import preflight
from tests.support import processes

if batches.usable_loader("auto")[0] != "ffcv":  # importing FFCV itself would take four seconds more
    pytest.skip("FFCV is not installed: make setup builds it", allow_module_level=True)
from simclr_ddp.data import ffcv_loader, jpeg_views

ARCHIVES = Path(os.environ.get("SIMCLR_DATA", Path(__file__).parents[3] / "shared" / "data"))


def read_views(images: Beton, size: int, cuts: object, threads: int) -> Generator[torch.Tensor, None, None]:
    return ffcv_loader.read_views(images, size, cuts, threads, batches.PREFETCH, pinned=False)


def cuts_of(images: Beton, batch_size: int = 8, views: int = 2, epochs: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    index = np.arange(images.count)
    found = []
    for epoch in range(epochs):
        boxes = crop_boxes(0, epoch, index, images.sizes, views)
        found += [(index[i : i + batch_size], boxes[i : i + batch_size]) for i in range(0, len(index), batch_size)]
    return found


def reference(images: Beton, size: int, cuts: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [np.stack([cut_views(images, int(i), b, size) for i, b in zip(*cut, strict=True)]) for cut in cuts]


def jpeg(picture: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


# the resizer


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 260), st.integers(1, 260), st.sampled_from([1, 2, 7, 8, 32, 33, 96]))
def test_the_resizer_has_pillows_bits(draw: st.DataObject, height: int, width: int, size: int) -> None:
    box = [draw.draw(st.integers(1, side)) for side in (height, width)]
    corner = [draw.draw(st.integers(0, side - part)) for side, part in zip((height, width), box, strict=True)]
    content = np.random.default_rng(height * width).integers(0, 256, height * width * 3 + 1, dtype=np.uint8)
    image = content[:-1].reshape(height, width, 3)
    out = np.zeros((size, size, 3), np.uint8)
    jpeg_views.resize_crop(image, np.array(corner + box, np.int32), out)
    assert np.array_equal(out, resize_crop(Image.fromarray(image), np.array(corner + box), size))


# views


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_jpegs_raw_images_and_grey_ones_have_the_reference_views(tmp_path: Path, views: int, threads: int) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(30):
        height, width = generator.integers(8, 90, 2)
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        stored = [
            lambda p: Picture(p.tobytes(), *p.shape[:2], True),
            lambda p: Picture(jpeg(p, quality=90), *p.shape[:2], False),
            lambda p: Picture(jpeg(p[..., 0]), *p.shape[:2], False),
            lambda p: Picture(jpeg(p, progressive=True, subsampling=0), *p.shape[:2], False),
        ][i % 4](picture)
        rows.append((stored, i))
    write(tmp_path / "x.beton", rows, {"image": PICTURES, "label": INT}, len(rows), {})
    images = Beton(tmp_path / "x.beton")
    cuts = cuts_of(images, batch_size=13, views=views, epochs=2)
    found = list(read_views(images, 24, cuts, threads))
    assert [tuple(views_of.shape) for views_of in found[:3]] == [(n, views, 24, 24, 3) for n in (13, 13, 4)]
    for ours, wanted in zip(found, reference(images, 24, cuts), strict=True):
        assert np.array_equal(ours.numpy(), wanted)


def test_real_images_have_the_reference_views(tmp_path: Path) -> None:
    archive = ARCHIVES / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not there: SIMCLR_DATA names its folder")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data", members=[m for m in tar.getmembers() if m.isfile()][::5])
    write_dataset(str(tmp_path / "train"), tmp_path / "x.beton")
    images = Beton(tmp_path / "x.beton")
    assert images.count == 80
    cuts = cuts_of(images, batch_size=40)
    for ours, wanted in zip(read_views(images, 224, cuts, 2), reference(images, 224, cuts), strict=True):
        difference = np.abs(ours.numpy().astype(int) - wanted)
        assert difference.mean() == 0 and difference.max() == 0


def test_a_jpeg_with_flaws_that_pillow_bears_is_left_to_pillow(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(12):
        content = jpeg(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        if i % 3 == 0:
            content = content[: -len(content) // 3] + b"\xff\xd3" + content[-len(content) // 3 :]  # a stray marker
        rows.append((Picture(content, 40, 50, False), i))
    write(tmp_path / "x.beton", rows, {"image": PICTURES, "label": INT}, len(rows), {})
    images = Beton(tmp_path / "x.beton")
    cuts = cuts_of(images)
    failed = np.zeros(8, bool)
    ffcv_loader.ViewLoader(images).cut(*cuts[0], np.zeros((8, 2, 16, 16, 3), np.uint8), failed)
    assert failed.tolist() == [True, False, False] * 2 + [True, False], "TurboJPEG complains"
    for ours, wanted in zip(read_views(images, 16, cuts, 1), reference(images, 16, cuts), strict=True):
        assert np.array_equal(ours.numpy(), wanted)


def test_a_size_that_is_not_the_jpegs_is_refused(tmp_path: Path) -> None:
    rows = [(Picture(jpeg(np.zeros((40, 50, 3), np.uint8)), 40, 50, False),)] * 8
    write(tmp_path / "x.beton", rows, {"image": PICTURES}, 8, {})
    content = bytearray((tmp_path / "x.beton").read_bytes())
    height = HEADER.itemsize + DESCRIPTOR.itemsize + PICTURE.fields["height"][1]
    assert content[height] == 40
    content[height] = 20
    (tmp_path / "x.beton").write_bytes(content)
    images = Beton(tmp_path / "x.beton")
    with pytest.raises(ValueError, match="it is 50 x 40, not 50 x 20 pixels"):
        list(read_views(images, 16, cuts_of(images), 1))


# guards


def test_what_a_thread_raises_is_raised_and_the_threads_end(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ffcv_loader.ViewLoader.cut

    def cut(self: ffcv_loader.ViewLoader, index: np.ndarray, *more: np.ndarray) -> None:
        if 20 in index:
            raise RuntimeError("broken in a thread")
        whole(self, index, *more)

    monkeypatch.setattr(ffcv_loader.ViewLoader, "cut", cut)
    beton, got = Beton(images), 0
    with pytest.raises(RuntimeError, match="broken in a thread"):
        for _ in read_views(beton, 16, cuts_of(beton), 2):
            got += 1
    assert got == 2, "the batches before it are given"
    assert not decoding_threads()


def test_closed_in_the_middle_nothing_is_left(images: Path) -> None:
    beton = Beton(images)
    with closing(read_views(beton, 16, cuts_of(beton, epochs=20), 2)) as views:
        next(views)
        assert decoding_threads()
    assert not decoding_threads()


def test_two_at_once_do_not_disturb_each_other(images: Path) -> None:
    beton = Beton(images)
    train, probe = cuts_of(beton, 8, 2, epochs=3), cuts_of(beton, 5, 1, epochs=3)
    first, second = (read_views(beton, size, cuts, 2) for size, cuts in ((16, train), (20, probe)))
    a, b = [], []
    while len(a) < len(train):
        a.append(next(first))
        b += itertools.islice(second, 2)  # 24 of them, beside 15
    assert len(b) == len(probe)
    for found, size, cuts in ((a, 16, train), (b, 20, probe)):
        for ours, wanted in zip(found, reference(beton, size, cuts), strict=True):
            assert np.array_equal(ours.numpy(), wanted)


def test_torchs_threads_stay(images: Path) -> None:
    script = (
        "import sys, torch, numba.typed; before = numba.typed.Dict; torch.set_num_threads(3)\n"
        "from simclr_ddp.data import batches as data\n"
        f"from simclr_ddp.data.dataset import open_dataset; dataset = open_dataset({str(images)!r}, 'train')\n"
        "seen = []\n"
        "for loader in ('ffcv', 'auto'):\n"
        "    batches = data.training_batches(dataset, data.Share(0, 8, 0, 1), range(4), size=16, crop_scale=(1, 1),\n"
        "                                    workers=2, loader=loader, device=torch.device('cpu'))\n"
        "    seen += [torch.get_num_threads() for _ in batches] + [torch.get_num_threads()]\n"
        "assert 'ffcv' in sys.modules and numba.typed.Dict is before\n"
        "print(set(seen))"
    )
    assert processes.finish(processes.start_command([sys.executable, "-c", script])) == (0, "{3}\n")


def test_memory_is_bounded_by_the_batches(images: Path) -> None:
    """Nothing is decoded further ahead than is said."""
    beton, asked = Beton(images), []

    def cuts() -> object:
        for cut in cuts_of(beton, epochs=10):
            asked.append(cut)
            yield cut

    with closing(read_views(beton, 16, cuts(), 2)) as views:
        for used in range(1, 20):
            next(views)
            assert len(asked) == used + batches.PREFETCH


# which loader


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    batches.usable_loader.cache_clear()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv._libffcv", None)
    monkeypatch.delitem(sys.modules, "simclr_ddp.data.ffcv_loader")
    monkeypatch.delattr("simclr_ddp.data.ffcv_loader")


@pytest.fixture(autouse=True)
def _loaders_as_found() -> object:
    yield
    batches.usable_loader.cache_clear()


def test_auto_takes_ffcv_and_says_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batches.usable_loader("auto") == ("ffcv", "") and batches.usable_loader("torch") == ("torch", "")
    assert pretrain.main(settings_of(images, tmp_path / "run")) == 0
    assert "images are decoded by FFCV, 1 thread," in capsys.readouterr().out
    assert pretrain.main(settings_of(images, tmp_path / "other", "data.loader=torch")) == 0
    assert "images are decoded by torch's DataLoader, 1 process," in capsys.readouterr().out
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "other"))
    assert [line["loss"] for line in one] == [line["loss"] for line in other], "the pixels are the same"


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv_auto_says_why_and_takes_torch(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(settings_of(images, tmp_path / "run", "data.workers=0")) == 0
    assert "FFCV can't be imported" in capsys.readouterr().out
    assert pretrain.main(settings_of(images, tmp_path / "other", "data.loader=ffcv")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "FFCV can't be imported" in error and "use the loader torch" in error


def test_memory_is_predicted_from_the_files_tables(tmp_path: Path) -> None:
    rows = [(Picture(jpeg(np.zeros((h, w, 3), np.uint8)), h, w, False),) for h, w in ((400, 1000), (900, 300))]
    write(tmp_path / "x.beton", rows, {"image": PICTURES}, 2, {})
    line = batches.describe_loader(Beton(tmp_path / "x.beton"), "ffcv", 4, 64, 2, 224)
    megabytes = (4 * 64 * 2 * 224 * 224 * 3 + 4 * 400 * (1000 * 9 + 224 * 3)) / 1e6
    assert f"{megabytes:,.0f} MB" in line and "4 batches of 64 x 2 views" in line and "1000 x 400" in line


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1e3


def test_no_more_memory_is_taken_than_was_predicted(images: Path) -> None:
    """Batches of 19 MB, in a process whose heap is in use."""
    beton = Beton(images)
    index = np.arange(64) % beton.count
    boxes = crop_boxes(0, 0, index, beton.sizes[index], 2)
    predicted = float(re.search(r"([\d.,]+) MB", batches.describe_loader(beton, "ffcv", 2, 64, 2, 224))[1])
    list(ffcv_loader.read_views(beton, 224, [(index, boxes)], 2, batches.PREFETCH, pinned=False))
    before, heap = anonymous_megabytes(), []
    for i, _ in enumerate(ffcv_loader.read_views(beton, 224, [(index, boxes)] * 60, 2, batches.PREFETCH, pinned=False)):
        heap.append(bytes(10_000 + i))
        assert anonymous_megabytes() - before < predicted + 10


def test_workers_are_this_ranks_share_of_the_cores(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    whole = ffcv_loader.read_views

    def read_views(*arguments: object) -> object:
        asked.append(arguments[3])
        return whole(*arguments)

    monkeypatch.setattr(ffcv_loader, "read_views", read_views)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(preflight, "cores", lambda: 2)
    assert pretrain.main(settings_of(images, tmp_path / "run", "data.workers=16", "optim.steps=5")) == 0
    assert asked == [2, 2], "training, and the probe's validation"
    said = capsys.readouterr().err
    assert "warning: data.workers=16: 1 process may use 2 cores, so 2 workers per process are started" in said


def test_pointers_in_any_order_are_found(images: Path, tmp_path: Path) -> None:
    """FFCV's writer has several processes, which add to the allocation table as they come."""
    content = bytearray(images.read_bytes())
    start = int(np.frombuffer(content[: HEADER.itemsize], HEADER)["allocations"][0])
    table = np.frombuffer(content[start:], ALLOCATION)
    content[start:] = table[np.random.default_rng(0).permutation(len(table))].tobytes()
    (tmp_path / "x.beton").write_bytes(content)
    (tmp_path / "x.beton.json").write_bytes(Path(f"{images}.json").read_bytes())
    shuffled, beton = Beton(tmp_path / "x.beton"), Beton(images)
    cuts = cuts_of(beton)
    for ours, wanted in zip(read_views(shuffled, 16, cuts, 1), reference(beton, 16, cuts), strict=True):
        assert np.array_equal(ours.numpy(), wanted)


def test_compiled_without_a_folder_to_keep_it_in(images: Path) -> None:
    script = (
        "import numba.core.caching as caching\n"
        "def no_place(*_): raise RuntimeError('cannot cache function: no locator available')\n"
        "caching.FunctionCache.__init__ = no_place\n"
        "from simclr_ddp.data import batches as data\nprint(data.usable_loader('auto'))"
    )
    status, output = processes.finish(processes.start_command([sys.executable, "-c", script]))
    assert (status, output) == (0, "('ffcv', '')\n")


def settings_of(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"data.train={images}",
        f"run_dir={run_dir}",
        "device=cpu",
        "threads=1",
        "data.size=16",
        "data.workers=1",
        "model.width=0.0625",
        "optim.global_batch_size=8",
        "optim.steps=3",
        "log.every_steps=1",
        *more,
    ]


# files by others


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_a_file_by_ffcvs_writer_trains(
    tmp_path: Path, loader: str, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    generator = np.random.default_rng(0)
    pictures = [(generator.integers(0, 256, (24 + i % 5, 30, 3), dtype=np.uint8), i % 2) for i in range(16)]
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    DatasetWriter(str(tmp_path / "theirs.beton"), fields, num_workers=1).from_indexed_dataset(pictures)
    arguments = settings_of(tmp_path / "theirs.beton", tmp_path / loader, f"data.loader={loader}")
    assert pretrain.main(arguments) == 0
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "theirs.beton" in line)
    assert line.startswith("warning: ") and "holds no class names" in line
    lines = read_metrics(tmp_path / loader / "metrics.jsonl")
    assert len(lines) == 3 and "probe_top1" in lines[1]
