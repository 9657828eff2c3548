"""The .beton file: round trips, every kind of damage, and (where it is installed) FFCV on the other side."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from simclr_ddp.data import beton
from simclr_ddp.data.beton import FLOAT, INT, PICTURES, Beton, Picture, quick_digest, vector
from tests.support.old_files import as_before, without_description

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
    assert page == 1 << 14 and int(header["allocations"]) % 8 == 0
    assert len(table) == 2 * len(sides)
    for sample in range(len(sides)):
        mine = table[table["sample"] == sample]
        first, last = mine["pointer"].min(), (mine["pointer"] + mine["size"] - 1).max()
        assert first // page == last // page, f"sample {sample} crosses a page"


def labelled(path: Path, classes: list[str], label: int = 1) -> Beton:
    info = {"label_kind": "classes", "classes": classes}
    beton.write(path, [(raw(noise(4, 4)), label)], {"image": PICTURES, "label": INT}, 1, info, page_size=SMALL)
    return Beton(path)


def test_a_file_alone_describes_itself(path: Path) -> None:
    read = labelled(path, ["a", "cafe\u0301", "ch\udce2teau"])
    assert read.classes == ["a", "caf\u00e9", r"ch\xe2teau"], "names are in NFC, and can be printed"
    assert read.info["count"] == 1 and read.info["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    beton.sidecar(path).unlink()
    alone = Beton(path)
    assert alone.info == {} and alone.classes == read.classes and alone.fingerprint() == read.fingerprint()
    assert read.is_complete() and alone.is_complete()
    again = pickle.loads(pickle.dumps(alone))
    np.testing.assert_array_equal(again.image(0), noise(4, 4))
    assert again.fingerprint() == alone.fingerprint() and len(pickle.dumps(alone)) < 500
    other = labelled(path.with_name("y.beton"), ["b", "c", "d"], label=0)
    assert other.fingerprint() != read.fingerprint(), "labels belong to the content"
    data = bytearray(path.read_bytes())
    data[SMALL + 1] ^= 1
    path.write_bytes(data)
    assert not Beton(path).is_complete()


def test_a_file_of_earlier_versions_is_the_same_with_and_without_its_sidecar(path: Path) -> None:
    labelled(path, ["a", "b"])
    old = Beton(as_before(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert old.classes == ["a", "b"] and old.fingerprint() == sha256 and old.is_complete()
    beton.sidecar(path).unlink()
    bare = Beton(path)
    assert bare.classes is None and bare.fingerprint() == sha256 and bare.is_complete() is None
    hashed_then = hashlib.sha256(path.read_bytes()[: 24 + 2 * 1041 + 24] + path.read_bytes()[-24:]).hexdigest()[:16]
    for read in (old, bare):
        assert read.is_known_as(sha256) and read.is_known_as(hashed_then) and not read.is_known_as("0" * 16)


def test_a_damaged_description_is_refused(path: Path) -> None:
    labelled(path, ["a", "b"])
    whole = path.read_bytes()
    end = int(np.frombuffer(whole, beton.HEADER, 1)[0]["allocations"])
    for found, changed in ((b'["a"', b"[7.9"), (b'"b"]', b'"b",'), (b'["a", "b"]', b'["a"     ]')):
        refuse(path, whole.replace(found, changed), "description before its allocation table|names 1 classes")
    refuse(path, whole[: end - 10] + b"\xff" + whole[end - 9 :], "description before its allocation table")


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
        return quick_digest(path, limit=1 << 20, block=1 << 10, blocks=16)

    first = digest()
    for position, seen in ((0, True), ((4 << 20) + 1000, True), ((4 << 20) + 2000, False), ((8 << 20) - 1, True)):
        written[position] ^= 1
        path.write_bytes(written)
        assert (digest() != first) == seen, position
        written[position] ^= 1
    path.write_bytes(written + b"0")
    assert digest() != first


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
    with pytest.raises(FileNotFoundError, match=r"x\.beton does not exist; write it with"):
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
        refuse(path, whole[:end] + table.tobytes(), "pointers beyond its end|missing from its allocation table")


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
    try:
        read = Beton(damaged)
        for i in range(0, read.count, 9):
            read.image(i)
    except ValueError as error:
        assert str(damaged) in str(error)


def test_half_written_is_never_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the file away at each sync, as a power cut would, and after some samples: nobody takes it."""
    found: list[bytes] = []
    sync = beton.sync_file

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

    monkeypatch.setattr(beton, "sync_file", snapshot)
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
    before = Beton(path)
    end = int(np.frombuffer(whole, beton.HEADER, 1)[0]["allocations"])
    table = np.frombuffer(whole, beton.ALLOCATION, offset=end)
    other = path.with_name("other.beton")
    other.write_bytes(whole[:end] + np.random.default_rng(0).permutation(table).tobytes())
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
    refuse(path, whole[:24] + descriptors.tobytes() + whole[24 + 3 * 1041 :], "field `label` has FFCV's type 5")
    descriptors["kind"][1], descriptors["name"][0] = 1, b"picture"
    refuse(path, whole[:24] + descriptors.tobytes() + whole[24 + 3 * 1041 :], "no image field `image`, only pic")


