"""Writing data sets: what is stored unchanged, what is converted, what stops the command, and what it leaves behind."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_ddp import beton, metrics, spirograph, write_dataset
from simclr_ddp.beton import Beton
from simclr_ddp.write_dataset import convert
from tests.conftest import write_images

Write = Callable[..., Beton]


def noise(height: int = 24, width: int = 32, seed: int = 0, channels: int = 3) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def put(folder: Path, **files: bytes) -> Path:
    """Files a__b_jpg=... as folder/a/b.jpg."""
    for name, data in files.items():
        stem, _, suffix = name.replace("__", "/").rpartition("_")
        path = folder / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's pages of 8 MiB would make every file here 16 MiB."""
    defaults = beton.write.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "page_size", 1 << 12)
    monkeypatch.setattr(beton, "PAGE_SIZE", 1 << 12)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(source: str | Path, **options: Any) -> Beton:
        out = tmp_path / "out" / "x.beton"
        try:
            write_dataset.write_dataset(str(source), out, **options)
        except BaseException:
            assert not out.parent.exists() or not list(out.parent.iterdir()), "something was left behind"
            raise
        assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json"]
        return Beton(out)

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


# --- one image


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": exif(1)}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_upright_jpegs_are_stored_byte_for_byte(mode: str, options: dict) -> None:
    data = encoded(noise().convert(mode), **options)
    for trailer in (b"", bytes(64), b"a maker's note"):
        stored = convert(data + trailer, 90, "auto")
        assert stored == (beton.Picture(data + trailer, 24, 32, raw=False), "")


