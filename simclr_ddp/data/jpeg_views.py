"""Compiled code for FFCV's pipeline that decodes JPEGs and cuts views, bit for bit those of the torch loader.

TurboJPEG decodes. The resize is Pillow's bilinear filter in 8-bit fixed point, as in `crops.resize_crop`: a triangle as
wide as the reduction with 22-bit weights, first along the rows, then along the columns, each result rounded to 8 bits.
The pass along the rows dominates the time; it is written as vector instructions with eight lanes (two rows of four
bytes): 0.13 ms instead of 0.5 ms from 310 x 310 to 224 x 224 pixels.

The compiled code is cached on disk and rebuilt when this file changes, so everything compiled together is in this file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic


def _compiled(function: Callable) -> Any:
    """Compile without the GIL; cache on disk if a cache folder is writable."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


BITS = 22  # fractional bits of a weight
HALF = 1 << (BITS - 1)


@_compiled
def _weights(start: int, extent: int, length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights that resize [start, start + extent) of a row of `length` pixels to `size` pixels.

    first, count  int64 [size]        range of input pixels
    weight        int32 [size, taps]  in units of 2^-22
    """
    scale = extent / size
    support = max(scale, 1.0)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weight = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.int32)
    triangle = np.empty(weight.shape[1])
    for x in range(size):
        centre = start + (x + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        total = 0.0
        for t in range(high - low):
            distance = abs((t + low - centre + 0.5) * (1.0 / support))
            triangle[t] = 1.0 - distance if distance < 1.0 else 0.0
            total += triangle[t]
        for t in range(high - low):
            weight[x, t] = int(0.5 + triangle[t] * (1.0 / total) * (1 << BITS))
        first[x], count[x] = low, high - low
    return first, count, weight


@intrinsic
def _mix_two_rows(
    typing_context: Any, source: Any, pitch: Any, weights: Any, taps: Any, target: Any, target_pitch: Any
) -> Any:
    """Write the sum of weights[t] * pixel t of two rows to the addresses `target` and `target + target_pitch`.

    The rows begin at the addresses `source` and `source + pitch`. Four bytes are read and written per 3-byte pixel.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, pitch, weights, taps, target, target_pitch = arguments
        byte, word = ir.IntType(8), ir.IntType(32)
        four, eight, lanes = ir.VectorType(byte, 4), ir.VectorType(byte, 8), ir.VectorType(word, 8)

        def constant(values: list[int]) -> ir.Constant:
            return ir.Constant(ir.VectorType(word, len(values)), values)

        def load_pixel(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, four.as_pointer()), align=1)

        undefined = ir.Constant(lanes, ir.Undefined)
        weight_at = builder.inttoptr(weights, word.as_pointer())
        total = cgutils.alloca_once_value(builder, constant([HALF] * 8))
        with cgutils.for_range(builder, taps) as loop:
            at = builder.add(source, builder.mul(loop.index, ir.Constant(loop.index.type, 3)))
            pixels = builder.shuffle_vector(
                load_pixel(at), load_pixel(builder.add(at, pitch)), constant([0, 1, 2, 3, 4, 5, 6, 7])
            )
            weight = builder.load(builder.gep(weight_at, [loop.index]))
            weight = builder.insert_element(undefined, weight, ir.Constant(word, 0))
            weight = builder.shuffle_vector(weight, undefined, constant([0] * 8))
            product = builder.mul(builder.zext(pixels, lanes), weight)
            builder.store(builder.add(builder.load(total), product), total)
        mixed = builder.trunc(builder.lshr(builder.load(total), constant([BITS] * 8)), eight)
        for row, address in enumerate((target, builder.add(target, target_pitch))):
            pixel = builder.shuffle_vector(
                mixed, ir.Constant(eight, ir.Undefined), constant([4 * row + i for i in range(4)])
            )
            builder.store(pixel, builder.inttoptr(address, four.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


@_compiled
def _along_rows(image: np.ndarray, start: int, extent: int, size: int) -> np.ndarray:
    """Resize pixels [start, start + extent) of each row to `size`: uint8 [H, 3 size + 1] with a byte of padding."""
    height, width, _ = image.shape
    first, count, weight = _weights(start, extent, width, size)
    out = np.empty((height, 3 * size + 1), np.uint8)
    pitch, out_pitch, weight_pitch = 3 * width, 3 * size + 1, 4 * weight.shape[1]
    for pair in range(0, height, 2):
        row = max(0, min(pair, height - 2))  # an odd last row is computed with the previous one
        step = int(height > 1)
        source, target = image.ctypes.data + row * pitch, out.ctypes.data + row * out_pitch
        for x in range(size):
            _mix_two_rows(  # type: ignore[call-arg]
                source + 3 * first[x],
                step * pitch,
                weight.ctypes.data + x * weight_pitch,
                count[x],
                target + 3 * x,
                step * out_pitch,
            )
    return out


@_compiled
def resize_crop(image: np.ndarray, box: np.ndarray, out: np.ndarray) -> None:
    """Write the result of `crops.resize_crop` to `out`.

    image  uint8 [H, W, 3], contiguous; the byte after its last one must be readable
    box    int [4]: top, left, height, width
    out    uint8 [size, size, 3], contiguous
    """
    size = out.shape[0]
    top, left, height, width = box[0], box[1], box[2], box[3]
    margin = int(np.ceil(max(height / size, 1.0))) + 1
    above, below = max(0, top - margin), min(image.shape[0], top + height + margin)
    rows = _along_rows(image[above:below], left, width, size)
    first, count, weight = _weights(top - above, height, below - above, size)
    total = np.empty(3 * size, np.int32)
    for y in range(size):
        total[:] = HALF
        for t in range(count[y]):
            row, w = rows[first[y] + t], weight[y, t]
            for j in range(3 * size):
                total[j] += np.int32(row[j]) * w
        target = out[y].reshape(3 * size)
        for j in range(3 * size):
            target[j] = total[j] >> BITS


def _c_function(returns: types.Type, *parameters: types.Type) -> Any:
    """Return call(address, arguments) for compiled code: a C function of which only the types are compiled in.

    The address differs between processes, while the compiled code is cached for all.
    """

    @intrinsic
    def call(typing_context: Any, address: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind = ir.FunctionType(context.get_value_type(returns), [context.get_value_type(t) for t in parameters])
            given = cgutils.unpack_tuple(builder, values[1])
            given = [context.cast(builder, *value) for value in zip(given, arguments.types, parameters, strict=True)]
            return builder.call(builder.inttoptr(values[0], kind.as_pointer()), given)

        return returns(types.intp, arguments), generate

    return call


_int, _address, _long = types.intc, types.intp, types.ulong
TURBOJPEG = ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy")
_tj_init = _c_function(_address)
_tj_header = _c_function(_int, _address, _address, _long, *[_address] * 4)
_tj_decompress = _c_function(_int, _address, _address, _long, _address, *[_int] * 5)
_tj_destroy = _c_function(_int, _address)


@_compiled
def cut_views_of(index: Any, memory: Any, metadata: Any, storage: Any) -> None:
    """Decode the images `index` and cut the boxes of their views.

    memory    (views, boxes, failed) of `ffcv_loader.ViewLoader.cut`, and int64 addresses of the TURBOJPEG functions
    metadata  rows of the file: mode, height, width, data_ptr
    storage   (uint8 bytes of the file, uint64 pointers, uint64 lengths of their data)
    """
    views, boxes, failed, functions = memory
    init, header, decompress, destroy = functions[0], functions[1], functions[2], functions[3]
    content, pointers, lengths = storage
    largest = np.int64(0)
    for sample in index:
        if metadata[sample]["mode"] == 0:
            size = 3 * np.int64(metadata[sample]["height"]) * np.int64(metadata[sample]["width"])
            largest = max(largest, size)
    decoded = np.empty(largest + 1, np.uint8)  # resize_crop reads one more byte
    found = np.empty(4, np.int32)  # width, height, subsampling, colour space
    width_at, pixels_at = found.ctypes.data, decoded.ctypes.data
    handle = _tj_init(init, ())
    for i in range(len(index)):
        row = metadata[index[i]]
        height, width, pointer = np.int64(row["height"]), np.int64(row["width"]), row["data_ptr"]
        length = lengths[np.searchsorted(pointers, pointer)]
        data = content[pointer : pointer + length]
        image = data
        if row["mode"] == 0:
            at = data.ctypes.data
            failed[i] = (
                _tj_header(header, (handle, at, length, width_at, width_at + 4, width_at + 8, width_at + 12)) != 0
                or found[0] != width
                or found[1] != height
                or _tj_decompress(decompress, (handle, at, length, pixels_at, width, 3 * width, height, 0, 0)) != 0
            )
            image = decoded[: 3 * height * width]
        if not failed[i]:
            pixels = image.reshape(height, width, 3)
            for view in range(boxes.shape[1]):
                resize_crop(pixels, boxes[i, view], views[i, view])
    _tj_destroy(destroy, (handle,))