def test_an_odd_sidecar_is_refused_in_one_line(path: Path, whole: bytes) -> None:
    path.write_bytes(without_description(path))
    fits = {"count": 20, "bytes": path.stat().st_size}
    for content, match in (
        ("{", "is damaged .it is not JSON"),
        ("[]", "is damaged .it is not a JSON object"),
        ("[" * 50_000, "is damaged .its JSON is nested too deeply"),
        (b"\xff\xfe", "is damaged"),
        ({"bytes": 1}, "is damaged"),
        (fits | {"bytes": len(whole) + 1}, "belongs to another file"),
        (fits | {"classes": ["a"]}, "names 1 classes"),
        *((fits | {"classes": odd}, "its classes are not a list of names") for odd in (5, 1.5, True, "ab", [1], [[]])),
        (fits | {"numbers": {"a": 1}}, "its numbers are not a list of names"),
        *((fits | {"sha256": odd}, "its sha256 is not 64") for odd in (5, ["a"], "abc", True)),
    ):
        data = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        beton.sidecar(path).write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(ValueError, match=match) as caught:
            Beton(path)
        assert "\n" not in str(caught.value)


def test_broken_jpeg_inside(path: Path) -> None:
    picture = jpeg(noise(60, 60))
    data = [picture._replace(data=picture.data[:-200] + bytes(200)), picture, picture._replace(width=61)]
    with pytest.raises(ValueError, match="can't be decoded"):
        write(path, [(data[0],)], {"image": PICTURES})  # the writer reads back what it wrote
    assert not list(path.parent.iterdir())
    write(path, [(picture,)] * 3, {"image": PICTURES})
    read = Beton(path)
    read.length[1] -= 200
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
    digest = beton.file_digest

    def lossy(partial: Path, end: int, first: int, header: bytes) -> tuple[Any, int]:
        with partial.open("r+b") as file:
            file.seek(first + 5)
            file.write(b"?")
        return digest(partial, end, first, header)

    monkeypatch.setattr(beton, "file_digest", lossy)
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
    assert without_description(path) == theirs.read_bytes()


def test_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    opened, empty = write(tmp_path / "x.beton", [(jpeg(pixels),)], {"image": PICTURES}), np.empty

    def fail(*_: Any) -> None:
        raise OSError("broken data stream when reading image file")

    def full(shape: Any, *arguments: Any) -> np.ndarray:
        if shape == 20 * 30 * 16:
            raise MemoryError
        return empty(shape, *arguments)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match="can't be decoded"):
        opened.image(0)
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(MemoryError):
        opened.image(0)


def test_names_of_files_belong_to_one_file(path: Path, tmp_path: Path) -> None:
    written = write(path, [(raw(noise(4, 4, i)),) for i in range(2)], {"image": PICTURES})
    assert written.names() is None
    beton.write_names(path, ["a b.jpg", "dé\u2028jà.jpg"])
    assert Beton(path).names() == ["a b.jpg", "dé\u2028jà.jpg"]
    second = write(path, [(raw(noise(4, 4, i)),) for i in range(2, 4)], {"image": PICTURES}, overwrite=True)
    with pytest.raises(ValueError, match=r"x\.beton\.names belongs to another file than"):
        second.names()
    beton.write_names(path, ["one only"])
    with pytest.raises(ValueError, match="belongs to another file"):
        second.names()
