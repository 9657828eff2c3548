"""Writing data sets: what is stored unchanged, what is converted, what stops the command, and what it leaves behind."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from simclr_ddp import write_dataset as command
from simclr_ddp.data import beton, spirograph
from simclr_ddp.data import convert as convert_module
from simclr_ddp.data import write as write_module
from simclr_ddp.data.beton import Beton
from simclr_ddp.data.convert import Storage, Stored, convert
from simclr_ddp.data.write import write_dataset
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
            write_dataset(str(source), out, **options)
        except BaseException:
            assert not out.parent.exists() or not list(out.parent.iterdir()), "something was left behind"
            raise
        assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json", "x.beton.names"]
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
        stored = convert(data + trailer, Storage())
        assert stored == Stored(beton.Picture(data + trailer, 24, 32, raw=False))


def test_an_mpo_is_a_jpeg() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert convert(data, Storage()) == Stored(beton.Picture(data, 24, 32, raw=False))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Against the eight meanings of the EXIF standard, by hand."""
    upright = np.array(noise(24, 32))
    seen = {  # what is stored so that a viewer shows `upright`
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    data = encoded(Image.fromarray(np.ascontiguousarray(seen)), quality=95, exif=exif(orientation))
    picture, why, *_ = convert(data, Storage(95))
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
    "16 bits": (encoded(Image.fromarray(DEEP), "PNG"), (DEEP >> 8)[..., None].repeat(3, 2), "PNG, I;16, white=65535"),
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
    stored = convert(data, Storage(mode="raw"))
    found = np.frombuffer(stored.picture.data, np.uint8).reshape(stored.picture.height, stored.picture.width, 3)
    assert np.abs(found.astype(int) - pixels).max() <= (4 if name == "CMYK" else 0)
    assert stored.why == why
    picture = convert(data, Storage(100)).picture
    image = Image.open(io.BytesIO(picture.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (picture.width, picture.height))
    assert np.abs(np.array(image).astype(int) - pixels).mean() < 20  # dither and sharp edges blur


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 10}])
def test_a_jpeg_cut_anywhere_is_noticed(options: dict) -> None:
    data = encoded(noise(40, 56), **options)
    for size in range(len(data)):
        with pytest.raises(Exception):  # noqa: B017 - whatever Pillow says
            convert(data[:size], Storage())
        if size % 16 == 0:  # a download that broke off in a file of the full size
            with pytest.raises(Exception):  # noqa: B017
                convert(data[:size] + bytes(len(data)), Storage())


