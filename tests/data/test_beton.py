"""The .beton file: round trips, every kind of damage, and (where it is installed) FFCV on the other side."""

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simclr_ddp import beton
from simclr_ddp.beton import FLOAT, INT, PICTURES, Beton, Picture, quick_digest, vector

SMALL = 1 << 12  # a page size for tests: FFCV's 8 MiB would make every file 16 MiB


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth enough that JPEG is close."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def jpeg(pixels: np.ndarray, **options: Any) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return Picture(buffer.getvalue(), *pixels.shape[:2], raw=False)


def raw(pixels: np.ndarray) -> Picture:
    return Picture(pixels.tobytes(), *pixels.shape[:2], raw=True)


def write(path: Path, samples: list, fields: dict, page_size: int = SMALL, **more: Any) -> Beton:
    beton.write(path, samples, fields, len(samples) + 3, {"classes": None}, page_size=page_size, **more)
    return Beton(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.beton"


# --- round trips


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_of_random_fields(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = data.draw(st.integers(1, 12))
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans())
    pictures = [
        (raw if is_raw else jpeg)(noise(h, w, i))
        for i, (h, w, is_raw) in enumerate(data.draw(st.lists(shapes, min_size=count, max_size=count)))
    ]
    column = lambda strategy: data.draw(st.lists(strategy, min_size=count, max_size=count))  # noqa: E731
    row = lambda size: st.lists(st.floats(width=32, allow_nan=False), min_size=size, max_size=size)  # noqa: E731
    fields: dict[str, beton.Field] = {"image": PICTURES}
    columns: list[list] = [pictures]
    kind = data.draw(st.sampled_from(["none", "int", "float", "vector"]))
    if kind != "none":
        size = data.draw(st.integers(1, 5))
        fields["label"] = {"int": INT, "float": FLOAT, "vector": vector(size)}[kind]
        one = {"int": st.integers(-(2**63), 2**63 - 1), "float": st.floats(width=32, allow_nan=False)}
        columns.append(column(one[kind] if kind in one else row(size)))
    if data.draw(st.booleans()):
        fields["nuisance"] = vector(6)
        columns.append(column(row(6)))

    path = tmp_path_factory.mktemp("random") / "x.beton"
    page_size = data.draw(st.sampled_from([1 << 10, 1 << 13]))
    read = write(path, list(zip(*columns, strict=True)), fields, page_size)
    assert read.count == count and [read.stored(i) for i in range(count)] == pictures
    assert read.sizes.tolist() == [[p.height, p.width] for p in pictures] and read.sizes.dtype == np.int64
    if kind == "none":
        assert read.labels is None
    else:
        assert read.labels is not None and read.labels.dtype == (np.int64 if kind == "int" else np.float32)
        wanted = np.array(columns[1], read.labels.dtype)
        np.testing.assert_array_equal(read.labels, wanted if kind == "int" else wanted.reshape(count, -1))
    if "nuisance" in fields:
        np.testing.assert_array_equal(read.nuisance, np.array(columns[-1], np.float32))
    else:
        assert read.nuisance is None


def test_pixels(path: Path) -> None:
    pixels, grey = noise(30, 50), noise(20, 20, 1)[..., 0]
    read = write(path, [(raw(pixels),), (jpeg(pixels, quality=95),), (jpeg(grey),)], {"image": PICTURES})
    np.testing.assert_array_equal(read.image(0), pixels)
    assert read.image(0).flags.writeable and read.image(1).flags.writeable
    assert np.abs(read.image(1).astype(int) - pixels).mean() < 3
    assert read.image(2).shape == (20, 20, 3)
    for i in range(3):
        assert read.jpeg(i).mode == "RGB"
        np.testing.assert_array_equal(np.array(read.jpeg(i)), read.image(i))
    assert read.jpeg(1).tile, "a colour JPEG is opened, not decoded"
    for i in (-1, 3):
        with pytest.raises(IndexError, match="which has 3"):
            read.image(i)


def test_a_page_holds_whole_samples_and_grows_with_them(path: Path) -> None:
    sides = [5, 10, 36, 8, 60, 7]  # 36 * 36 * 3 and 60 * 60 * 3 bytes do not fit into 1 KiB
    samples = [(raw(noise(s, s, s)), s, np.full(6, s)) for s in sides]
    read = write(path, samples, {"image": PICTURES, "label": INT, "nuisance": vector(6)}, 1 << 10)
    for i, side in enumerate(sides):
        np.testing.assert_array_equal(read.image(i), noise(side, side, side))
    data = path.read_bytes()
    header = np.frombuffer(data, beton.HEADER, 1)[0]
    table = np.frombuffer(data, beton.ALLOCATION, offset=int(header["allocations"]))
    page = int(header["page_size"])
    assert page == 1 << 14 and int(header["allocations"]) % page == 0
    assert len(table) == 2 * len(sides)
    for sample in range(len(sides)):
        mine = table[table["sample"] == sample]
        first, last = mine["pointer"].min(), (mine["pointer"] + mine["size"] - 1).max()
        assert first // page == last // page, f"sample {sample} crosses a page"


def test_sidecar_fingerprint_and_pickle(path: Path) -> None:
    beton.write(path, [(raw(noise(4, 4)), 1)], {"image": PICTURES, "label": INT}, 1, {"classes": ["a", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = Beton(path)
    assert read.classes == ["a", "b"] and read.info["count"] == 1
    assert read.fingerprint() == read.info["sha256"][:16]
    beton.sidecar(path).unlink()
    with pytest.warns(UserWarning, match="has no x.beton.json beside it"):
        bare = Beton(path)
    assert bare.info == {} and bare.classes is None and len(bare.fingerprint()) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a worker that reopens the file does not warn again
        again = pickle.loads(pickle.dumps(bare))
    np.testing.assert_array_equal(again.image(0), noise(4, 4))
    assert again.fingerprint() == bare.fingerprint() and len(pickle.dumps(bare)) < 500


def test_the_digest_is_of_the_bytes_that_lie_there(path: Path) -> None:
    first, written = write(path, [(raw(noise(4, 4)),)], {"image": PICTURES}).digest(), path.read_bytes()
    assert first == quick_digest(path) and len(first) == 16
    for position in (0, len(written) // 2, len(written) - 1):
        path.write_bytes(written[:position] + bytes([written[position] ^ 1]) + written[position + 1 :])
        assert quick_digest(path) != first
    path.write_bytes(written)
    assert quick_digest(path) == first


def test_the_digest_of_a_large_file_is_of_its_size_its_ends_and_blocks_between(tmp_path: Path) -> None:
    path = tmp_path / "large"
    written = bytearray(np.random.default_rng(0).bytes(8 << 20))
    path.write_bytes(written)

    def digest() -> str:
        return quick_digest(path, whole=1 << 20, block=1 << 10, blocks=16)

    first = digest()
    for position, seen in ((0, True), ((4 << 20) + 1000, True), ((4 << 20) + 2000, False), ((8 << 20) - 1, True)):
        written[position] ^= 1
        path.write_bytes(written)
        assert (digest() != first) == seen, position
        written[position] ^= 1
    path.write_bytes(written + b"0")
    assert digest() != first


def test_fingerprint_without_sidecar_depends_on_the_labels(tmp_path: Path) -> None:
    found = set()
    for label in (0, 1):
        file = tmp_path / f"{label}.beton"
        write(file, [(raw(noise(4, 4)), label)], {"image": PICTURES, "label": INT})
        beton.sidecar(file).unlink()
        with pytest.warns(UserWarning):
            found.add(Beton(file).fingerprint())
    assert len(found) == 2


# --- what is refused


@pytest.fixture
def whole(path: Path) -> bytes:
    samples = [(jpeg(noise(20, 30, i)), i, np.arange(6) + i) for i in range(20)]
    write(path, samples, {"image": PICTURES, "label": INT, "nuisance": vector(6)})
    beton.sidecar(path).unlink()
    return path.read_bytes()


def refuse(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        Beton(path)


def test_missing(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.beton is not there: write it with"):
        Beton(path)


def test_not_a_beton(path: Path) -> None:
    refuse(path, b"", "not a .beton")
    refuse(path, jpeg(noise(99, 99)).data, "not a .beton")
    refuse(path, bytes(5000), "was not finished")


def test_truncated_anywhere(path: Path, whole: bytes) -> None:
    for size in [24, 100, 1065, 3147, 3500, 9000, *range(len(whole) - 3000, len(whole), 7), len(whole) - 24]:
        refuse(path, whole[:size], r"is truncated|is damaged|not a \.beton")


def test_pointers_beyond_the_end(path: Path, whole: bytes) -> None:
    end = int(np.frombuffer(whole, beton.HEADER, 1)[0]["allocations"])
    for column, value in (("pointer", 2**64 - 1), ("size", 2**64 - 1), ("size", end), ("pointer", end + 1)):
        table = np.frombuffer(whole, beton.ALLOCATION, offset=end).copy()
        table[column][3] = value
        refuse(path, whole[:end] + table.tobytes(), "points beyond its end|missing from its allocation table")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vectors") / "x.beton"
    write(file, [(jpeg(noise(20, 30, i)), np.arange(4)) for i in range(60)], {"image": PICTURES, "label": vector(4)})
    beton.sidecar(file).unlink()
    return file


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 3500), value=st.integers(0, 255))
def test_a_damaged_table_is_refused_or_read_but_never_crashes(vectors: Path, place: int, value: int) -> None:
    data = bytearray(vectors.read_bytes())
    data[place] = value
    damaged = vectors.with_name("damaged.beton")
    damaged.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = Beton(damaged)
            for i in range(0, read.count, 9):
                read.image(i)
        except ValueError as error:
            assert str(damaged) in str(error)


def test_half_written_is_never_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the file away at each sync, as a power cut would, and after some samples: nobody takes it."""
    found: list[bytes] = []
    sync = beton._sync

    def snapshot(file: Any) -> None:
        sync(file)
        if file.name.split(".")[1] == "beton" and "json" not in file.name:
            found.append(Path(file.name).read_bytes())

    def samples() -> Any:
        for i in range(30):
            (partial,) = path.parent.glob("*.partial-*")
            found.append(partial.read_bytes())
            assert not path.exists()
            yield raw(noise(200, 200, i)), i

    monkeypatch.setattr(beton, "_sync", snapshot)
    beton.write(path, samples(), {"image": PICTURES, "label": INT}, 30, {}, page_size=1 << 17)
    assert found[-1] == path.read_bytes(), "the last snapshot is the whole file"
    half = path.with_name("half.beton")
    for data in found[:-1]:
        refuse(half, data, "only 0 bytes|was not finished|truncated")


def test_a_raw_image_of_the_wrong_length(path: Path) -> None:
    write(path, [(raw(noise(4, 5)),)], {"image": PICTURES})
    data = bytearray(path.read_bytes())
    beton.sidecar(path).unlink()
    data[24 + 1041 + 3] = 5  # the height
    refuse(path, bytes(data), r"a raw image is not height \* width \* 3 bytes long")


def test_an_allocation_table_in_any_order(path: Path, whole: bytes) -> None:
    """As FFCV's writer leaves it with several processes."""
    with pytest.warns(UserWarning):
        before = Beton(path)
    end = int(np.frombuffer(whole, beton.HEADER, 1)[0]["allocations"])
    table = np.frombuffer(whole, beton.ALLOCATION, offset=end)
    other = path.with_name("other.beton")
    other.write_bytes(whole[:end] + np.random.default_rng(0).permutation(table).tobytes())
    with pytest.warns(UserWarning):
        after = Beton(other)
    assert [after.stored(i) for i in range(20)] == [before.stored(i) for i in range(20)]
    np.testing.assert_array_equal(after.nuisance, before.nuisance)


def test_unfinished_by_ffcv(path: Path, whole: bytes) -> None:
    header = np.frombuffer(whole, beton.HEADER, 1).copy()
    header["allocations"] = 0  # as FFCV's writer leaves it when it is killed
    refuse(path, header.tobytes() + whole[24:], "was not finished")


def test_other_versions_and_types(path: Path, whole: bytes) -> None:
    header = np.frombuffer(whole, beton.HEADER, 1).copy()
    header["version"] = 3
    refuse(path, header.tobytes() + whole[24:], "format 2")
    descriptors = np.frombuffer(whole, beton.DESCRIPTOR, 3, 24).copy()
    descriptors["kind"][1] = 5
    refuse(path, whole[:24] + descriptors.tobytes() + whole[24 + 3 * 1041 :], "field `label` is of FFCV's type 5")
    descriptors["kind"][1], descriptors["name"][0] = 1, b"picture"
    refuse(path, whole[:24] + descriptors.tobytes() + whole[24 + 3 * 1041 :], "no image field called `image`, only pic")


def test_a_sidecar_that_does_not_belong(path: Path, whole: bytes) -> None:
    size = len(whole)
    for text, match in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"count": 20, "bytes": size + 1}), "belongs to another file"),
        (json.dumps({"count": 20, "bytes": size, "classes": ["a"]}), "names 1 classes"),
    ):
        beton.sidecar(path).write_text(text)
        with pytest.raises(ValueError, match=match):
            Beton(path)


def test_broken_jpeg_inside(path: Path) -> None:
    picture = jpeg(noise(60, 60))
    data = [picture._replace(data=picture.data[:-200] + bytes(200)), picture, picture._replace(width=61)]
    with pytest.raises(ValueError, match="can't be decoded"):
        write(path, [(data[0],)], {"image": PICTURES})  # the writer reads back what it wrote
    assert not list(path.parent.iterdir())
    write(path, [(picture,)] * 3, {"image": PICTURES})
    read = Beton(path)
    read._length[1] -= 200
    read.sizes[2] = 61
    assert read.image(0).shape == (60, 60, 3)
    with pytest.raises(ValueError, match=r"image 1 of .*x\.beton can't be decoded \(.*truncated"):
        read.image(1)
    with pytest.raises(ValueError, match=r"image 2 of .*\(it is 60 x 60, not 61 x 61 pixels\)"):
        read.image(2)


# --- the writer's manners


def test_an_error_leaves_nothing(path: Path) -> None:
    def samples() -> Any:
        yield (raw(noise(4, 4)),)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beton.write(path, samples(), {"image": PICTURES}, 5, {}, page_size=SMALL)
    with pytest.raises(ValueError, match=r"no image is left to write to .*x\.beton"):
        beton.write(path, [], {"image": PICTURES}, 5, {}, page_size=SMALL)
    assert not list(path.parent.iterdir())


def test_existing_files(path: Path) -> None:
    fields = {"image": PICTURES}
    first = write(path, [(raw(noise(4, 4)),)], fields)
    with pytest.raises(FileExistsError, match="overwrite=true"):
        write(path, [(raw(noise(4, 4, 1)),)], fields)
    assert Beton(path).fingerprint() == first.fingerprint()
    second = write(path, [(raw(noise(4, 4, 1)),)], fields, overwrite=True)
    assert second.fingerprint() != first.fingerprint() and len(list(path.parent.iterdir())) == 2


def test_a_failed_overwrite_keeps_the_old_file(path: Path) -> None:
    old = write(path, [(raw(noise(4, 4)),)], {"image": PICTURES}).fingerprint()
    with pytest.raises(ValueError, match="no image"):
        write(path, [], {"image": PICTURES}, overwrite=True)
    assert Beton(path).fingerprint() == old


def test_bytes_lost_on_the_way_to_the_disk_are_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = beton._digest

    def lossy(partial: Path, first: int, end: int) -> tuple[str, int]:
        with partial.open("r+b") as file:
            file.seek(first + 5)
            file.write(b"?")
        return digest(partial, first, end)

    monkeypatch.setattr(beton, "_digest", lossy)
    with pytest.raises(OSError, match="check the disk"):
        write(path, [(raw(noise(4, 4)),)], {"image": PICTURES})
    assert not list(path.parent.iterdir())


# --- FFCV on the other side


def ffcv_batches(path: Path, pipelines: dict, os_cache: bool) -> list:
    """All batches, copied: FFCV reuses its buffers."""
    import torch
    from ffcv.loader import Loader, OrderOption

    threads = torch.get_num_threads()
    loader = Loader(
        str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, os_cache=os_cache,
        pipelines=pipelines,
    )  # fmt: skip
    batches = [[np.array(part) for part in batch] for batch in loader]
    torch.set_num_threads(threads)
    return batches


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numba, when a pipeline is freed
def test_ffcv_reads_ours(path: Path, os_cache: bool) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install ffcv")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    colour = [noise(48, 64, i) for i in range(11)]
    grey = noise(48, 64, 5)[..., 1]
    pictures = [(raw if i % 2 else jpeg)(pixels) for i, pixels in enumerate(colour)] + [jpeg(grey)]
    samples = [(picture, i * 7, np.arange(6) + i / 8) for i, picture in enumerate(pictures)]
    ours = write(path, samples, {"image": PICTURES, "label": INT, "nuisance": vector(6)}, 1 << 12)
    assert np.frombuffer(path.read_bytes(), beton.HEADER, 1)["page_size"][0] == 1 << 14, "the pages grew on the way"
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "nuisance": [NDArrayDecoder()]}
    batches = ffcv_batches(path, pipelines, os_cache)
    images, labels = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    # FFCV hands on the whole buffer of the last batch of arrays
    numbers = np.concatenate([batch[2][: len(batch[1])] for batch in batches])
    np.testing.assert_array_equal(labels[:, 0], ours.labels)
    np.testing.assert_array_equal(numbers, ours.nuisance)
    for i in range(ours.count):
        gap = np.abs(images[i].astype(int) - ours.image(i))
        assert gap.max() == 0 if pictures[i].raw else gap.mean() < 2, i


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ffcv_reads_ours_without_labels(path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install ffcv")
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    ours = write(path, [(raw(noise(9, 7, i)),) for i in range(6)], {"image": PICTURES})
    images = np.concatenate([batch[0] for batch in ffcv_batches(path, {"image": [SimpleRGBImageDecoder()]}, True)])
    np.testing.assert_array_equal(images, [ours.image(i) for i in range(6)])


class Indexed:
    """What FFCV's writer takes; at module level, so that its processes can pickle it."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple:
        return self.rows[i]


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("label", ["int", "float", "array", "none"])
@pytest.mark.filterwarnings("ignore")
def test_we_read_ffcvs(path: Path, mode: str, label: str) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install ffcv")
    from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(mode)}
    values: list = []
    if label != "none":
        array = NDArrayField(np.dtype("float32"), (3,))
        fields["label"] = {"int": IntField(), "float": FloatField(), "array": array}[label]
        values = {
            "int": [i - 2 for i in range(23)],
            "float": [i / 4 for i in range(23)],
            "array": [np.arange(3, dtype=np.float32) + i for i in range(23)],
        }[label]
    pixels = [noise(20 + i, 30, i) for i in range(23)]
    rows = [(p, *((values[i],) if values else ())) for i, p in enumerate(pixels)]
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Indexed(rows), chunksize=5)
    ours = Beton(path)
    assert ours.count == 23 and ours.sizes[:, 0].tolist() == list(range(20, 43))
    for i in range(23):
        gap = np.abs(ours.image(i).astype(int) - pixels[i])
        assert gap.max() == 0 if mode == "raw" else gap.mean() < 4
    if label == "none":
        assert ours.labels is None
    else:
        assert ours.labels is not None and ours.labels.dtype == (np.int64 if label == "int" else np.float32)
        wanted = np.array(values, np.float64)
        np.testing.assert_array_equal(ours.labels, wanted if label == "int" else wanted.reshape(23, -1))


@pytest.mark.filterwarnings("ignore")
def test_the_same_bytes_as_ffcvs_writer(path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install ffcv")
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    pixels = [noise(700 + i, 700, i) for i in range(13)]  # 1.5 MB each: two pages
    rows = [(p, i, np.arange(6, dtype=np.float32) * i) for i, p in enumerate(pixels)]
    theirs = path.with_name("ffcv.beton")
    fields = {"image": RGBImageField("raw"), "label": IntField(), "nuisance": NDArrayField(np.dtype("float32"), (6,))}
    DatasetWriter(str(theirs), fields, num_workers=1).from_indexed_dataset(Indexed(rows))
    samples = [(raw(p), i, numbers) for p, i, numbers in rows]
    write(path, samples, {"image": PICTURES, "label": INT, "nuisance": vector(6)}, beton.PAGE_SIZE)
    assert path.read_bytes() == theirs.read_bytes()
