"""deform_conv2d on a GPU: sample the columns of a chunk of images, multiply them with the weights.

The columns are (groups, K * C_in / groups, pixels of the chunk), stored either way round: planar, as written, or
interleaved with the channels fastest, where the input's channels are. See kernels_cu/deform_conv2d.cu.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import dtypes, launch, sources
from ..dtypes import DTYPES, arithmetic
from ..launch import Kernel, ctype, strides

if TYPE_CHECKING:
    from ..ops.deform_conv2d import Geometry

_THREADS = sources.constant("deform_conv2d", "THREADS")
_SLAB = 16  # channels that share one thread's position and addresses
_RUN = 1 << 14  # the most products of the weight's gradient that one matrix product sums in float32
_SUMMANDS = 64  # of the bias's gradient that one thread sums in float32
_CONVOLUTION = sources.Struct("deform_conv2d", "Convolution")
_PIXELS = sources.Struct("deform_conv2d", "Pixels")


def kernels() -> list[Kernel]:
    """Every instance that this operator can launch."""
    by_columns = [
        _kernel(name, tuple(dtype.ctype for dtype in types), last)
        for name, types, last in itertools.product(
            ("sample", "backward_input", "backward_offset"), dtypes.together(2), (False, True)
        )
    ]
    return by_columns + [_pixel_sums(*pair) for t in DTYPES for pair in {(t, "float64"), ("float64", t)}]


def forward(g: Geometry, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    out, input, offset, mask = g.nchw(out, input, offset, mask)
    with launch.device(out) as device:
        columns = _Columns(g, device, input, offset, mask)
        matrix = columns.weights(weight)
        if bias is not None:
            bias = bias.astype(arithmetic(input), copy=False)
        for images in columns.chunks(input.dtype, _product_bytes(g, input)):
            operand = columns.sample(images)
            for group, channels in enumerate(_output_groups(g)):
                shift = None if bias is None else bias[channels]
                _multiply(device, matrix[group], operand[group], shift, out[images, channels])


def backward(
    g: Geometry, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    grad_input, grad_offset, grad_mask = g.nchw(grad_input, grad_offset, grad_mask)
    grad_output, input, offset, mask = g.nchw(grad_output, input, offset, mask)
    with launch.device(grad_output) as device:
        sums = arithmetic(input)
        columns = _Columns(g, device, input, offset, mask)
        matrix = columns.weights(weight)
        if grad_weight is not None:
            weight_sums = device.xp.zeros((g.groups, *matrix.shape[1:]), sums)
        image_sums = g.channels * g.height * g.width * 4 if dtypes.of(input).half else 0
        for images in columns.chunks(sums, _product_bytes(g, input) + image_sums):
            grad_product = _as_matrices(g, grad_output[images])
            if any(grad is not None for grad in (grad_input, grad_offset, grad_mask)):
                grad_columns = columns.gradient(images, matrix, grad_product)
                if grad_offset is not None or grad_mask is not None:
                    columns.backward_offset(images, grad_columns, grad_offset, grad_mask)
                if grad_input is not None:
                    columns.backward_input(images, grad_columns, grad_input)
            if grad_weight is not None:
                _add_products(device, grad_product, columns.sample(images), weight_sums)
        if grad_weight is not None:
            grad_weight[...] = columns.unweights(weight_sums).reshape(grad_weight.shape)
        if grad_bias is not None:
            _sum_pixels(device, grad_output, grad_bias)


class _Columns:
    """The columns of one call: their place in memory, and the kernels that fill and read them.

    A chunk is a slice of the batch; columns come as (groups, K * C_in / groups, pixels) views of one buffer.
    """

    def __init__(self, g: Geometry, device: Any, input: Any, offset: Any, mask: Any) -> None:
        self.g, self.device = g, device
        self.input, self.offset, self.mask = input, offset, mask
        self.last = input.strides[1] == input.itemsize and g.channels > 1
        self.types = ctype(input), ctype(offset), ctype(offset if mask is None else mask)
        self.group_channels = g.channels // g.groups
        self.buffer: Any = None

    def chunks(self, dtype: Any, scratch: int) -> list[slice]:
        """Slices of the batch whose columns, and `scratch` more bytes an image, fit the workspace; makes the buffer.

        `dtype` is the largest type of column that will be asked for.
        """
        g = self.g
        per_image = g.channels * g.taps * g.out_pixels
        most = launch.WORKSPACE // (per_image * np.dtype(dtype).itemsize + scratch)
        images = max(1, min(g.batch, most, launch.LARGEST_GRID // g.out_pixels))
        self.buffer = self.device.empty((images * per_image,), dtype)
        return [slice(n, min(n + images, g.batch)) for n in range(0, g.batch, images)]

    def weights(self, weight: Any) -> Any:
        """(groups, C_out / groups, K * C_in / groups), in the columns' order of taps and channels."""
        g = self.g
        split = weight.reshape(g.groups, g.out_channels // g.groups, self.group_channels, g.taps)
        ordered = split.transpose(0, 1, 3, 2) if self.last else split
        return self.device.xp.ascontiguousarray(ordered).reshape(g.groups, g.out_channels // g.groups, -1)

    def unweights(self, matrices: Any) -> Any:
        """(groups, C_out / groups, C_in / groups, K), the inverse of `weights`."""
        g = self.g
        if not self.last:
            return matrices
        split = matrices.reshape(g.groups, g.out_channels // g.groups, g.taps, self.group_channels)
        return split.transpose(0, 1, 3, 2)

    def sample(self, images: slice) -> Any:
        whole, operand = self._views(images, self.input.dtype)
        input = self.input[images]
        self._launch("sample", images, _SLAB, input, strides(input), *self._samples(images), whole)
        return operand

    def gradient(self, images: slice, matrix: Any, grad_product: Any) -> Any:
        """Of the columns, in the type of sums: what comes of it for a float32 offset has float32's precision."""
        whole, operand = self._views(images, arithmetic(self.input))
        for group in range(self.g.groups):
            if self.last:
                self.device.matmul(grad_product[group].T, matrix[group], out=operand[group].T)
            else:
                self.device.matmul(matrix[group].T, grad_product[group], out=operand[group])
        return whole

    def backward_offset(self, images: slice, grad_columns: Any, grad_offset: Any, grad_mask: Any) -> None:
        input = self.input[images]
        grad_offset = None if grad_offset is None else grad_offset[images]
        grad_mask = None if grad_mask is None else grad_mask[images]
        outputs = grad_offset, strides(grad_offset), grad_mask, strides(grad_mask)
        slab = self.g.channels // self.g.offset_groups
        samples = self._samples(images)
        self._launch("backward_offset", images, slab, grad_columns, input, strides(input), *samples, *outputs)

    def backward_input(self, images: slice, grad_columns: Any, grad_input: Any) -> None:
        xp = self.device.xp
        target = grad_input[images]
        direct = target.dtype == arithmetic(target)
        if direct:
            target[...] = 0
            sums = target
        elif self.last:
            n, c, h, w = target.shape
            sums = xp.zeros((n, h, w, c), xp.float32).transpose(0, 3, 1, 2)
        else:
            sums = xp.zeros(target.shape, xp.float32)
        samples = self._samples(images)
        self._launch("backward_input", images, _SLAB, grad_columns, *samples, sums, strides(sums))
        if not direct:
            target[...] = sums

    def _views(self, images: slice, dtype: Any) -> tuple[Any, Any]:
        """The buffer's part for these images, and its (groups, K * C_in / groups, pixels) view."""
        g = self.g
        pixels = (images.stop - images.start) * g.out_pixels
        rows = g.taps * self.group_channels
        whole = self.buffer.view(dtype)[: g.groups * rows * pixels]
        if self.last:
            return whole, whole.reshape(g.groups, pixels, rows).transpose(0, 2, 1)
        return whole, whole.reshape(g.groups, rows, pixels)

    def _samples(self, images: slice) -> tuple[Any, ...]:
        offset = self.offset[images]
        mask = None if self.mask is None else self.mask[images]
        return offset, strides(offset), mask, strides(mask)

    def _launch(self, name: str, images: slice, slab: int, *args: Any) -> None:
        g = self.g
        channels = g.channels // g.offset_groups
        slab = min(slab, channels) if not self.last else channels
        lanes = min(32, 1 << (channels - 1).bit_length()) if self.last else 1
        block = (lanes, _THREADS // lanes) if self.last else (_THREADS, 1)
        slabs = -(-channels // slab)
        count = images.stop - images.start
        tiles = -(-g.out_pixels // (_THREADS // lanes))
        grid = tiles * g.taps * slabs * g.offset_groups * count
        if grid > launch.LARGEST_GRID:
            raise ValueError(
                f"deform_conv2d: one image needs {grid} blocks of threads, CUDA takes {launch.LARGEST_GRID}"
            )
        convolution = _CONVOLUTION(
            height=g.height, width=g.width, out_height=g.out_height, out_width=g.out_width,
            kernel_w=g.kernel[1], taps=g.taps, stride_h=g.stride[0], stride_w=g.stride[1],
            top=g.padding[0], left=g.padding[1], dilation_h=g.dilation[0], dilation_w=g.dilation[1],
            channels_per_group=self.group_channels, channels_per_offset_group=channels,
            slab=slab, slabs_per_offset_group=slabs, offset_groups=g.offset_groups, images=count, tiles=tiles,
        )  # fmt: skip
        self.device.launch(_kernel(name, self.types, self.last), grid, block, *args, convolution)


def _kernel(name: str, types: tuple[str, ...], last: bool) -> Kernel:
    return Kernel("deform_conv2d", f"deform_conv2d_{name}<{', '.join(types)}, {str(last).lower()}>")


def _product_bytes(g: Geometry, input: Any) -> int:
    """Of one image's product with the weights, or of its gradient, where the result's memory cannot take it."""
    return g.out_channels * g.out_pixels * np.dtype(arithmetic(input)).itemsize


def _output_groups(g: Geometry) -> list[slice]:
    size = g.out_channels // g.groups
    return [slice(group * size, (group + 1) * size) for group in range(g.groups)]


def _as_matrices(g: Geometry, images: Any) -> list[Any]:
    """One (C_out / groups, pixels) matrix per group; a copy unless the memory is already so."""
    matrix = images.transpose(1, 0, 2, 3).reshape(g.out_channels, -1)
    return [matrix[channels] for channels in _output_groups(g)]


def _multiply(device: Any, matrix: Any, columns: Any, bias: Any, images: Any) -> None:
    """images (n, C, H, W) = matrix (C, R) @ columns (R, n * H * W) + bias (C,), rounded once.

    Without a copy where the images' type and memory allow.
    """
    n, channels, height, width = images.shape
    dtype = arithmetic(images)
    product, rows = images, images.transpose(0, 2, 3, 1)
    if images.dtype == dtype and rows.flags.c_contiguous:
        device.matmul(columns.T, matrix.T, out=rows.reshape(-1, channels))
    elif images.dtype == dtype and n == 1 and images.flags.c_contiguous:
        device.matmul(matrix, columns, out=images.reshape(channels, -1))
    else:
        by_channel = device.empty((channels, columns.shape[1]), dtype)
        device.matmul(matrix, columns, out=by_channel)
        product = by_channel.reshape(channels, n, height, width).transpose(1, 0, 2, 3)
    if bias is not None:
        product += bias.reshape(-1, 1, 1)
    if product is not images:
        images[...] = product


def _add_products(device: Any, grad_product: list[Any], columns: Any, sums: Any) -> None:
    """sums[group] += grad_product[group] (C, pixels) @ columns[group]' (pixels, R), some pixels at a time."""
    share = device.empty(sums.shape[1:], sums.dtype)
    for group, gradient in enumerate(grad_product):
        for first in range(0, gradient.shape[1], _RUN):
            pixels = slice(first, first + _RUN)
            device.matmul(gradient[:, pixels], columns[group, :, pixels].T, out=share)
            sums[group] += share


def _sum_pixels(device: Any, images: Any, sums: Any) -> None:
    """sums (C,) = those over all pixels of images (n, C, H, W): each thread block's own, and then over the blocks."""
    n, channels, height, width = images.shape
    last = images.strides[1] == images.itemsize
    by_channel, by_pixel = (32, _THREADS // 32), (1, _THREADS)  # threads along channels, and along pixels
    block = by_channel if last else by_pixel
    tiles = -(-n * height * width // (_SUMMANDS * block[1]))
    partial = device.empty((tiles, channels), np.float64)

    def add(images: Any, summands: int, block: tuple[int, int], tiles: int, sums: Any) -> None:
        n, channels, height, width = images.shape
        pixels = _PIXELS(images=n, channels=channels, height=height, width=width, summands=summands)
        kernel = _pixel_sums(str(images.dtype), str(sums.dtype))
        device.launch(kernel, tiles * -(-channels // block[0]), block, images, strides(images), sums, pixels)

    add(images, _SUMMANDS, block, tiles, partial)
    add(partial.T[None, :, None], tiles, by_channel, 1, sums)


def _pixel_sums(dtype: str, sums: str) -> Kernel:
    return Kernel("deform_conv2d", f"deform_conv2d_backward_bias<{DTYPES[dtype].ctype}, {DTYPES[sums].ctype}>")
