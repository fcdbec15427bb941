"""deform_conv2d on a GPU: matrix products whose one factor is sampled on the way. See kernels_cu/deform_conv2d.cuh.

Input and grad_output are read channels last, in whole 16 bytes; others are packed first, as many images at a time as
fit the workspace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import dtypes, launch, sources
from ..dtypes import DTYPES, arithmetic
from ..geometry import Convolution, ceil_div
from ..launch import strides
from ..plan import Kernel, Plan, View
from . import sort
from .divisor import DIVISOR, divisor
from .sort import Segments

_THREADS = sources.constant("tile.cuh", "THREADS")
_ROWS = sources.constant("deform_conv2d.cuh", "ROWS")
_WEIGHT_OUTS = sources.constant("deform_conv2d_backward", "WEIGHT_OUTS")
_WEIGHT_CHANNELS = sources.constant("deform_conv2d_backward", "WEIGHT_CHANNELS")
_SOURCES = {
    "forward": "deform_conv2d",
    "pack": "deform_conv2d",
    "pack_weight": "deform_conv2d",
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
_PACKING = sources.Struct("deform_conv2d", "Packing", Divisor=DIVISOR)
_WEIGHT_PACKING = sources.Struct("deform_conv2d", "WeightPacking")
_SPLITS = sources.Struct("deform_conv2d_backward", "Splits")
_WEIGHTS = sources.Struct("deform_conv2d_backward", "Weights")
_PIXELS = sources.Struct("deform_conv2d_backward", "Pixels", Divisor=DIVISOR)


def kernels() -> list[Kernel]:
    """Every instance that this operator can launch."""
    found = [_kernel(name, t) for name in ("pack", "pack_weight", "count", "records", "add_splits") for t in DTYPES]
    for name in ("forward", "backward_input"):
        found += [_kernel(name, t, outs) for t in DTYPES for outs in _outs(t)] + [_kernel(name, "tf32", 64)]
    for name in ("backward_offset", "backward_weight"):
        found += [_kernel(name, t, grouped) for t in DTYPES for grouped in (False, True)]
        found.append(_kernel(name, "tf32", False))
    found += [_pixel_sums(*pair) for t in DTYPES for pair in {(t, "float64"), ("float64", t)}]
    return found + sort.kernels()


def forward(
    plan: Plan, g: Convolution, outs: Sequence[View], input: View, offset: View, weight: View, bias: Any, mask: Any
) -> None:
    out, input, offset, mask = g.nchw(*outs, input, offset, mask)
    call = _Call(plan, g, input, offset, mask)
    weight = call.weights(weight)
    bias = None if bias is None else plan.contiguous(bias)
    # out[o, q] = bias[o] + sum over c, k of weight[o, c, k] * mask[k, q] * bilinear(input[c], place[k, q])
    for images in call.chunks(call.input_rows.bytes(input)):
        with plan.reused():
            call.forward(images, call.input_rows.packed(input[images]), weight, bias, out[images])


def backward(
    plan: Plan,
    g: Convolution,
    grads: Sequence[Any],
    grad_output: View,
    input: View,
    offset: View,
    weight: View,
    bias: Any,
    mask: Any,
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    grad_input, grad_offset, grad_mask = g.nchw(grad_input, grad_offset, grad_mask)
    grad_output, input, offset, mask = g.nchw(grad_output, input, offset, mask)
    if grad_input is not None and grad_input.size == 0:
        grad_input = None
    call = _Call(plan, g, input, offset, mask)
    of_samples = grad_offset is not None or grad_mask is not None
    if of_samples or grad_input is not None:
        turned = call.turned(weight)
    if grad_weight is not None:
        totals = plan.empty(grad_weight.shape, np.float64)
    scratch = call.input_rows.bytes(input) + call.output_rows.bytes(grad_output)
    for images in call.chunks(scratch, grad_input is not None):
        with plan.reused():
            rows = call.output_rows.packed(grad_output[images]), call.input_rows.packed(input[images])
            if of_samples:  # sums over c of (weight^T grad_output)[c, k] * value, and * slope * mask
                call.backward_offset(images, rows, turned, grad_offset, grad_mask)
            if grad_weight is not None:  # sums over pixels of grad_output[o] * sample[c, k]
                call.backward_weight(images, rows, grad_weight, totals)
            if grad_input is not None:  # weight^T times the sums of grad_output over the samples that touch a pixel
                call.backward_input(images, rows[0], turned, grad_input[images])
    if grad_bias is not None:
        _sum_pixels(plan, grad_output, grad_bias)


class _Rows:
    """How channels lie in packed images (n, H, W, parts, depth): parts of equal size, with zeros up to 16 bytes."""

    def __init__(self, plan: Plan, parts: int, part: int, itemsize: int) -> None:
        self.plan, self.parts, self.part = plan, parts, part
        self.depth = ceil_div(part, 16 // itemsize) * (16 // itemsize)

    def are(self, images: Any, dtype: Any) -> bool:
        """Whether (n, C, H, W) images are packed as they are."""
        contiguous = images.transpose((0, 2, 3, 1)).is_contiguous
        return self.depth == self.part and contiguous and images.alignment == 16 and images.dtype == dtype

    def bytes(self, images: Any, dtype: Any = None) -> int:
        """What packing takes for one image, as `dtype` if not its own."""
        dtype = np.dtype(dtype or images.dtype)
        return 0 if self.are(images, dtype) else math.prod(images.shape[2:]) * self.parts * self.depth * dtype.itemsize

    def empty(self, images: Any, dtype: Any) -> Any:
        n, _, height, width = images.shape
        return self.plan.empty((n, height, width, self.parts, self.depth), dtype)

    def packed(self, images: Any) -> Any:
        if images.size == 0:  # nothing is read, but there is an address to count from
            return self.plan.empty((1,), images.dtype)
        if self.are(images, images.dtype):
            return images
        packed = self.empty(images, images.dtype)
        n, _, height, width = images.shape
        grid = ceil_div(n * height * width, 32) * ceil_div(self.parts * self.depth, 32)
        packing = _PACKING(
            plane_of=divisor(height * width), width_of=divisor(width), depth_of=divisor(self.depth),
            images=n, height=height, width=width, part=self.part, depth=self.depth, parts=self.parts,
        )  # fmt: skip
        kernel = _kernel("pack", dtypes.name(images))
        self.plan.launch(kernel, grid, (32, _THREADS // 32), images, strides(images), packed, packing)
        return packed


class _Call:
    """How one call is cut into tiles, and its launches."""

    def __init__(self, plan: Plan, g: Convolution, input: View, offset: Any, mask: Any) -> None:
        self.plan, self.g = plan, g
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
        self.input_rows = _Rows(plan, g.channels // part, part, input.itemsize)
        self.output_rows = _Rows(plan, self.bundles, self.bundle_outs, input.itemsize)

    def weights(self, weight: View) -> View:
        """(C_out, bundle_parts, taps, depth), or (C_out, taps, C_in / groups) where groups are small."""
        if self.grouped:
            return self._by_tap(weight)
        rows = self.input_rows
        return self._packed(weight, (self.g.out_channels, rows.parts // self.bundles), rows.part, rows.depth)

    def turned(self, weight: View) -> View:
        """(parts, part, taps, out_depth), or as `weights` where groups are small."""
        if self.grouped:
            return self._by_tap(weight)
        return self._packed(weight, (self.g.groups, self.group_channels), self.group_outs, self.output_rows.depth, 1)

    def _by_tap(self, weight: View) -> View:
        return self._packed(weight, (self.g.out_channels, 1), self.group_channels, self.group_channels)

    def _packed(self, weight: View, rows: tuple[int, int], part: int, depth: int, turned: int = 0) -> View:
        """(*rows, taps, depth): in each row weights of `part` inputs, or, `turned`, of outs; zeros behind them."""
        packed = self.plan.empty((*rows, self.g.taps, depth), weight.dtype)
        if packed.size:
            packing = _WEIGHT_PACKING(
                inner_rows=rows[1], taps=self.g.taps, kernel_w=self.g.kernel[1], part=part, depth=depth, turned=turned
            )
            kernel = _kernel("pack_weight", self.dtype)
            self.plan.launch(kernel, math.prod(rows), (_THREADS, 1), weight, strides(weight), packed, packing)
        return packed

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
        self.plan.launch(
            kernel, grid, (_THREADS, 1), input, *self._places(images), weight, bias, out, strides(out),
            self._convolution(images),
        )  # fmt: skip

    def backward_offset(
        self, images: slice, rows: tuple[Any, Any], turned: Any, grad_offset: Any, grad_mask: Any
    ) -> None:
        """The gradients of offset and mask."""
        grad_offset, grad_mask = (None if grad is None else grad[images] for grad in (grad_offset, grad_mask))
        grid = self._pixel_tiles(images) * self.g.offset_groups * self.g.taps
        self.plan.launch(
            _kernel("backward_offset", self.factors, self.grouped), grid, (_THREADS, 1), *rows, *self._places(images),
            turned, grad_offset, strides(grad_offset), grad_mask, strides(grad_mask), self._convolution(images),
        )  # fmt: skip

    def _segments(self) -> Segments:
        """The samples of one image that are sorted apart: those of an offset group and tap."""
        g = self.g
        return Segments(g.offset_groups * g.taps, (g.height + 1) * (g.width + 1), g.out_pixels)

    def backward_input(self, images: slice, grad_output: Any, turned: Any, grad_input: Any) -> None:
        g, plan, count = self.g, self.plan, images.stop - images.start
        convolution, kernels = self._convolution(images), [_kernel(name, self.dtype) for name in ("count", "records")]
        record = sort.record_bytes(self.sums)
        lists = sort.sort(plan, self._segments().times(count), record, *kernels, *self._places(images), convolution)
        outs = self._tile(self.input_rows.part, g.taps * self.output_rows.depth)
        tiles = self.input_rows.parts * (ceil_div(self.input_rows.part, outs) if outs else 1)
        grid = ceil_div(count * g.height * g.width, _ROWS) * tiles
        kernel = _kernel("backward_input", self.factors, outs)
        arguments = grad_output, *lists, turned, grad_input, strides(grad_input)
        # float16 sums over many samples may overflow: the second launch makes those blocks again, scaled down.
        overflows = plan.empty((grid,), np.int32) if self.dtype == "float16" else None
        plan.launch(kernel, grid, (_THREADS, 1), *arguments, overflows, None, convolution)
        if overflows is not None:
            plan.launch(kernel, grid, (_THREADS, 1), *arguments, None, overflows, convolution)

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
        partial = self.plan.empty((most, grad_weight.size), self.sums)
        for first in range(0, pixels, most * run):
            end = min(pixels, first + most * run)
            splits = ceil_div(end - first, run)
            self.plan.launch(
                _kernel("backward_weight", self.factors, self.grouped), splits * tiles, (_THREADS, 1), *rows,
                *self._places(images), partial, self._convolution(images), _SPLITS(first=first, end=end, run=run),
            )  # fmt: skip
            weights = _WEIGHTS(
                outs=g.out_channels, channels=self.group_channels, kernel_w=g.kernel[1], taps=g.taps,
                bundle_outs=self.bundle_outs, columns=columns, splits=splits,
                is_first=images.start == first == 0, is_last=images.stop == g.batch and end == pixels,
            )  # fmt: skip
            self.plan.launch(
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


def _sum_pixels(plan: Plan, images: View, sums: View) -> None:
    """sums (C,) = those over all pixels of images (n, C, H, W): each thread block's own, and then over the blocks."""
    n, channels, height, width = images.shape
    channels_last = images.strides[1] == images.itemsize
    by_channel, by_pixel = (32, _THREADS // 32), (1, _THREADS)  # threads along channels, and along pixels
    block = by_channel if channels_last else by_pixel
    tiles = ceil_div(n * height * width, _SUMMANDS * block[1])
    partial = plan.empty((tiles, channels), np.float64)

    def add(images: View, summands: int, block: tuple[int, int], tiles: int, sums: View) -> None:
        n, channels, height, width = images.shape
        pixels = _PIXELS(
            plane_of=divisor(height * width), width_of=divisor(width),
            images=n, channels=channels, height=height, width=width, summands=summands,
        )  # fmt: skip
        kernel = _pixel_sums(dtypes.name(images), dtypes.name(sums))
        plan.launch(kernel, tiles * ceil_div(channels, block[0]), block, images, strides(images), sums, pixels)

    add(images, _SUMMANDS, block, tiles, partial)
    add(partial.T[None, :, None], tiles, by_channel, 1, sums)


@functools.cache
def _pixel_sums(dtype: str, sums: str) -> Kernel:
    return Kernel("deform_conv2d_backward", f"deform_conv2d_backward_bias<{DTYPES[dtype].ctype}, {DTYPES[sums].ctype}>")
