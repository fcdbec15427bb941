"""deform_conv2d on a GPU: matrix products whose one factor is sampled on the way. See kernels_cu/deform_conv2d.cuh.

Input and grad_output are read channels last, in whole 16 bytes; others are packed first, as many images at a time as
fit the workspace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import dtypes, launch, sources
from ..dtypes import DTYPES, arithmetic
from ..geometry import Convolution, ceil_div
from ..launch import Kernel, address, strides
from . import sort
from .sort import Segments

_THREADS = sources.constant("tile.cuh", "THREADS")
_ROWS = sources.constant("deform_conv2d.cuh", "ROWS")
_WEIGHT_OUTS = sources.constant("deform_conv2d_backward", "WEIGHT_OUTS")
_WEIGHT_CHANNELS = sources.constant("deform_conv2d_backward", "WEIGHT_CHANNELS")
_SOURCES = {
    "forward": "deform_conv2d",
    "pack": "deform_conv2d",
    "count": "deform_conv2d_backward_input",
    "records": "deform_conv2d_backward_input",
    "backward_input": "deform_conv2d_backward_input",
}
_STEP = 64  # bytes of k in one step of a product
_SMALL = 8  # channels or outs of the groups that share a tile
_RUN = 1 << 14  # the most products of the weight's gradient that are summed in float32
_LONG = 1 << 15  # the most products that a tile of 128 outs sums, in one float32 sum: it loses less than half types do
_BLOCKS = 512  # of threads, which is enough to fill a GPU
_SUMMANDS = 64  # of the bias's gradient that one thread sums in float32
_CONVOLUTION = sources.Struct("deform_conv2d.cuh", "Convolution")
_PACKING = sources.Struct("deform_conv2d", "Packing")
_SPLITS = sources.Struct("deform_conv2d_backward", "Splits")
_WEIGHTS = sources.Struct("deform_conv2d_backward", "Weights")
_PIXELS = sources.Struct("deform_conv2d_backward", "Pixels")


def kernels() -> list[Kernel]:
    """Every instance that this operator can launch."""
    found = [_kernel(name, t) for name in ("pack", "count", "records", "add_splits") for t in DTYPES]
    for name in ("forward", "backward_input"):
        found += [_kernel(name, t, outs) for t in DTYPES for outs in _outs(t)] + [_kernel(name, "tf32", 64)]
    for name in ("backward_offset", "backward_weight"):
        found += [_kernel(name, t, grouped) for t in DTYPES for grouped in (False, True)]
        found.append(_kernel(name, "tf32", False))
    found += [_pixel_sums(*pair) for t in DTYPES for pair in {(t, "float64"), ("float64", t)}]
    return found + sort.kernels()


def forward(g: Convolution, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    out, input, offset, mask = g.nchw(out, input, offset, mask)
    with launch.device(out) as device:
        call = _Call(g, device, input, offset, mask)
        weight = call.weights(weight)
        bias = None if bias is None else device.xp.ascontiguousarray(bias)
        # out[o, q] = bias[o] + sum over c, k of weight[o, c, k] * mask[k, q] * bilinear(input[c], place[k, q])
        for images in call.chunks(call.input_rows.bytes(input)):
            call.forward(images, call.input_rows.packed(input[images]), weight, bias, out[images])


def backward(
    g: Convolution, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    grad_input, grad_offset, grad_mask = g.nchw(grad_input, grad_offset, grad_mask)
    grad_output, input, offset, mask = g.nchw(grad_output, input, offset, mask)
    if grad_input is not None and grad_input.size == 0:
        grad_input = None
    with launch.device(grad_output) as device:
        call = _Call(g, device, input, offset, mask)
        of_samples = grad_offset is not None or grad_mask is not None
        if of_samples or grad_input is not None:
            turned = call.turned(weight)
        if grad_weight is not None:
            totals = device.empty(grad_weight.shape, np.float64)
        scratch = call.input_rows.bytes(input) + call.output_rows.bytes(grad_output)
        for images in call.chunks(scratch, grad_input is not None):
            rows = call.output_rows.packed(grad_output[images]), call.input_rows.packed(input[images])
            if of_samples:  # sums over c of (weight^T grad_output)[c, k] * value, and * slope * mask
                call.backward_offset(images, rows, turned, grad_offset, grad_mask)
            if grad_weight is not None:  # sums over pixels of grad_output[o] * sample[c, k]
                call.backward_weight(images, rows, grad_weight, totals)
            if grad_input is not None:  # weight^T times the sums of grad_output over the samples that touch a pixel
                call.backward_input(images, rows[0], turned, grad_input[images])
        if grad_bias is not None:
            _sum_pixels(device, grad_output, grad_bias)


class _Rows:
    """How channels lie in packed images (n, H, W, parts, depth): parts of equal size, with zeros up to 16 bytes."""

    def __init__(self, device: Any, parts: int, part: int, itemsize: int) -> None:
        self.device, self.parts, self.part = device, parts, part
        self.depth = ceil_div(part, 16 // itemsize) * (16 // itemsize)

    def are(self, images: Any, dtype: Any) -> bool:
        """Whether (n, C, H, W) images are packed as they are."""
        contiguous = images.transpose(0, 2, 3, 1).flags.c_contiguous
        return bool(self.depth == self.part and contiguous and address(images) % 16 == 0 and images.dtype == dtype)

    def bytes(self, images: Any, dtype: Any = None) -> int:
        """What packing takes for one image, as `dtype` if not its own."""
        dtype = np.dtype(dtype or images.dtype)
        return 0 if self.are(images, dtype) else math.prod(images.shape[2:]) * self.parts * self.depth * dtype.itemsize

    def empty(self, images: Any, dtype: Any) -> Any:
        n, _, height, width = images.shape
        return self.device.empty((n, height, width, self.parts, self.depth), dtype)

    def packed(self, images: Any) -> Any:
        if images.size == 0:  # nothing is read, but there is an address to count from
            return self.device.empty((1,), images.dtype)
        if self.are(images, images.dtype):
            return images
        packed = self.empty(images, images.dtype)
        n, _, height, width = images.shape
        grid = ceil_div(n * height * width, 32) * ceil_div(self.parts * self.depth, 32)
        packing = _PACKING(images=n, height=height, width=width, part=self.part, depth=self.depth, parts=self.parts)
        kernel = _kernel("pack", dtypes.name(images))
        self.device.launch(kernel, grid, (32, _THREADS // 32), images, strides(images), packed, packing)
        return packed


class _Call:
    """How one call is cut into tiles, and its launches."""

    def __init__(self, g: Convolution, device: Any, input: Any, offset: Any, mask: Any) -> None:
        self.g, self.device = g, device
        self.dtype, self.sums = dtypes.name(input), arithmetic(input)
        self.factors = self.dtype  # of the products
        self.offset, self.mask = offset, mask
        self.group_channels, self.group_outs = g.channels // g.groups, g.out_channels // g.groups
        # A part is channels of one group and one offset group. A bundle is outs that share a product: those of a group,
        # or of several small groups, whose parts are then all their channels.
        size, in_offset_group = max(self.group_channels, self.group_outs), g.channels // g.offset_groups
        self.grouped = g.groups > 1 and size <= _SMALL and in_offset_group % self.group_channels == 0
        if self.grouped:
            groups, most = in_offset_group // self.group_channels, _STEP // input.itemsize // size
            part = self.group_channels * next(n for n in range(most, 0, -1) if groups % n == 0)
            self.bundles = g.channels // part
        else:
            part = math.gcd(self.group_channels, in_offset_group)
            self.bundles = g.groups
            if self.dtype == "float32" and launch.tf32():
                self.factors = "tf32"
        self.bundle_outs = g.out_channels // self.bundles
        self.input_rows = _Rows(device, g.channels // part, part, input.itemsize)
        self.output_rows = _Rows(device, self.bundles, self.bundle_outs, input.itemsize)

    def weights(self, weight: Any) -> Any:
        """(C_out, bundle_parts, taps, depth), or (C_out, taps, C_in / groups) where groups are small."""
        if self.grouped:
            return self._by_tap(weight)
        part = self.input_rows.part
        split = weight.reshape(self.g.out_channels, -1, part, self.g.taps)
        return self._padded(split.transpose(0, 1, 3, 2), self.input_rows.depth)

    def turned(self, weight: Any) -> Any:
        """(parts, part, taps, out_depth), or as `weights` where groups are small."""
        if self.grouped:
            return self._by_tap(weight)
        by_group = weight.reshape(self.g.groups, self.group_outs, self.group_channels, self.g.taps)
        return self._padded(by_group.transpose(0, 2, 3, 1), self.output_rows.depth)

    def _by_tap(self, weight: Any) -> Any:
        by_channel = weight.reshape(self.g.out_channels, self.group_channels, self.g.taps)
        return self.device.xp.ascontiguousarray(by_channel.transpose(0, 2, 1))

    def _padded(self, array: Any, depth: int) -> Any:
        if array.shape[-1] == depth:
            return self.device.xp.ascontiguousarray(array)
        padded = self.device.xp.zeros((*array.shape[:-1], depth), array.dtype)
        padded[..., : array.shape[-1]] = array
        return padded

    def chunks(self, image_bytes: int, of_input: bool = False) -> Iterator[slice]:
        """Slices of the batch that fit the workspace, at `image_bytes` each, and whose pixels and blocks an int counts.

        `of_input` adds what its gradient takes.
        """
        g, largest = self.g, launch.LARGEST_GRID // 2  # a slice's last tile may be nearly empty
        blocks = max(self.bundles * self._out_tiles(64), g.offset_groups * g.taps) * ceil_div(g.out_pixels, _ROWS)
        pixels = g.out_pixels
        if of_input:
            pixels = max(pixels, (g.height + 1) * (g.width + 1))
            blocks = max(blocks, self.input_rows.parts * ceil_div(self.input_rows.part, 64) * ceil_div(pixels, _ROWS))
        if max(blocks, pixels) > largest:
            raise ValueError(
                f"deform_conv2d: on CUDA one image must have fewer than 2**30 pixels, and take fewer than 2**30 blocks "
                f"of threads, got {pixels} and {blocks}"
            )
        most = min(launch.WORKSPACE // max(1, image_bytes), largest // max(blocks, pixels))
        if of_input:
            most = min(most, self._segments().at_a_time("deform_conv2d", sort.record_bytes(self.sums), image_bytes))
        step = max(1, min(g.batch, most))
        return (slice(n, min(n + step, g.batch)) for n in range(0, g.batch, step))

    def forward(self, images: slice, input: Any, weight: Any, bias: Any, out: Any) -> None:
        parts = self.input_rows.parts // self.bundles
        outs = self._tile(self.bundle_outs, parts * self.g.taps * self.input_rows.depth)
        grid = self._pixel_tiles(images) * self.bundles * (self._out_tiles(outs) if outs else 1)
        kernel = _kernel("forward", self.factors, outs)
        self.device.launch(
            kernel, grid, (_THREADS, 1), input, *self._places(images), weight, bias, out, strides(out),
            self._convolution(images),
        )  # fmt: skip

    def backward_offset(
        self, images: slice, rows: tuple[Any, Any], turned: Any, grad_offset: Any, grad_mask: Any
    ) -> None:
        """The gradients of offset and mask."""
        grad_offset, grad_mask = (None if grad is None else grad[images] for grad in (grad_offset, grad_mask))
        grid = self._pixel_tiles(images) * self.g.offset_groups * self.g.taps
        self.device.launch(
            _kernel("backward_offset", self.factors, self.grouped), grid, (_THREADS, 1), *rows, *self._places(images),
            turned, grad_offset, strides(grad_offset), grad_mask, strides(grad_mask), self._convolution(images),
        )  # fmt: skip

    def _segments(self) -> Segments:
        """The samples of one image that are sorted apart: those of an offset group and tap."""
        g = self.g
        return Segments(g.offset_groups * g.taps, (g.height + 1) * (g.width + 1), g.out_pixels)

    def backward_input(self, images: slice, grad_output: Any, turned: Any, grad_input: Any) -> None:
        g, device, count = self.g, self.device, images.stop - images.start
        convolution, kernels = self._convolution(images), [_kernel(name, self.dtype) for name in ("count", "records")]
        record = sort.record_bytes(self.sums)
        lists = sort.sort(device, self._segments().times(count), record, *kernels, *self._places(images), convolution)
        outs = self._tile(self.input_rows.part, g.taps * self.output_rows.depth)
        tiles = self.input_rows.parts * (ceil_div(self.input_rows.part, outs) if outs else 1)
        grid = ceil_div(count * g.height * g.width, _ROWS) * tiles
        kernel = _kernel("backward_input", self.factors, outs)
        arguments = grad_output, *lists, turned, grad_input, strides(grad_input)
        # float16 sums over many samples may overflow: the second launch makes those blocks again, scaled down.
        overflows = device.empty((grid,), np.int32) if self.dtype == "float16" else None
        device.launch(kernel, grid, (_THREADS, 1), *arguments, overflows, None, convolution)
        if overflows is not None:
            device.launch(kernel, grid, (_THREADS, 1), *arguments, None, overflows, convolution)

    def backward_weight(self, images: slice, rows: tuple[Any, Any], grad_weight: Any, totals: Any) -> None:
        """Adds these images' part to `totals`, or, with the last of them, fills `grad_weight`."""
        g = self.g
        pixels = (images.stop - images.start) * g.out_pixels
        columns = self.group_channels if self.grouped else self.input_rows.part
        tiles = self.input_rows.parts * g.taps
        if not self.grouped:
            tiles *= self._out_tiles(_WEIGHT_OUTS) * ceil_div(columns, _WEIGHT_CHANNELS)
        # Pixels are split over blocks until these fill a GPU; a split's sum is float32, and the splits are added in
        # float64, always in one order.
        splits = max(1, _BLOCKS // tiles)
        run = min(_RUN, ceil_div(pixels, splits * _ROWS) * _ROWS)
        most = max(1, launch.WORKSPACE // (grad_weight.size * np.dtype(self.sums).itemsize))
        most = min(most, launch.LARGEST_GRID // tiles, ceil_div(pixels, run))
        partial = self.device.empty((most, grad_weight.size), self.sums)
        for first in range(0, pixels, most * run):
            end = min(pixels, first + most * run)
            splits = ceil_div(end - first, run)
            self.device.launch(
                _kernel("backward_weight", self.factors, self.grouped), splits * tiles, (_THREADS, 1), *rows,
                *self._places(images), partial, self._convolution(images), _SPLITS(first=first, end=end, run=run),
            )  # fmt: skip
            weights = _WEIGHTS(
                outs=g.out_channels, channels=self.group_channels, kernel_w=g.kernel[1], taps=g.taps,
                bundle_outs=self.bundle_outs, columns=columns, splits=splits,
                is_first=images.start == first == 0, is_last=images.stop == g.batch and end == pixels,
            )  # fmt: skip
            self.device.launch(
                _kernel("add_splits", self.dtype), ceil_div(grad_weight.size, _THREADS), (_THREADS, 1), partial, totals,
                grad_weight, strides(grad_weight), weights,
            )  # fmt: skip

    def _pixel_tiles(self, images: slice) -> int:
        return ceil_div((images.stop - images.start) * self.g.out_pixels, _ROWS)

    def _tile(self, outs: int, products: int) -> int:
        """How many of these outs, each a sum of so many products, a tile has; 0 where groups are small."""
        return 0 if self.grouped else _outs(self.dtype)[-1] if outs > 64 and products <= _LONG else 64

    def _out_tiles(self, outs: int) -> int:
        return ceil_div(self.bundle_outs, outs)

    def _places(self, images: slice) -> tuple[Any, ...]:
        offset = self.offset[images]
        mask = None if self.mask is None else self.mask[images]
        return offset, strides(offset), mask, strides(mask)

    def _convolution(self, images: slice) -> Any:
        g, rows = self.g, self.input_rows
        offset_is_float, mask_is_float = (a is not None and a.dtype == np.float32 for a in (self.offset, self.mask))
        return _CONVOLUTION(
            images=images.stop - images.start,
            height=g.height, width=g.width, out_height=g.out_height, out_width=g.out_width,
            kernel_w=g.kernel[1], taps=g.taps, stride_h=g.stride[0], stride_w=g.stride[1],
            top=g.padding[0], left=g.padding[1], dilation_h=g.dilation[0], dilation_w=g.dilation[1],
            bundles=self.bundles, bundle_parts=rows.parts // self.bundles, bundle_outs=self.bundle_outs,
            part=rows.part, depth=rows.depth, out_depth=self.output_rows.depth,
            offset_group_parts=rows.parts // g.offset_groups,
            row=rows.parts * rows.depth, line=g.width * rows.parts * rows.depth,
            group_channels=self.group_channels, group_outs=self.group_outs,
            offset_is_float=offset_is_float, mask_is_float=mask_is_float,
        )  # fmt: skip


def _outs(dtype: str) -> tuple[int, ...]:
    """The outs that a tile may have; 0 where groups are small."""
    return (0, 64, 128) if dtype in ("float16", "bfloat16") else (0, 64)


@functools.cache
def _kernel(name: str, dtype: str, *arguments: int) -> Kernel:
    ctype = "Tf32" if dtype == "tf32" else DTYPES[dtype].ctype
    template = ", ".join([ctype, *(str(a).lower() for a in arguments)])
    return Kernel(_SOURCES.get(name, "deform_conv2d_backward"), f"deform_conv2d_{name}<{template}>")


def _sum_pixels(device: Any, images: Any, sums: Any) -> None:
    """sums (C,) = those over all pixels of images (n, C, H, W): each thread block's own, and then over the blocks."""
    n, channels, height, width = images.shape
    channels_last = images.strides[1] == images.itemsize
    by_channel, by_pixel = (32, _THREADS // 32), (1, _THREADS)  # threads along channels, and along pixels
    block = by_channel if channels_last else by_pixel
    tiles = ceil_div(n * height * width, _SUMMANDS * block[1])
    partial = device.empty((tiles, channels), np.float64)

    def add(images: Any, summands: int, block: tuple[int, int], tiles: int, sums: Any) -> None:
        n, channels, height, width = images.shape
        pixels = _PIXELS(images=n, channels=channels, height=height, width=width, summands=summands)
        kernel = _pixel_sums(dtypes.name(images), dtypes.name(sums))
        device.launch(kernel, tiles * ceil_div(channels, block[0]), block, images, strides(images), sums, pixels)

    add(images, _SUMMANDS, block, tiles, partial)
    add(partial.T[None, :, None], tiles, by_channel, 1, sums)


@functools.cache
def _pixel_sums(dtype: str, sums: str) -> Kernel:
    return Kernel("deform_conv2d_backward", f"deform_conv2d_backward_bias<{DTYPES[dtype].ctype}, {DTYPES[sums].ctype}>")