def test_an_mpo_is_a_jpeg() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert convert(data, 90, "auto") == (beton.Picture(data, 24, 32, raw=False), "")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Against the eight meanings of the EXIF standard, by hand."""
    upright = np.array(noise(24, 32))
    seen = {  # what is stored so that a viewer shows `upright`
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    data = encoded(Image.fromarray(np.ascontiguousarray(seen)), quality=95, exif=exif(orientation))
    picture, why = convert(data, 95, "auto")
    assert why == "EXIF orientation" and (picture.height, picture.width) == (24, 32)
    result = Image.open(io.BytesIO(picture.data))
    assert result.mode == "RGB" and result.getexif().get(0x0112, 1) == 1
    assert np.abs(np.array(result).astype(int) - upright).mean() < 3


HALF = np.dstack([np.full((8, 8, 3), 100), np.array([255] * 32 + [0] * 32).reshape(8, 8)]).astype(np.uint8)
LAID = np.where(HALF[..., 3:] == 255, HALF[..., :3], 255)  # over white
DEEP = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024) + 77
CONVERSIONS = {
    "RGB": (encoded(noise(), "PNG"), np.array(noise()), "PNG"),
    "grey": (encoded(noise().convert("L"), "PNG"), np.array(noise().convert("L").convert("RGB")), "PNG"),
    "one bit": (encoded(noise().convert("1"), "PNG"), np.array(noise().convert("1").convert("RGB")), "PNG, 1"),
    "palette": (encoded(noise().convert("P"), "PNG"), np.array(noise().convert("P").convert("RGB")), "PNG, P"),
    "alpha": (encoded(Image.fromarray(HALF), "PNG"), LAID, "PNG, RGBA, transparency over white"),
    "grey and alpha": (
        encoded(Image.fromarray(HALF).convert("LA"), "PNG"), LAID, "PNG, LA, transparency over white",
    ),
    "transparent palette": (
        encoded(Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P"), "PNG", transparency=1),
        np.array([[0, 255], [255, 0]], np.uint8)[..., None].repeat(3, 2), "PNG, P, transparency over white",
    ),
    "CMYK": (
        encoded(noise().convert("CMYK"), quality=100, subsampling=0), np.array(noise().convert("CMYK").convert("RGB")),
        "CMYK",
    ),
    "16 bits": (encoded(Image.fromarray(DEEP), "PNG"), (DEEP >> 8)[..., None].repeat(3, 2), "PNG, I;16"),
    "frames": (
        encoded(Image.fromarray(HALF[..., :3]), "GIF", save_all=True, append_images=[noise(8, 8)]), HALF[..., :3],
        "GIF, first of its frames, P",
    ),
    "bmp": (encoded(noise(), "BMP"), np.array(noise()), "BMP"),
    "webp": (encoded(noise(), "WEBP", lossless=True), np.array(noise()), "WEBP"),
    "tiff": (encoded(noise(), "TIFF"), np.array(noise()), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_everything_else_becomes_rgb(name: str) -> None:
    data, pixels, why = CONVERSIONS[name]
    stored = convert(data, 90, "raw")
    found = np.frombuffer(stored.picture.data, np.uint8).reshape(stored.picture.height, stored.picture.width, 3)
    assert np.abs(found.astype(int) - pixels).max() <= (4 if name == "CMYK" else 0)
    assert stored.why == why
    picture = convert(data, 100, "auto").picture
    image = Image.open(io.BytesIO(picture.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (picture.width, picture.height))
    assert np.abs(np.array(image).astype(int) - pixels).mean() < 20  # dither and sharp edges blur


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 10}])
def test_a_jpeg_cut_anywhere_is_noticed(options: dict) -> None:
    data = encoded(noise(40, 56), **options)
    for size in range(len(data)):
        with pytest.raises(Exception):  # noqa: B017 - whatever Pillow says
            convert(data[:size], 90, "auto")
        if size % 16 == 0:  # a download that broke off in a file of the full size
            with pytest.raises(Exception):  # noqa: B017
                convert(data[:size] + bytes(len(data)), 90, "auto")


def test_unknown_ranges_are_refused() -> None:
    for array in (np.full((4, 4), 1 << 20, np.int32), np.full((4, 4), 0.5, np.float32)):
        with pytest.raises(ValueError, match="no known range"):
            convert(encoded(Image.fromarray(array), "TIFF"), 90, "auto")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_unreadable_exif_block_turns_nothing() -> None:
    data = encoded(noise(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert convert(data, 90, "auto").picture.data == data


# --- folders


def test_labelled_folder(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    jpegs = {f"{name}__{i}_jpg": encoded(noise(20 + i, 30, i)) for name in ("dog", "cat") for i in range(5)}
    put(source, **jpegs, ant__deep__er_png=encoded(noise(), "PNG"), ant__notes_txt=b"", **{"._a_jpg": b""})
    (source / "zebra").mkdir()
    (source / ".git").mkdir()
    result = write(source)
    assert result.classes == ["ant", "cat", "dog", "zebra"] and result.count == 11
    assert sorted(result.labels.tolist()) == [0] + [1] * 5 + [2] * 5  # type: ignore[union-attr]
    assert result.labels.tolist() != sorted(result.labels.tolist()), "shuffled"  # type: ignore[union-attr]
    found = {(result.stored(i).data, int(result.labels[i])) for i in range(11)}  # type: ignore[index]
    for name, data in jpegs.items():
        assert (data, result.classes.index(name[:3])) in found, "unchanged, and under its label"
    info = result.info
    assert info["label_kind"] == "classes" and info["stored"] == {"unchanged": 10, "encoded": 1, "raw": 0}
    assert info["converted"] == {"PNG": {"count": 1, "files": ["ant/deep/er.png"]}}
    assert info["skipped"] == {"count": 0, "files": []} and info["ignored"] == {".txt": 1}
    assert info["source"] == str(source) and info["split"] == "train" and info["tool"].startswith("simclr_ddp ")
    assert info["sha256"] == hashlib.sha256(result.path.read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    assert "11 images, " in printed and "1 converted (PNG), such as ant/deep/er.png" in printed
    assert "1 .txt" in printed and "class zebra has no images" in printed and "are free" in printed


def test_flat_folder_has_no_labels(source: Path, write: Write) -> None:
    put(source, a_jpg=encoded(noise()), b_JPEG=encoded(noise(seed=1)), c_webp=encoded(noise(), "WEBP"))
    (source / "empty").mkdir()
    result = write(source)
    assert result.count == 3 and result.labels is None and result.info["label_kind"] == "none"


def test_a_folder_and_its_splits(source: Path, write: Write) -> None:
    put(source, train__a__1_jpg=encoded(noise()), test__a__1_jpg=encoded(noise(9)), test__b__1_jpg=encoded(noise(9)))
    result = write(source, split="test")
    assert result.classes == ["a", "b"] and result.sizes[:, 0].tolist() == [9, 9] and result.info["split"] == "test"
    with pytest.raises(ValueError, match="no folder val: choose split=test or split=train"):
        write_dataset.write_dataset(str(source), source / "y.beton", split="val")


def test_the_order_and_the_first_images_are_fixed(source: Path, write: Write) -> None:
    put(source, **{f"{name}__{i}_jpg": encoded(noise(seed=i)) for name in "ab" for i in range(20)})
    whole = write(source)
    part = write(source, images=10, overwrite=True)
    assert part.count == 10 and part.labels.tolist() == whole.labels.tolist()[:10]  # type: ignore[union-attr]
    assert 2 <= part.labels.sum() <= 8  # type: ignore[union-attr]
    assert write(source, workers=7, overwrite=True).fingerprint() == whole.fingerprint()


def test_raw_mode(source: Path, write: Write) -> None:
    put(source, a_png=encoded(noise(60, 70), "PNG"), b_jpg=encoded(noise()))
    result = write(source, mode="raw")
    small, large = np.argsort(result.sizes[:, 0])
    np.testing.assert_array_equal(result.image(large), np.array(noise(60, 70)))
    np.testing.assert_array_equal(result.image(small), np.array(Image.open(source / "b.jpg")))
    assert result.info["stored"] == {"unchanged": 0, "encoded": 0, "raw": 2}


def test_links(source: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    outside = put(tmp_path / "outside", secret__1_jpg=encoded(noise()), file_jpg=encoded(noise(10)))
    put(source, a__1_jpg=encoded(noise(11)))
    (source / "a" / "loop").symlink_to(source)
    (source / "b").symlink_to(outside / "secret")
    (source / "a" / "2.jpg").symlink_to(outside / "file.jpg")
    result = write(source)
    assert result.classes == ["a"] and sorted(result.sizes[:, 0].tolist()) == [10, 11]
    assert sorted(result.info["links_not_followed"]) == [str(source / "a" / "loop"), str(source / "b")]
    assert f"{source}/b is a link to a folder, and not followed" in capsys.readouterr().out


# --- bad images


BAD = {
    "truncated": encoded(noise())[:-300],
    "text": b"no image at all",
    "empty": b"",
    "truncated PNG": encoded(noise(), "PNG")[:-40],
    "corrupt PNG": encoded(noise(), "PNG").replace(b"IDAT", b"IDAT\0", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_stops_the_command(name: str, source: Path, write: Write) -> None:
    put(source, a__1_jpg=encoded(noise()), a__bad_jpg=BAD[name])
    with pytest.raises(ValueError, match=r"source/a/bad\.jpg can't be decoded \(.+\): .* on_error=skip") as caught:
        write(source)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_a_bad_image_stops_the_command_beyond_those_tried_first(
    source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, **{f"a__{i}_jpg": encoded(noise(seed=i)) for i in range(8)})
    monkeypatch.setattr(write_dataset, "_estimate", lambda *_: None)
    (source / "a" / "7.jpg").write_bytes(BAD["truncated"])
    with pytest.raises(ValueError, match=r"source/a/7\.jpg can't be decoded"):
        write(source)


def test_bad_images_are_left_out_and_listed(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    good = {f"b__{i}_jpg": encoded(noise(10 + i)) for i in range(3)}
    put(source, **good, **{f"a__{i}_jpg": data for i, data in enumerate(BAD.values())})
    (source / "b" / "broken.jpg").symlink_to("nowhere")
    result = write(source, on_error="skip")
    assert result.count == 3 and result.labels.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    assert sorted(result.sizes[:, 0].tolist()) == [10, 11, 12]
    skipped = result.info["skipped"]
    wanted = [f"a/{i}.jpg" for i in range(len(BAD))] + ["b/broken.jpg"]
    assert skipped["count"] == 6 and sorted(name for name, _ in skipped["files"]) == wanted
    assert all("can't be decoded" in why for _, why in skipped["files"])
    printed = capsys.readouterr().out
    assert "6 left out" in printed and "left out b/broken.jpg" in printed
    shutil.rmtree(source / "b")
    with pytest.raises(ValueError, match="no image is left to write"):
        write_dataset.write_dataset(str(source), result.path.with_name("y.beton"), on_error="skip")


@pytest.mark.parametrize("side", [12, 16])  # Pillow warns above its limit, and raises above twice its limit
def test_a_decompression_bomb_is_a_bad_image(
    side: int, source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    put(source, a_png=encoded(noise(side, side), "PNG"), b_jpg=encoded(noise(8, 8)))
    with pytest.raises(ValueError, match=r"a\.png can't be decoded \(.*bomb"):
        write(source)
    assert write(source, on_error="skip").count == 1


# --- what is refused before anything is written


def test_sources_that_are_none(source: Path, write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source is not there: give a folder of images, cifar10"):
        write(source)
    put(source, readme_txt=b"")
    with pytest.raises(ValueError, match=r"source holds no images \(\.jpg, "):
        write(source)
    with pytest.raises(NotADirectoryError, match=r"readme\.txt is a file"):
        write(source / "readme.txt")
    (source / "link").symlink_to(put(tmp_path / "outside", a_jpg=encoded(noise())))
    with pytest.raises(ValueError, match=r"only links to folders such as .*link, which are not followed"):
        write(source)
    put(source, a_jpg=encoded(noise()), b__c_jpg=encoded(noise()))
    with pytest.raises(ValueError, match=r"holds images \(a\.jpg\) and folders of images \(b\)"):
        write(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder(source: Path, write: Write) -> None:
    put(source, a__1_jpg=encoded(noise()))
    (source / "a").chmod(0)
    with pytest.raises(PermissionError, match="source/a"):
        write(source)


def test_options(source: Path, write: Write, tmp_path: Path) -> None:
    put(source, a_jpg=encoded(noise()))
    for options, match in (
        ({"on_error": "ignore"}, "on_error=ignore is unknown: choose stop or skip"),
        ({"mode": "png"}, "mode=png is unknown"),
        ({"images": 0}, "images=0 leaves nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            write(source, **options)
    with pytest.raises(ValueError, match=r"does not end in \.beton"):
        write_dataset.write_dataset(str(source), tmp_path / "x.ffcv")


def test_an_existing_file_is_kept(source: Path, write: Write) -> None:
    put(source, a_jpg=encoded(noise()))
    old = write(source).path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=true"):
        write_dataset.write_dataset(str(source), source.parent / "out" / "x.beton")
    assert (source.parent / "out" / "x.beton").read_bytes() == old
    put(source, b_jpg=encoded(noise()))
    assert write(source, overwrite=True).count == 2


def test_too_little_space(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, a_jpg=encoded(noise()))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9_000))
    with pytest.raises(OSError, match=r"out has 0 MB free, but about 0 MB are needed: use another disk"):
        write(source)


def test_the_estimate_covers_the_file(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    put(source, **{f"a__{i}_jpg": encoded(noise(150, 150 + i % 40, i), quality=95) for i in range(300)})
    result = write(source)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "are free" in line)
    need, size = float(line.split()[1]) * 1e6, result.info["bytes"]
    assert size - 0.5e6 < need < 1.5 * size + 0.5e6, (need, size)


def test_an_interruption_leaves_nothing(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, **{f"a__{i}_jpg": encoded(noise(seed=i)) for i in range(30)})
    regions = beton._regions
    calls = []

    def interrupted(*arguments: Any) -> list[bytes]:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return regions(*arguments)

    monkeypatch.setattr(beton, "_regions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source)


def test_leftovers_of_a_killed_run_are_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(source, a_jpg=encoded(noise()))
    put(tmp_path / "out", **{"x.beton_partial-123": b""})
    write_dataset.write_dataset(str(source), tmp_path / "out" / "x.beton")
    assert "x.beton.partial-123 was left by a run that was killed" in capsys.readouterr().out


# --- CIFAR


def cifar10(folder: Path, count: int = 6) -> Path:
    """Files as CIFAR-10's authors publish them: Python 2 pickles of dicts."""
    folder.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(k).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [(i + k) % 10 for i in range(count)]
        (folder / name).write_bytes(pickle.dumps({"batch_label": name, "data": pixels, "labels": labels}, protocol=2))
    names = {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def test_cifar10_folder(tmp_path: Path, write: Write) -> None:
    cifar10(tmp_path / "data" / "cifar-10-batches-py")
    result = write(tmp_path / "data")
    assert result.count == 30 and result.classes == [f"class {i}" for i in range(10)]
    assert result.labels.tolist() == [(i + k) % 10 for k in range(5) for i in range(6)]  # type: ignore[union-attr]
    planes = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)[2].reshape(3, 32, 32)
    np.testing.assert_array_equal(result.image(8), planes.transpose(1, 2, 0))
    assert result.info["stored"] == {"unchanged": 0, "encoded": 0, "raw": 30}
    test = write(tmp_path / "data" / "cifar-10-batches-py", split="test", images=4, mode="jpeg", overwrite=True)
    assert test.count == 4 and test.labels.tolist() == [5, 6, 7, 8]  # type: ignore[union-attr]
    assert not test.stored(0).raw
    with pytest.raises(ValueError, match="split=val is unknown to CIFAR10"):
        write_dataset.write_dataset(str(tmp_path / "data"), tmp_path / "y.beton", split="val")


