"""deform_conv2d on NumPy arrays: sample columns with a sparse matrix, multiply them with the weights.

Work is split into blocks of one image's output pixels; Q is their number, K the kernel's taps. Neither the blocks nor
the order in which they are summed depend on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..check import arithmetic
from .parallel import HELD, batches, team
from .sampling import Sampler, interior, padded, sums_of, zeros

if TYPE_CHECKING:
    from ..ops.deform_conv2d import Geometry

_BLOCK = 5 << 19  # bytes of a block's columns and samples
_WAVE = 8 << 20  # bytes of the columns that wait for their product with grad_output
_SLICE = 144  # columns of the weight's gradient that one thread multiplies: fewer would not be fast
_RUN = 1024  # pixels of one product in float32; products are summed in float64

Block = tuple[int, slice]  # an image, and some of its output pixels
Images = dict[int, list[np.ndarray]]  # of each offset group of an image, the pixels with their border


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: Geometry, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    input, *flat = g.nchw(input, out, offset, mask)
    out, offset, mask = _flat(g, flat)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)

    def convolve(block: Block) -> None:
        n, part = block
        columns = [
            _sampler(g, offset, mask, block, group, dtype).sums(pixels[n][group]) for group in range(g.offset_groups)
        ]
        product = _by_group(g, _joined(g, columns)) @ matrix
        if bias is not None:
            product += bias.astype(dtype).reshape(g.groups, 1, -1)
        out[n][:, part] = _by_channel(g, product)

    with _team(g, dtype, copies=2) as workers:
        for images in batches(g.batch, g.channels * g.height * g.width * np.dtype(dtype).itemsize):
            pixels = _by_image(g, images, padded(workers, _planes(g, input, images), dtype))
            for _ in workers.ordered(convolve, _blocks(g, images, dtype)):
                pass


@np.errstate(all="ignore")
def backward(
    g: Geometry, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    input, grad_input, *flat = g.nchw(input, grad_input, grad_output, offset, mask, grad_offset, grad_mask)
    grad_output, offset, mask, grad_offset, grad_mask = _flat(g, flat)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)
    weight_sum: np.ndarray = np.zeros((g.groups, g.out_channels // g.groups, matrix.shape[1]))
    bias_sum = np.zeros(g.out_channels)

    def differentiate(block: Block) -> Any:
        """The block's shares of the image's gradient, and what the weight's is made of; offset and mask are its own."""
        n, part = block
        grad_product = grad_output[n].reshape(g.groups, -1, g.out_pixels)[:, :, part].astype(dtype)
        grad_columns = _by_offset_group(g, grad_product.transpose(0, 2, 1) @ matrix.transpose(0, 2, 1))
        shares, columns = [], []
        for group, grad_samples in enumerate(grad_columns):
            sampler = _sampler(g, offset, mask, block, group, dtype)
            if sums:
                shares.append(sampler.scattered(grad_samples))
            if pixels and (grad_offset is not None or grad_mask is not None):
                products = sampler.products(pixels[n][group], grad_samples)
                value, slope_y, slope_x = (product.reshape(-1, g.taps).T for product in products)
                if grad_mask is not None:
                    _taps(g, grad_mask[n], group, 1)[:, 0, part] = value
                if grad_offset is not None:
                    places = _taps(g, grad_offset[n], group, 2)
                    places[:, 0, part], places[:, 1, part] = slope_y, slope_x
            if pixels and grad_weight is not None:
                columns.append(sampler.sums(pixels[n][group]))
        bias_share = grad_product.sum(2, dtype=np.float64).ravel()
        return shares, bias_share, (grad_product, _by_group(g, _joined(g, columns))) if columns else None

    def multiply(part: slice) -> None:
        """Some columns of the weight's gradient."""
        for grad_product, columns in kept:
            for run in (slice(first, first + _RUN) for first in range(0, columns.shape[1], _RUN)):
                weight_sum[:, :, part] += grad_product[:, :, run] @ columns[:, run, part]

    def accumulate() -> None:
        for (n, _), (shares, bias_share, factors) in zip(blocks, workers.ordered(differentiate, blocks), strict=True):
            for total, group_shares in zip(sums[n] if sums else (), shares, strict=True):
                for share in group_shares:
                    total[share.at] += share.sums
            if pixels:
                bias_sum[...] += bias_share
            if factors is not None:
                kept.append(factors)
                if sum(columns.nbytes for _, columns in kept) >= _WAVE:
                    multiply_kept()
        multiply_kept()

    def multiply_kept() -> None:
        columns = range(0, matrix.shape[1] if kept else 0, _SLICE)
        for _ in workers.ordered(multiply, [slice(column, column + _SLICE) for column in columns]):
            pass
        kept.clear()

    with _team(g, dtype, copies=4) as workers:
        numbers = g.channels * g.height * g.width  # of an image
        for images in batches(g.batch, 12 * numbers):
            blocks = _blocks(g, images, dtype)
            pixels: Images = {}
            sums: Images = {}
            kept: list[tuple[np.ndarray, np.ndarray]] = []
            sum_type = sums_of(len(blocks) // len(images), dtype)
            if any(grad is not None for grad in (grad_offset, grad_weight, grad_bias, grad_mask)):
                pixels = _by_image(g, images, padded(workers, _planes(g, input, images), dtype))
            if grad_input is not None:
                if pixels and sum_type == np.float64 and 4 * numbers > HELD:
                    accumulate()
                    pixels = {}  # for the sums to take their place
                size = g.height, g.width, g.channels // g.offset_groups
                sums = _by_image(g, images, [zeros(*size, sum_type) for _ in range(len(images) * g.offset_groups)])
            accumulate()
            if grad_input is not None:
                workers.copy(zip(_planes(g, grad_input, images), _interiors(g, sums), strict=True))

    if grad_weight is not None:
        by_tap = weight_sum.reshape(g.out_channels, g.taps, -1)
        grad_weight[...] = by_tap.transpose(0, 2, 1).reshape(grad_weight.shape)
    if grad_bias is not None:
        grad_bias[...] = bias_sum


def _team(g: Geometry, dtype: type, copies: int) -> Any:
    """For blocks that need their size in bytes `copies` times."""
    return team(g.batch * g.out_pixels * _pixel_bytes(g, dtype), copies * _step(g, dtype) * _pixel_bytes(g, dtype))


def _pixel_bytes(g: Geometry, dtype: type) -> int:
    """Of an output pixel's columns and samples."""
    return g.taps * np.dtype(dtype).itemsize * (g.channels + 12 * g.offset_groups)


def _step(g: Geometry, dtype: type) -> int:
    """Output pixels of a block."""
    return max(256, _BLOCK // _pixel_bytes(g, dtype))


def _blocks(g: Geometry, images: range, dtype: type) -> list[Block]:
    step = _step(g, dtype)
    return [(n, slice(p, min(p + step, g.out_pixels))) for n in images for p in range(0, g.out_pixels, step)]


def _by_image(g: Geometry, images: range, groups: list[np.ndarray]) -> Images:
    """Of the images' offset groups, one after another."""
    return {n: groups[i * g.offset_groups : (i + 1) * g.offset_groups] for i, n in enumerate(images)}


def _interiors(g: Geometry, images: Images) -> list[np.ndarray]:
    """(H, W, C / offset_groups) of each offset group of each image, views."""
    return [interior(pixels, g.height, g.width) for image in images.values() for pixels in image]


def _planes(g: Geometry, input: np.ndarray, images: range) -> list[np.ndarray]:
    """The same of (N, C, H, W)."""
    size = g.channels // g.offset_groups
    return [input[n, c : c + size].transpose(1, 2, 0) for n in images for c in range(0, g.channels, size)]


def _flat(g: Geometry, images: list[Any]) -> list[Any]:
    """(N, C, H_out * W_out) of images of the output's size: views, or a copy for all blocks."""
    return [None if image is None else image.reshape(*image.shape[:2], g.out_pixels) for image in images]


def _taps(g: Geometry, image: np.ndarray, group: int, parts: int) -> np.ndarray:
    """(K, parts, H_out * W_out) of one offset group in an image of offsets (2 parts) or of masks (1 part)."""
    size = g.taps * parts
    return image[group * size : (group + 1) * size].reshape(g.taps, parts, g.out_pixels)


def _sampler(g: Geometry, offset: np.ndarray, mask: Any, block: Block, group: int, dtype: type) -> Sampler:
    """Samples at (Q, K): each output pixel's taps."""
    n, part = block
    pixel, tap = np.divmod(np.arange(part.start, part.stop), g.out_width), np.divmod(np.arange(g.taps), g.kernel[1])
    places = np.empty((2, part.stop - part.start, g.taps), dtype)
    for axis in (0, 1):
        first = pixel[axis] * g.stride[axis] - g.padding[axis]
        places[axis] = first[:, None] + tap[axis] * g.dilation[axis]
    shift: np.ndarray = _taps(g, offset[n], group, 2)[:, :, part].astype(dtype, copy=False)
    places += shift.transpose(1, 2, 0)
    modulation: Any = None if mask is None else _taps(g, mask[n], group, 1)[:, 0, part].T.astype(dtype, copy=False)
    return Sampler(places, g.height, g.width, modulation)


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
