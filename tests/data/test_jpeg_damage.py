"""Damaged JPEGs that Pillow decodes without a word are recognised, and good ones are not."""

import ctypes
import io
import os
import random
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ddp.data.convert import Storage, convert
from simclr_ddp.data.deep_pixels import Refused
from simclr_ddp.data.jpeg_damage import damage, unavailable

ARCHIVES = Path(os.environ.get("SIMCLR_DATA", Path(__file__).parents[3] / "shared" / "data"))


def jpeg(width: int, height: int, seed: int, mode: str = "RGB", **options: object) -> bytes:
    """A JPEG of smooth structures and noise, about as hard to compress as a photograph."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse) + random.normal(0, 9, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


VARIANTS = [
    {"quality": 90},
    {"quality": 40, "subsampling": 2},
    {"quality": 75, "progressive": True},
    {"mode": "L"},
    {"quality": 85, "optimize": True, "subsampling": 1},
    {"quality": 95, "restart_marker_blocks": 4},
]


def test_pillows_libjpeg_can_be_called() -> None:
    assert unavailable() == ""


def test_good_jpegs_are_not_damaged() -> None:
    for i, options in enumerate(VARIANTS):
        for size in ((1, 1), (8, 300), (97, 61)):
            assert damage(jpeg(*size, i, **options)) == "", (options, size)  # type: ignore[arg-type]
    extreme = np.where(np.indices((64, 64)).sum(0) % 2, 255, 0).astype(np.uint8)  # the largest coefficients
    for pixels in (extreme, np.kron(extreme[:8, :8], np.ones((8, 8), np.uint8)), np.zeros_like(extreme), 255 | extreme):
        for quality in (1, 50, 100):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
            assert damage(buffer.getvalue()) == ""


@pytest.mark.parametrize("name", ["imagenet-sample.tar", "tiny-imagenet-subset.tar.gz"])
def test_photographs_by_others_are_not_damaged(name: str) -> None:
    if not (ARCHIVES / name).is_file():
        pytest.skip(f"{name} is not there: SIMCLR_DATA names its folder")
    with tarfile.open(ARCHIVES / name) as tar:
        files = islice((tar.extractfile(m) for m in tar if m.name.endswith(".JPEG")), 200)
        assert [words for file in files if file and (words := damage(file.read()))] == []


def test_what_is_wrong_is_named() -> None:
    data = jpeg(97, 61, 0)
    third = len(data) // 3
    assert "premature end" in damage(data[: 2 * third] + b"\xff\xd9")
    assert "Premature end" in damage(data[:-2])
    assert "extraneous bytes" in damage(data[:-2] + bytes(64) + data[-2:])
    assert damage(data[:third] + bytes(third) + data[2 * third :])
    assert damage(data.replace(b"\xff\xc0", b"\xff\xc3")), "an error after which libjpeg can't go on"


def test_a_missing_colour_is_damage() -> None:
    """The header declares three components, of which the data have one."""
    grey = jpeg(97, 61, 0, "L")
    i = grey.index(b"\xff\xc0")
    three = b"\x00\x11" + grey[i + 4 : i + 9] + b"\x03" + b"".join(bytes([k, 0x11, 0]) for k in (1, 2, 3))
    lone = grey[: i + 2] + three + grey[i + 13 :]
    assert Image.open(io.BytesIO(lone)).convert("RGB").getextrema()
    assert damage(lone) == "it has no data of one of its colour components"


def test_large_coefficients_are_damage() -> None:
    """A bit of one coefficient changes the mean of all later blocks, which no warning tells: here beyond any image."""
    found = set()
    data = jpeg(97, 61, 0, "L", quality=30)
    for i in range(len(data) - 200, len(data) - 2):
        for bit in range(8):
            changed = data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
            found.add(damage(changed))
    assert "it has coefficients that no image has" in found


@pytest.mark.parametrize("name", ["string_at", "create_string_buffer"])
def test_a_lack_of_memory_is_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread does not end without a word; no exception leaves a call by libjpeg."""
    data = jpeg(97, 61, 0)
    assert unavailable() == ""

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ctypes, name, full)
    if name == "string_at":
        with pytest.raises(MemoryError):
            damage(data)
    else:
        assert damage(data.replace(b"\xff\xc0", b"\xff\xc3")) == "libjpeg can't continue"
    monkeypatch.undo()
    assert damage(data) == ""


def mutants(data: bytes, draw: random.Random, count: int) -> list[bytes]:
    """Copies of a file with a bit, a byte or a range of bytes changed, lost, doubled, exchanged or cut off."""
    result = []
    for _ in range(count):
        copy, i = bytearray(data), draw.randrange(2, len(data) - 2)
        length = min(draw.choice([1, 2, 16, 128, 512]), len(data) - 2 - i)
        kind = draw.randrange(8)
        if kind == 0:
            copy[i] ^= 1 << draw.randrange(8)
        elif kind == 1:
            copy[i] = draw.randrange(256)
        elif kind == 2:
            copy[i : i + length] = bytes(length)
        elif kind == 3:
            copy[i : i + length] = b"\xff" * length
        elif kind == 4:
            del copy[i : i + length]
        elif kind == 5:
            copy[i:i] = copy[i : i + length]
        elif kind == 6:
            j = draw.randrange(2, len(data) - 2 - length) if len(data) > length + 4 else i
            copy[i : i + length], copy[j : j + length] = copy[j : j + length], copy[i : i + length]
        else:
            copy = copy[:i] + b"\xff\xd9"
        result.append(bytes(copy))
    return result


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.filterwarnings("ignore")
def test_mutants_with_wrong_pixels_are_hardly_ever_stored() -> None:
    """Of 1,200 mutants Pillow decodes about half with over 5 % of wrong pixels. What remains of these is valid data.

    No decoder can know of a changed table of quantisation, or of a changed coefficient in a file that is in step again
    before its end.
    """
    draw, outcome = random.Random(0), Counter[str]()
    for i, options in enumerate(VARIANTS):
        original = jpeg(120, 88, i, **options)  # type: ignore[arg-type]
        right = pixels(original)
        for mutant in mutants(original, draw, 200):
            try:
                found = pixels(mutant)
            except Exception:
                continue  # Pillow rejects it itself
            wrong = found.shape != right.shape or (abs(found - right).max(2) > 8).mean() > 0.05
            if not wrong:
                continue
            try:
                assert convert(mutant, Storage()).picture.data == mutant
                outcome["stored"] += 1
            except Refused:
                outcome["refused"] += 1
    assert sum(outcome.values()) > 400 and outcome["stored"] < 0.1 * sum(outcome.values()), outcome
