"""What is wrong with a JPEG that decoders accept: data that are missing, left over, or impossible.

Decoders only warn about damaged data and go on, so the pixels after the damage are wrong; Pillow hides the warnings.
This module calls the libjpeg that Pillow is linked with, through ctypes, and lets it read all coefficients (half of the
time of a decode). Its warnings count, and so do coefficients that no image has. What no decoder can know: a file whose
data were changed into other valid data, such as another quantisation table, or a bit of one coefficient.
"""

import ctypes
import threading
from ctypes import addressof, byref, c_char, c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong, c_void_p
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, _imaging

# The largest coefficients of 8-bit pixels: 1,024 for the mean of a block and 929 for the others, which some encoders
# exceed by a quarter to avoid ringing. Encoders may round by up to one step of the quantisation.
LARGEST = np.array([1024] + [1160] * 63)

_Call = ctypes.CFUNCTYPE(None, c_void_p)
_Format = ctypes.CFUNCTYPE(None, c_void_p, c_char_p)
_Rows = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_uint, c_uint, c_int)


class _Errors(ctypes.Structure):
    """libjpeg's struct jpeg_error_mgr."""

    _fields_ = [
        *((name, c_void_p) for name in ("error_exit", "emit_message", "output_message", "format_message", "reset")),
        ("code", c_int),
        ("numbers", c_int * 20),
        ("trace_level", c_int),
        ("warnings", c_long),
        ("tables", c_void_p * 8),
    ]


class _Decoder:
    """libjpeg's struct jpeg_decompress_struct, of which a few fields are read; 64-bit ABI, versions 6b to 9."""

    def __init__(self, library: Any, error_exit: Any, output_message: Any) -> None:
        self.errors, self._memory = _Errors(), (c_char * 4096)()
        self._kept = _Call(error_exit), _Call(output_message)
        library.jpeg_std_error(byref(self.errors))
        self.errors.error_exit, self.errors.output_message = (ctypes.cast(call, c_void_p).value for call in self._kept)
        self.address = c_void_p(addressof(self._memory))
        self._pointer(0).value = addressof(self.errors)

    def _pointer(self, offset: int) -> Any:
        return c_void_p.from_buffer(self._memory, offset)

    def message(self) -> str:
        text = ctypes.create_string_buffer(400)
        _Format(self.errors.format_message)(self.address, text)
        return text.value.decode("ascii", "replace")

    def size(self) -> tuple[int, int, int]:
        """Width, height and number of components."""
        return tuple(c_uint.from_buffer(self._memory, offset).value for offset in (48, 52, 56))  # type: ignore[return-value]

    def fault(self, coefficients: int) -> str:
        """Return "" if every component has coefficients, and none is larger than those of any image."""
        access = _Rows(_pointer_at(self._pointer(8).value + 8 * 8))
        for component in range(self.size()[2]):
            at = self._pointer(304).value + 96 * component
            width, height = (c_uint.from_address(at + offset).value for offset in (28, 32))  # in blocks
            if not _pointer_at(at + 80):
                return "it has no data of one of its colour components"
            steps = np.frombuffer(ctypes.string_at(_pointer_at(at + 80), 128), np.uint16)
            array = _pointer_at(coefficients + 8 * component)
            rows = [_pointer_at(access(self.address, array, y, 1, 0)) for y in range(height)]
            stride = rows[1] - rows[0] if height > 1 else 0
            if rows != [rows[0] + y * stride for y in range(height)]:  # above a GB, libjpeg's memory is in chunks
                continue
            memory = np.frombuffer(ctypes.string_at(rows[0], stride * (height - 1) + 128 * width), np.int16)
            blocks = np.lib.stride_tricks.as_strided(memory, (height, width, 64), (stride, 128, 2))
            extreme = np.maximum(blocks.max((0, 1)).astype(np.int64), -blocks.min((0, 1)).astype(np.int64))
            if ((extreme - 1) * steps > LARGEST).any():
                return "it has coefficients that no image has"
        return ""


def _pointer_at(address: int) -> int:
    return c_void_p.from_address(address).value or 0


@lru_cache(1)
def _library() -> tuple[Any, int, int]:
    """Pillow's libjpeg, its version, and the size of its main structure. Raises OSError or AttributeError without."""
    library = ctypes.CDLL(_imaging.__file__)  # its symbols include those of the libraries that it is linked with
    library.jpeg_std_error.restype = library.jpeg_read_coefficients.restype = c_void_p
    # jpeg_CreateDecompress first compares both numbers with its own. These errors may return.
    expected: list[int] = []
    decoder: _Decoder = _Decoder(library, lambda _: expected.append(decoder.errors.numbers[0]), lambda _: None)
    library.jpeg_CreateDecompress(decoder.address, 0, c_size_t(0))
    return library, expected[0], expected[1]


@lru_cache(1)
def unavailable() -> str:
    """Return "" if `damage` works here, else why not: it must find a damaged JPEG, and nothing in a good one."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    with BytesIO() as file:
        Image.fromarray(noise).save(file, "JPEG")
        good = file.getvalue()
    try:
        works = not damage(good, (40, 24, 3)) and "premature end" in damage(good[:-200] + b"\xff\xd9", (40, 24, 3))
    except (OSError, AttributeError, LookupError) as error:
        return str(error)
    return "" if works else "its libjpeg has another ABI"


def damage(data: bytes, size: tuple[int, int, int] | None = None) -> str:
    """Return what is wrong with a JPEG that Pillow decodes, in libjpeg's words, or "" for nothing.

    size  expected width, height and number of components
    """
    library, version, struct_size = _library()
    found: list[str] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        def fatal(_: int) -> None:
            # libjpeg continues into undefined behaviour if this returns, and C's longjmp is out of reach: this thread
            # never continues. It is rare: what libjpeg can't decode, Pillow couldn't either.
            found.insert(0, "libjpeg can't continue")
            try:
                found[0] = decoder.message()
            finally:
                done.set()
                threading.Event().wait()

        try:
            decoder: _Decoder = _Decoder(library, fatal, lambda _: found.append(decoder.message()))
            library.jpeg_CreateDecompress(decoder.address, version, c_size_t(struct_size))
            library.jpeg_mem_src(decoder.address, data, c_ulong(len(data)))
            library.jpeg_read_header(decoder.address, 1)
            if size is not None and decoder.size() != size:
                found.append(f"it is {decoder.size()}, not {size}")
            else:
                coefficients = library.jpeg_read_coefficients(decoder.address)
                if not found and (fault := decoder.fault(coefficients)):
                    found.append(fault)
            library.jpeg_destroy_decompress(decoder.address)
        except BaseException as error:
            errors.append(error)
        done.set()

    thread = threading.Thread(target=read, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # "can't start new thread"
        raise MemoryError(str(error)) from error
    while not done.wait(1):
        if not thread.is_alive():
            raise MemoryError("a thread ended early")
    if errors:
        raise errors[0]
    if found and found[0].startswith("Insufficient memory"):
        raise MemoryError(found[0])
    return found[0] if found else ""
