"""deform_conv2d on a GPU: sample the columns of a chunk of images, multiply them with the weights.

The columns are (groups, K * C_in / groups, pixels of the chunk), stored either way round: planar, as written, or
interleaved with the channels fastest, where the input's channels are. See kernels_cu/deform_conv2d.cu.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import launch
from ..check import arithmetic
from ..launch import CTYPES, Kernel, ctype, layout, strides

if TYPE_CHECKING:
    from ..ops.deform_conv2d import Geometry

_THREADS = 256
_SLAB = 16  # channels that share one thread's position and addresses
_CONVOLUTION = layout(
    (
        "height width out_height out_width kernel_w taps stride_h stride_w top left dilation_h dilation_w "
        "channels_per_group channels_per_offset_group slab slabs_per_offset_group offset_groups images tiles",
        np.int32,
    )
)


def kernels() -> list[Kernel]:
    """Every instance that this operator can launch."""
    halves = [(t, o, m) for t in ("float16", "bfloat16") for o in (t, "float32") for m in (t, "float32")]
    dtypes = [*halves, ("float32",) * 3, ("float64",) * 3]
    return [
        _kernel(name, tuple(CTYPES[d] for d in types), last)
        for name, types, last in itertools.product(
            ("sample", "backward_input", "backward_offset"), dtypes, (False, True)
        )
    ]


def forward(g: Geometry, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    out, input, offset, mask = g.nchw(out, input, offset, mask)
    with launch.device(out) as device:
        columns = _Columns(g, device, input, offset, mask)
        matrix = columns.weights(weight)
        for images in columns.chunks(_product_bytes(g, input)):
            operand = columns.sample(images)
            for group, channels in enumerate(_output_groups(g)):
                _multiply(device, matrix[group], operand[group], out[images, channels])
        if bias is not None:
            out += bias.reshape(1, -1, 1, 1)


def backward(
    g: Geometry, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    grad_input, grad_offset, grad_mask = g.nchw(grad_input, grad_offset, grad_mask)
    grad_output, input, offset, mask = g.nchw(grad_output, input, offset, mask)
    with launch.device(grad_output) as device:
        xp = device.xp
        sums = arithmetic(input)
        columns = _Columns(g, device, input, offset, mask)
        matrix = columns.weights(weight)
        if grad_weight is not None:
            weight_sums = xp.zeros((g.groups, *matrix.shape[1:]), sums)
        image_sums = g.channels * g.height * g.width * 4 if input.itemsize == 2 else 0
        for images in columns.chunks(_product_bytes(g, input) + image_sums):
            grad_product = _as_matrices(g, grad_output[images])
            if any(grad is not None for grad in (grad_input, grad_offset, grad_mask)):
                grad_columns = columns.gradient(images, matrix, grad_product)
                if grad_offset is not None or grad_mask is not None:
                    columns.backward_offset(images, grad_columns, grad_offset, grad_mask)
                if grad_input is not None:
                    columns.backward_input(images, grad_columns, grad_input)
            if grad_weight is not None:
                operand = columns.sample(images)
                for group in range(g.groups):
                    share = device.matmul(grad_product[group], operand[group].T)
                    weight_sums[group] += share.astype(sums, copy=False)
        if grad_weight is not None:
            grad_weight[...] = columns.unweights(weight_sums).reshape(grad_weight.shape)
        if grad_bias is not None:
            grad_bias[...] = grad_output.astype(sums, copy=False).sum(axis=(0, 2, 3))


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

    def chunks(self, scratch: int) -> list[slice]:
        """Slices of the batch whose columns, and `scratch` more bytes an image, fit the workspace; makes the buffer."""
        g = self.g
        per_image = g.channels * g.taps * g.out_pixels * self.input.itemsize + scratch
        images = max(1, min(g.batch, launch.WORKSPACE // per_image, launch.LARGEST_GRID // g.out_pixels))
        self.buffer = self.device.empty((images * g.channels * g.taps * g.out_pixels,), self.input.dtype)
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
        whole, operand = self._views(images)
        input = self.input[images]
        self._launch("sample", images, _SLAB, input, strides(input), *self._samples(images), whole)
        return operand

    def gradient(self, images: slice, matrix: Any, grad_product: Any) -> Any:
        whole, operand = self._views(images)
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

    def _views(self, images: slice) -> tuple[Any, Any]:
        """The buffer's part for these images, and its (groups, K * C_in / groups, pixels) view."""
        g = self.g
        pixels = (images.stop - images.start) * g.out_pixels
        rows = g.taps * self.group_channels
        whole = self.buffer[: g.groups * rows * pixels]
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
        convolution = (
            g.height, g.width, g.out_height, g.out_width, g.kernel[1], g.taps, *g.stride, *g.padding, *g.dilation,
            self.group_channels, channels, slab, slabs, g.offset_groups, count, tiles,
        )  # fmt: skip
        self.device.launch(
            _kernel(name, self.types, self.last), grid, block, *args, np.array(convolution, _CONVOLUTION)
        )


def _kernel(name: str, types: tuple[str, ...], last: bool) -> Kernel:
    return Kernel("deform_conv2d", f"deform_conv2d_{name}<{', '.join(types)}, {str(last).lower()}>")


def _product_bytes(g: Geometry, input: Any) -> int:
    """Of one image's product with the weights, or of its gradient, where memory's order asks for a copy."""
    return g.out_channels * g.out_pixels * input.itemsize


def _output_groups(g: Geometry) -> list[slice]:
    size = g.out_channels // g.groups
    return [slice(group * size, (group + 1) * size) for group in range(g.groups)]


def _as_matrices(g: Geometry, images: Any) -> list[Any]:
    """One (C_out / groups, pixels) matrix per group; a copy unless the memory is already so."""
    matrix = images.transpose(1, 0, 2, 3).reshape(g.out_channels, -1)
    return [matrix[channels] for channels in _output_groups(g)]


def _multiply(device: Any, matrix: Any, columns: Any, images: Any) -> None:
    """images (n, C, H, W) = matrix (C, R) @ columns (R, n * H * W), without a copy where memory allows."""
    n, channels, height, width = images.shape
    rows = images.transpose(0, 2, 3, 1)
    if rows.flags.c_contiguous:
        device.matmul(columns.T, matrix.T, out=rows.reshape(-1, channels))
    elif n == 1 and images.flags.c_contiguous:
        device.matmul(matrix, columns, out=images.reshape(channels, -1))
    else:
        product = device.matmul(matrix, columns)
        images[...] = product.reshape(channels, n, height, width).transpose(1, 0, 2, 3)