def test_cifar100_folder(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": np.full((2, 3072), 7, np.uint8), "fine_labels": [99, 3], "coarse_labels": [1, 1]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"fine_label_names": [str(i) for i in range(100)], "coarse_label_names": ["x"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    result = write(folder)
    assert result.labels.tolist() == [99, 3] and len(result.classes) == 100  # type: ignore[union-attr, arg-type]


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_malicious_pickle_runs_nothing(tmp_path: Path, write: Write) -> None:
    folder = cifar10(tmp_path / "cifar")
    proof = tmp_path / "proof"
    evil = Evil(os.system, f"touch {proof}")
    pickle.loads(pickle.dumps(evil))
    assert proof.exists(), "the pickle would run"
    proof.unlink()
    others = [
        Evil(eval, f"open({str(proof)!r}, 'w')"),
        Evil(getattr, "text", "upper"),
        Evil(np.dtype, "O"),
        Evil(np.frombuffer, b"1234"),
    ]
    for content in [{"data": evil, "labels": []}, *({"data": other, "labels": []} for other in others), evil]:
        for protocol in (0, 2, 4):
            for name in ("data_batch_3", "batches.meta"):
                good = (folder / name).read_bytes()
                (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
                with pytest.raises(ValueError, match=rf"{name} (is no file of CIFAR's|does not hold|names no classes)"):
                    write(folder)
                (folder / name).write_bytes(good)
    assert not proof.exists()


def test_arrays_of_other_types_and_sizes_are_refused(tmp_path: Path, write: Write) -> None:
    folder = cifar10(tmp_path / "cifar")
    for data, labels in (
        (np.zeros((2, 3072), np.float32), [0, 1]),
        (np.zeros((2, 3072), np.int8), [0, 1]),
        (np.array([[None]]), [0]),
        (np.zeros((2, 3071), np.uint8), [0, 1]),
        (np.asfortranarray(np.zeros((2, 3072), np.uint8)), [0, 1]),
        (np.zeros((2, 3072), np.uint8), [0]),
        (np.zeros((2, 3072), np.uint8), [0, 10]),
        (np.zeros((2, 3072), np.uint8), [0, "1"]),
        ("text", [0]),
    ):
        (folder / "data_batch_5").write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=2))
        with pytest.raises(ValueError, match=r"data_batch_5 .*: extract the archive again"):
            write(folder)
    (folder / "data_batch_5").write_bytes(b"\x80\x02}q\x00(")
    with pytest.raises(ValueError, match="data_batch_5 is no file of CIFAR's"):
        write(folder)