def test_negative_and_infinite_values_are_refused() -> None:
    for array in (np.full((4, 4), -1, np.int32), np.full((4, 4), np.inf, np.float32), np.full((4, 4), np.nan, "f4")):
        with pytest.raises(ValueError, match="without negative and infinite values and NaN"):
            convert(encoded(Image.fromarray(array), "TIFF"), Storage(white=1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_unreadable_exif_block_turns_nothing() -> None:
    data = encoded(noise(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert convert(data, Storage()).picture.data == data


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
    with pytest.raises(ValueError, match=r"split=val: not a folder of .*; choose split=test or split=train"):
        write_dataset(str(source), source / "y.beton", split="val")


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


def test_links(source: Path, write: Write, tmp_path: Path) -> None:
    outside = put(tmp_path / "outside", secret__1_jpg=encoded(noise(9)), file_jpg=encoded(noise(10)))
    put(source, a__1_jpg=encoded(noise(11)))
    (source / "a" / "loop").symlink_to(source)
    (source / "b").symlink_to(outside / "secret")
    (source / "a" / "2.jpg").symlink_to(outside / "file.jpg")
    result = write(source)
    assert result.classes == ["a", "b"] and sorted(result.sizes[:, 0].tolist()) == [9, 10, 11]


def test_names_that_are_no_utf8(
    source: Path, write: Write, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latin-1, from an old disk or archive: folder, image, broken image and suffix."""
    put(source, dog__1_jpg=encoded(noise()))
    latin = os.fsencode(source) + b"/ch\xe2teau"
    os.mkdir(latin)
    for name, data in ((b"\xe9.png", encoded(noise(), "PNG")), (b"\xe8.jpg", BAD["text"]), (b"x.\xe9", b"")):
        Path(os.fsdecode(latin + b"/" + name)).write_bytes(data)
    with pytest.raises(ValueError, match="can't be decoded"):
        write(source)
    result = write(source, on_error="skip")
    assert result.classes == [r"ch\xe2teau", "dog"] and result.labels is not None and sorted(result.labels) == [0, 1]
    printed = capsys.readouterr().out
    assert r"2 classes: ch\xe2teau, dog; 2, 1 images" in printed and r"left out ch\xe2teau/\xe8.jpg" in printed
    assert result.info["converted"]["PNG"]["files"] == [r"ch\xe2teau/\xe9.png"]
    assert r"\udc" not in beton.sidecar(result.path).read_text() and "\\xe9" in str(result.info["ignored"])
    strict = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", strict)
    assert command.main([str(source), str(source.parent / "y.beton"), "on_error=skip"]) == 0
    strict.flush()
    assert rb"left out ch\xe2teau/\xe8.jpg" in strict.buffer.getvalue()  # type: ignore[attr-defined]


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
    put(source, a_jpg=encoded(noise()), bad_jpg=BAD[name])
    with pytest.raises(ValueError, match=r"source/bad\.jpg can't be decoded \(.+\); .* on_error=skip") as caught:
        write(source)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_all_bad_images_are_listed(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    """One list for one pass over a large set, not one error for each start of the command."""
    put(source, a_jpg=encoded(noise()), **{f"bad{i}_jpg": BAD["text"] for i in range(12)}, z_jpg=BAD["truncated"])
    with pytest.raises(ValueError, match=r"13 of 14 images can't be stored: those above; .* on_error=skip"):
        write(source)
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if "can't be decoded" in line]
    assert {line.partition(".jpg")[0].rpartition("/")[2] for line in lines} == {"z", *(f"bad{i}" for i in range(12))}
    assert len(lines) == 13 and shown.err.count("is examined to list all") == 1


def test_a_bad_image_stops_the_command_beyond_those_tried_first(
    source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, **{f"{i}_jpg": encoded(noise(seed=i)) for i in range(8)})
    monkeypatch.setattr(write_module, "PROBED", 4)
    (source / "7.jpg").write_bytes(BAD["truncated"])
    with pytest.raises(ValueError, match=r"source/7\.jpg can't be decoded"):
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
    assert all("can't be decoded" in why or "is a link to nothing" in why for _, why in skipped["files"])
    printed = capsys.readouterr().out
    assert "6 left out" in printed and "left out b/broken.jpg" in printed
    shutil.rmtree(source / "b")
    (source / "b").mkdir()
    with pytest.raises(ValueError, match="no image is left to write"):
        write_dataset(str(source), result.path.with_name("y.beton"), on_error="skip")


DAMAGED = encoded(noise(200, 300), quality=95)
DAMAGED = DAMAGED[: len(DAMAGED) // 2] + b"\xff\xd9"


def test_damaged_jpegs_stop_the_command_or_are_left_out_or_kept(
    source: Path, write: Write, capsys: pytest.CaptureFixture
) -> None:
    put(source, a_jpg=encoded(noise()), b_jpg=DAMAGED)
    Image.open(source / "b.jpg").load()  # Pillow notices nothing
    words = r"source/b\.jpg is a damaged JPEG \(Corrupt JPEG data: premature end of data segment\)"
    with pytest.raises(ValueError, match=rf"{words}; replace it, .*on_error=skip.*on_error=keep"):
        write(source)
    skipped = write(source, on_error="skip")
    assert skipped.count == 1 and skipped.info["skipped"]["files"][0][0] == "b.jpg"
    assert "left out b.jpg" in capsys.readouterr().out
    kept = write(source, on_error="keep", overwrite=True)
    assert kept.count == 2 and DAMAGED in {kept.stored(i).data for i in range(2)}
    assert kept.info["stored"] == {"unchanged": 2, "encoded": 0, "raw": 0}
    damaged = {"count": 1, "files": [["b.jpg", "Corrupt JPEG data: premature end of data segment"]]}
    assert kept.info["damaged"] == damaged and kept.info["skipped"]["count"] == 0
    assert "damaged, but kept: b.jpg: Corrupt JPEG data" in capsys.readouterr().out


def test_damaged_jpegs_are_never_encoded_again(source: Path, write: Write) -> None:
    rotated = encoded(noise(200, 300), quality=95, exif=exif(6))
    put(source, a_jpg=encoded(noise()), b_jpg=rotated[: len(rotated) // 2] + b"\xff\xd9")
    for on_error in ("stop", "keep"):
        with pytest.raises(ValueError, match=r"b\.jpg is a damaged JPEG .*; re-encoding would hide the damage"):
            write(source, on_error=on_error)
    (source / "b.jpg").write_bytes(DAMAGED)
    with pytest.raises(ValueError, match="on_error=keep: mode=raw would hide the damage"):
        write(source, on_error="keep", mode="raw")
    assert write(source, on_error="skip", mode="raw").count == 1
    (source / "b.jpg").write_bytes(BAD["truncated"])  # nothing to keep
    with pytest.raises(ValueError, match=r"b\.jpg can't be decoded"):
        write_dataset(str(source), source.parent / "y.beton", on_error="keep")


def test_only_regular_files_are_opened(source: Path, write: Write) -> None:
    """A named pipe would block for ever, /dev/zero would never end."""
    put(source, a_jpg=encoded(noise()))
    os.mkfifo(source / "pipe")
    kinds = {"pipe": "a named pipe", "/dev/zero": "a device", "nowhere": "a link to nothing"}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(source / "s.jpg"))
        with pytest.raises(ValueError, match=r"source/s\.jpg is a socket, not a file; .* on_error=skip"):
            write(source)
    (source / "s.jpg").unlink()
    for target, kind in kinds.items():
        (source / "b.jpg").symlink_to(target)
        with pytest.raises(ValueError, match=rf"source/b\.jpg is {kind}.*; .* on_error=skip"):
            write(source)
        assert write(source, on_error="skip", overwrite=True).info["skipped"]["count"] == 1
        shutil.rmtree(source.parent / "out")
        (source / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="pipe is a named pipe, not a file"):
        Beton(source / "pipe")


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_lack_of_memory_is_no_fault_of_an_image(
    error: Exception, source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, a_png=encoded(noise(40, 50), "PNG"), b_jpg=encoded(noise()))
    load, empty = ImageFile.ImageFile.load, np.empty

    def failing(image: Any) -> Any:
        if image.size == (50, 40):
            raise error
        return load(image)

    def full(shape: Any, *arguments: Any) -> np.ndarray:
        if shape == 40 * 50 * 16:
            raise MemoryError("Unable to allocate 31.2 KiB")
        return empty(shape, *arguments)

    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(OSError, match=r"out of memory \(.*a\.png: Unable to allocate.*\); free some"):
        write(source, on_error="skip")


def test_a_failing_disk_is_no_fault_of_an_image(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, a_png=encoded(noise(40, 50), "PNG"), b_jpg=encoded(noise()))
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "a.png":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=r"a\.png can.t be read \(Stale file handle\): check its disk"):
        write(source, on_error="skip")


def test_a_file_that_is_too_large_is_not_read(source: Path, write: Write) -> None:
    put(source, a_jpg=encoded(noise()))
    with (source / "b.jpg").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"b\.jpg has 1,099,511,627,776 bytes, more than .*; remove it, set on_err"):
        write(source)
    assert write(source, on_error="skip").count == 1


def test_large_images(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # neither in writing nor in reading
    put(source, a_png=encoded(noise(16, 16), "PNG"), b_jpg=encoded(noise(8, 8)))
    with pytest.raises(ValueError, match=r"a\.png has 16 x 16 = 256 pixels, more than max_pixels=255; .*set max_"):
        write(source, max_pixels=255)
    assert write(source, on_error="skip", max_pixels=255).count == 1
    monkeypatch.setattr(convert_module, "LARGE", 255)
    result = write(source, max_pixels=256, overwrite=True)
    assert {result.image(i).shape for i in range(2)} == {(16, 16, 3), (8, 8, 3)}
    assert "1 images have more than" in capsys.readouterr().err


def test_the_longest_side(source: Path, write: Write) -> None:
    put(source, a_png=encoded(Image.new("RGB", (65501, 2)), "PNG"))
    with pytest.raises(ValueError, match=r"a\.png has 65,501 x 2 pixels, but .* 65,500; set mode=raw \(at most 6"):
        write(source)
    assert write(source, mode="raw").sizes.tolist() == [[2, 65501]]


# --- more than 8 bits


def deep_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of [H, W] or [H, W, 2, 3 or 4], which Pillow can't write."""
    height, width = values.shape[:2]
    kind = {2: 4, 3: 2, 4: 6}[values.shape[2]] if values.ndim == 3 else 0
    rows = values.astype(">u2").reshape(height, -1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def deep_ppm(values: np.ndarray, top: int) -> bytes:
    height, width = values.shape[:2]
    return b"P%d %d %d %d\n" % (6 if values.ndim == 3 else 5, width, height, top) + values.astype(">u2").tobytes()


TWELVE = np.random.default_rng(0).integers(0, 4096, (8, 9, 4)).astype(np.uint16)
TWELVE[0, 0] = 4095
OPAQUE = np.dstack([TWELVE[..., :3], np.full((8, 9), 65535, np.uint16)])
GREY_OPAQUE = np.dstack([TWELVE[..., 0], np.full((8, 9), 65535, np.uint16)])
DEEP_FILES = {
    "grey": (deep_png(TWELVE[..., 0]), TWELVE[..., 0]),
    "RGB": (deep_png(TWELVE[..., :3]), TWELVE[..., :3]),
    "RGBA": (deep_png(OPAQUE), TWELVE[..., :3]),
    "grey and alpha": (deep_png(GREY_OPAQUE), TWELVE[..., 0]),
    "TIFF": (encoded(Image.fromarray(TWELVE[..., 0]), "TIFF"), TWELVE[..., 0]),
    "32-bit TIFF": (encoded(Image.fromarray(TWELVE[..., 0].astype(np.int32)), "TIFF"), TWELVE[..., 0]),
    "float TIFF": (encoded(Image.fromarray(TWELVE[..., 0].astype(np.float32)), "TIFF"), TWELVE[..., 0]),
    "PGM": (deep_ppm(TWELVE[..., 0], 65535), TWELVE[..., 0]),
    "PPM": (deep_ppm(TWELVE[..., :3], 65535), TWELVE[..., :3]),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_twelve_bits_in_sixteen(name: str) -> None:
    """Without the option they are nearly black; with it, all 256 levels are used."""
    data, values = DEEP_FILES[name]
    levels = (values if values.ndim == 3 else values[..., None].repeat(3, 2)).astype(int)
    stored = convert(data, Storage(mode="raw", white=4095))
    found = np.frombuffer(stored.picture.data, np.uint8).reshape(8, 9, 3)
    assert np.abs(found - levels / 4095 * 255).max() <= 1 and "white=4095" in stored.why
    assert stored.range is not None and not stored.range.dim
    with pytest.raises(ValueError, match="more than white=2047; set white=4095"):
        convert(data, Storage(white=2047))
    if "32" in name or "float" in name:
        with pytest.raises(ValueError, match=r"32-bit pixels with values from .* to 4095 and no known range; set w"):
            convert(data, Storage())
    else:
        stored = convert(data, Storage(mode="raw"))
        assert np.array_equal(np.frombuffer(stored.picture.data, np.uint8).reshape(8, 9, 3), levels >> 8)
        assert stored.range is not None and stored.range[:3] == (4095, 65535, 4095) and stored.range.dim


@pytest.mark.parametrize("compression", [1, 5, 32946])  # none, LZW, deflate
def test_twelve_bits_in_a_colour_tiff(compression: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="Pillow can't write such a file, OpenCV is installed with FFCV")
    options = [cv2.IMWRITE_TIFF_COMPRESSION, compression]
    data = cv2.imencode(".tiff", np.ascontiguousarray(TWELVE[..., 2::-1]), options)[1].tobytes()
    stored = convert(data, Storage(mode="raw", white=4095))
    assert np.array_equal(np.frombuffer(stored.picture.data, np.uint8).reshape(8, 9, 3), TWELVE[..., :3] >> 4)


def test_a_file_of_twelve_bits_declares_its_range() -> None:
    stored = convert(deep_ppm(TWELVE[..., 0], 4095), Storage(mode="raw"))
    assert np.array_equal(np.frombuffer(stored.picture.data, np.uint8).reshape(8, 9, 3)[..., 0], TWELVE[..., 0] >> 4)
    assert stored.range is not None and not stored.range.dim


def test_transparency_of_sixteen_bits() -> None:
    data = deep_png(TWELVE[..., 0])
    colour = b"tRNS" + TWELVE[3, 4, :1].astype(">u2").tobytes()
    chunk = struct.pack(">I", 2) + colour + struct.pack(">I", zlib.crc32(colour))
    stored = convert(data[:33] + chunk + data[33:], Storage(mode="raw", white=4095))
    found = np.frombuffer(stored.picture.data, np.uint8).reshape(8, 9, 3)[..., 0]
    assert found[3, 4] == 255 and np.array_equal(found != TWELVE[..., 0] >> 4, TWELVE[..., 0] == TWELVE[3, 4, 0])


def test_the_range_in_use_is_taken_with_a_warning(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    put(source, a_png=deep_png(TWELVE[..., 0]), b_png=deep_png(TWELVE[..., 0] // 16))
    result = write(source, mode="raw")
    assert {result.image(i).max() for i in range(2)} == {255, 15}
    printed = capsys.readouterr().err
    assert "values up to 4095 of 65535 (a.png): white=4095 is used; set white=65535" in printed
    assert "1 images with more than 8 bits use less than a quarter" in printed and "b.png" in printed
    result = write(source, mode="raw", white=65535, overwrite=True)
    assert max(result.image(i).max() for i in range(2)) == 15
    printed = capsys.readouterr().err
    assert "is used" not in printed and "2 images" in printed and "set white=4095" in printed
    put(source, c_png=deep_png(TWELVE[..., 0] * 16))
    assert write(source, mode="raw", overwrite=True).count == 3, "the complete range"
    with pytest.raises(ValueError, match=r"c\.png has pixels with values from .* to 65520, more than white=4095; set"):
        write_dataset(str(source), source.parent / "y.beton", white=4095, on_error="skip")


def test_values_far_from_zero_are_warned_about(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    put(source, a_png=deep_png(TWELVE[..., 0] + 30000))
    write(source, mode="raw")
    assert "a.png has values from 30033 to 34095 of 65535; subtract the smallest" in capsys.readouterr().err


# --- what is refused before anything is written


def test_sources_that_are_none(source: Path, write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source: does not exist; give a folder of images, cifar10"):
        write(source)
    put(source, readme_txt=b"")
    with pytest.raises(ValueError, match=r"source contains no images \(\.jpg, "):
        write(source)
    with pytest.raises(NotADirectoryError, match=r"readme\.txt: is a file"):
        write(source / "readme.txt")
    with pytest.raises(
        ValueError, match="SOURCE is empty, perhaps a variable that is not set; give a folder of images"
    ):
        write("")
    put(source, a_jpg=encoded(noise()), b__c_jpg=encoded(noise()))
    with pytest.raises(ValueError, match=r"has images \(a\.jpg\) and folders of images \(b\)"):
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
        ({"on_error": "ignore"}, "on_error=ignore: unknown value; choose stop or skip or keep"),
        ({"mode": "png"}, "mode=png: unknown value"),
        ({"images": 0}, "images=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            write(source, **options)
    with pytest.raises(ValueError, match=r"does not end in \.beton"):
        write_dataset(str(source), tmp_path / "x.ffcv")


def test_an_existing_file_is_kept(source: Path, write: Write) -> None:
    put(source, a_jpg=encoded(noise()))
    old = write(source).path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=true"):
        write_dataset(str(source), source.parent / "out" / "x.beton")
    assert (source.parent / "out" / "x.beton").read_bytes() == old
    put(source, b_jpg=encoded(noise()))
    assert write(source, overwrite=True).count == 2


def test_too_little_space(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, a_jpg=encoded(noise()))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9_000))
    with pytest.raises(OSError, match=r"out has 0 MB free, but about 0 MB are needed; use another disk"):
        write(source)


def test_the_estimate_covers_the_file(source: Path, write: Write, capsys: pytest.CaptureFixture) -> None:
    put(source, **{f"{i}_jpg": encoded(noise(150, 150 + i % 40, i), quality=95) for i in range(300)})
    result = write(source)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "are free" in line)
    need, size = float(line.split()[1]) * 1e6, result.info["bytes"]
    assert size - 0.5e6 < need < 1.5 * size + 0.5e6, (need, size)


def test_an_interruption_leaves_nothing(source: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, **{f"{i}_jpg": encoded(noise(seed=i)) for i in range(30)})
    regions = beton.sample_regions
    calls = []

    def interrupted(*arguments: Any) -> list[bytes]:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return regions(*arguments)

    monkeypatch.setattr(beton, "sample_regions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source)


def test_leftovers_of_a_killed_run_are_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(source, a_jpg=encoded(noise()))
    put(tmp_path / "out", **{"x.beton_partial-123": b""})
    write_dataset(str(source), tmp_path / "out" / "x.beton")
    assert "x.beton.partial-123 belongs to a run that is still writing or was killed" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="split=val: unknown split of CIFAR10"):
        write_dataset(str(tmp_path / "data"), tmp_path / "y.beton", split="val")


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
                refusal = rf"{name} (is not a CIFAR file|does not contain|names no classes)"
                with pytest.raises(ValueError, match=refusal):
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
        with pytest.raises(ValueError, match=r"data_batch_5 .*; extract the archive again"):
            write(folder)
    (folder / "data_batch_5").write_bytes(b"\x80\x02}q\x00(")
    with pytest.raises(ValueError, match="data_batch_5 is not a CIFAR file"):
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
    with pytest.raises(OSError, match=r"can't be downloaded \(no route\); download and extract it elsewhere"):
        write_dataset("cifar100", tmp_path / "y.beton")


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
        write_dataset("cifar10", tmp_path / "y.beton")
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
        write_dataset("spirograph", result.path.with_name("y.beton"), split="val")


def test_sidecar_names_at_most_a_thousand_files_a_reason(
    source: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "LISTED", 4)
    put(source, **{f"{i}_png": encoded(noise(seed=i), "PNG") for i in range(9)})
    info = json.loads(beton.sidecar(write(source).path).read_text())
    assert info["converted"]["PNG"]["count"] == 9 and len(info["converted"]["PNG"]["files"]) == 4


def test_a_split_that_chooses_nothing_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 4)
    with pytest.raises(ValueError, match=r"split=test: .* is not divided into splits"):
        write_dataset(str(tmp_path / "in"), tmp_path / "x.beton", split="test")
    assert not (tmp_path / "x.beton").exists()


def test_names_of_the_files_are_kept_in_the_order_of_the_images(write: Write, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "source", 12, classes=3)
    (folder / "class1" / "0001.jpg").write_bytes(b"broken")
    written = write(folder, on_error="skip")
    names = written.names()
    assert names is not None and written.labels is not None and len(names) == 11 and "class1/0001.jpg" not in names
    for i, name in enumerate(names):
        assert name.startswith(f"class{written.labels[i]}/")
        assert written.stored(i).data == (folder / name).read_bytes()
