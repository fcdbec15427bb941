"""deform_conv2d on NumPy arrays: sample columns with a sparse matrix, multiply them with the weights.

Work is split into blocks of one image's output pixels; Q is their number, K the kernel's taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..check import arithmetic
from .parallel import blocks, ordered
from .sampling import Sampler, padded, unpadded

if TYPE_CHECKING:
    from ..ops.deform_conv2d import Geometry


def forward(g: Geometry, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    out, input, offset, mask = g.nchw(out, input, offset, mask)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)

    def convolve(block: tuple[int, slice]) -> None:
        n, part = block
        columns = [
            _sampler(g, offset[n], part, group, dtype).value(_modulation(g, mask, n, part, group))
            @ padded(input[n, channels], dtype)
            for group, channels in _offset_groups(g)
        ]
        product = _by_group(g, _joined(g, columns)) @ matrix
        if bias is not None:
            product += bias.astype(dtype).reshape(g.groups, 1, -1)
        out[n].reshape(g.out_channels, -1)[:, part] = _by_channel(g, product)

    for _ in _in_blocks(g, dtype, convolve):
        pass


def backward(
    g: Geometry, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    grad_input, grad_offset, grad_mask = g.nchw(grad_input, grad_offset, grad_mask)
    grad_output, input, offset, mask = g.nchw(grad_output, input, offset, mask)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)

    def differentiate(block: tuple[int, slice]) -> tuple[int, list[Any], Any]:
        """This block's share of the image's and the weight's gradient; offset and mask are its own to write."""
        n, part = block
        grad_product = grad_output[n].reshape(g.groups, g.out_channels // g.groups, -1)[:, :, part].astype(dtype)
        grad_columns = _by_offset_group(g, grad_product.transpose(0, 2, 1) @ matrix.transpose(0, 2, 1))
        columns, grad_pixels = [], []
        for group, channels in _offset_groups(g):
            sampler = _sampler(g, offset[n], part, group, dtype)
            pixels = padded(input[n, channels], dtype)
            grad_samples = grad_columns[group]
            modulation = _modulation(g, mask, n, part, group)
            if grad_offset is not None or grad_mask is not None:
                value, slope_y, slope_x = (p.reshape(-1, g.taps).T for p in sampler.products(pixels, grad_samples))
                scale = 1 if modulation is None else modulation.T
                if grad_mask is not None:
                    _taps(g, grad_mask[n], group, 1)[:, 0, part] = value
                if grad_offset is not None:
                    places = _taps(g, grad_offset[n], group, 2)
                    places[:, 0, part], places[:, 1, part] = slope_y * scale, slope_x * scale
            operator = sampler.value(modulation)
            if grad_input is not None:
                grad_pixels.append(operator.T @ grad_samples)
            if grad_weight is not None:
                columns.append(operator @ pixels)
        share = None if grad_weight is None else grad_product @ _by_group(g, _joined(g, columns))
        return n, grad_pixels, share

    if grad_input is not None:
        image_sums = np.zeros(grad_input.shape, dtype)
    weight_sum: np.ndarray = np.zeros((g.groups, g.out_channels // g.groups, matrix.shape[1]), dtype)
    for n, grad_pixels, share in _in_blocks(g, dtype, differentiate):
        for (_, channels), part in zip(_offset_groups(g), grad_pixels, strict=False):
            image_sums[n, channels] += unpadded(part, g.height, g.width)
        if share is not None:
            weight_sum += share

    if grad_input is not None:
        grad_input[...] = image_sums
    if grad_weight is not None:
        by_tap = weight_sum.reshape(g.out_channels, g.taps, -1)
        grad_weight[...] = by_tap.transpose(0, 2, 1).reshape(grad_weight.shape)
    if grad_bias is not None:
        grad_bias[...] = grad_output.astype(dtype).sum(axis=(0, 2, 3))


def _in_blocks(g: Geometry, dtype: type, work: Callable[[tuple[int, slice]], Any]) -> Iterable[Any]:
    columns = g.taps * g.channels * np.dtype(dtype).itemsize  # of one output pixel, in bytes
    return ordered(work, blocks(g.out_pixels, g.batch, columns), g.batch * g.out_pixels * columns)


def _offset_groups(g: Geometry) -> list[tuple[int, slice]]:
    """Each offset group and its channels."""
    size = g.channels // g.offset_groups
    return [(group, slice(group * size, (group + 1) * size)) for group in range(g.offset_groups)]


def _taps(g: Geometry, image: np.ndarray, group: int, parts: int) -> np.ndarray:
    """(K, parts, H_out * W_out) of one offset group in an image of offsets (2 parts) or of masks (1 part)."""
    size = g.taps * parts
    return image[group * size : (group + 1) * size].reshape(g.taps, parts, g.out_pixels)


def _sampler(g: Geometry, offset: np.ndarray, part: slice, group: int, dtype: type) -> Sampler:
    """Samples at (Q, K): each output pixel's taps."""
    pixel = np.stack(np.divmod(np.arange(part.start, part.stop), g.out_width))
    tap = np.stack(np.divmod(np.arange(g.taps), g.kernel[1]))
    stride, padding, dilation = (np.array(pair)[:, None] for pair in (g.stride, g.padding, g.dilation))
    origin = (pixel * stride - padding).astype(dtype)[:, :, None] + (tap * dilation).astype(dtype)[:, None]
    shift: np.ndarray = _taps(g, offset, group, 2)[:, :, part].astype(dtype, copy=False)
    return Sampler(origin + shift.transpose(1, 2, 0), g.height, g.width)


def _modulation(g: Geometry, mask: Any, n: int, part: slice, group: int) -> Any:
    """(Q, K), or None."""
    return None if mask is None else _taps(g, mask[n], group, 1)[:, 0, part].T


def _matrix(g: Geometry, weight: np.ndarray, dtype: type) -> np.ndarray:
    """(groups, K * C_in / groups, C_out / groups)"""
    split = weight.reshape(g.groups, g.out_channels // g.groups, -1, g.taps).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(split, dtype).reshape(g.groups, -1, g.out_channels // g.groups)


def _joined(g: Geometry, columns: list[np.ndarray]) -> np.ndarray:
    """(Q, K, C_in) of the offset groups' samples, each (Q * K, C_in / offset_groups)."""
    return np.concatenate(columns, axis=1).reshape(-1, g.taps, g.channels) if len(columns) > 1 else columns[0]


def _by_group(g: Geometry, columns: np.ndarray) -> np.ndarray:
    """(groups, Q, K * C_in / groups) of (Q, K, C_in)"""
    split = columns.reshape(-1, g.taps, g.groups, g.channels // g.groups)
    return split.transpose(2, 0, 1, 3).reshape(g.groups, split.shape[0], -1)


def _by_offset_group(g: Geometry, columns: np.ndarray) -> np.ndarray:
    """(offset_groups, Q * K, C_in / offset_groups) of (groups, Q, K * C_in / groups)"""
    joined = columns.reshape(g.groups, -1, g.taps, g.channels // g.groups).transpose(1, 2, 0, 3)
    return joined.reshape(-1, g.offset_groups, g.channels // g.offset_groups).transpose(1, 0, 2)


def _by_channel(g: Geometry, product: np.ndarray) -> np.ndarray:
    """(C_out, Q) of (groups, Q, C_out / groups)"""
    return product.transpose(0, 2, 1).reshape(g.out_channels, -1)