def test_cifar10_by_name(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded into datasets/ once; torchvision's checksums decide whether what is there is whole."""
    monkeypatch.chdir(tmp_path)
    downloads: list[str] = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        downloads.append(md5)
        with tarfile.open(Path(root) / filename, "w:gz") as archive:
            archive.add(cifar10(tmp_path / "original"), "cifar-10-batches-py")

    from torchvision.datasets import utils

    Path("datasets").mkdir()
    monkeypatch.setattr(utils, "download_url", download)
    assert write("cifar10", images=3).count == 3
    assert downloads == ["c58f30108f718f92721af3b95e74349a"]
    monkeypatch.setattr(utils, "check_integrity", lambda path, md5: path.is_file())
    write("cifar10", images=3, overwrite=True)
    assert len(downloads) == 1

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(utils, "download_url", fail)
    with pytest.raises(OSError, match=r"can't be downloaded \(no route\): fetch and extract it elsewhere"):
        write_dataset.write_dataset("cifar100", tmp_path / "y.beton")


@pytest.mark.parametrize("name", ["../proof", "{folder}/proof"])
def test_an_archive_can_not_write_outside_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "datasets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")

    def download(url: str, root: str, filename: str, md5: str) -> None:
        with tarfile.open(Path(root) / filename, "w:gz") as archive:
            member = tarfile.TarInfo(name.format(folder=tmp_path))
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))

    from torchvision.datasets import utils

    monkeypatch.setattr(utils, "download_url", download)
    with pytest.raises(OSError, match="can't be downloaded"):
        write_dataset.write_dataset("cifar10", tmp_path / "y.beton")
    assert not list(tmp_path.rglob("proof"))


# --- Spirograph


def test_spirograph(write: Write) -> None:
    result = write("spirograph", split="test", images=700)
    numbers = spirograph.numbers(700, "test")
    assert result.count == 700 and result.sizes.tolist() == [[32, 32]] * 700
    np.testing.assert_array_equal(result.labels, numbers[:, :4])
    np.testing.assert_array_equal(result.nuisance, numbers[:, 4:])
    for i in (0, 255, 256, 511, 699):
        picture = spirograph.render(torch.from_numpy(numbers[i : i + 1]))[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(result.image(i) - picture).max() < 0.51
    assert result.info["label_kind"] == "numbers" and result.classes is None
    assert result.info["numbers"] == ["m", "b", "sigma", "red_foreground"] and len(result.info["nuisance"]) == 6
    with pytest.raises(ValueError, match="split"):
        write_dataset.write_dataset("spirograph", result.path.with_name("y.beton"), split="val")


# --- progress


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    assert list(metrics.progress(iter(range(10)), 10)) == list(range(10))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 of 10 images, 0 images/s, 28 s left" and len(lines) == 3


def test_sidecar_names_at_most_a_thousand_files_a_reason(
    source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_dataset, "LISTED", 4)
    put(source, **{f"a__{i}_png": encoded(noise(seed=i), "PNG") for i in range(9)})
    info = json.loads(beton.sidecar(write(source).path).read_text())
    assert info["converted"]["PNG"]["count"] == 9 and len(info["converted"]["PNG"]["files"]) == 4


def test_a_split_that_chooses_nothing_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 4)
    with pytest.raises(ValueError, match="split=test chooses nothing"):
        write_dataset.write_dataset(str(tmp_path / "in"), tmp_path / "x.beton", split="test")
    assert not (tmp_path / "x.beton").exists()
