"""deform_conv2d on NumPy arrays: sample columns with a sparse matrix, multiply them with the weights.

Work is split into blocks of one image's output pixels; Q is their number, h * w, and K the kernel's taps. Neither the
blocks nor the order in which they are summed depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import arithmetic
from ..geometry import Convolution
from .parallel import HELD, Team, batches, team, tiles
from .sampling import Sampler, flattened, sums_of

_BLOCK = 3 << 20  # bytes of a block's columns, samples and results
_LARGE = 11 << 20  # the same, where so few pixels would make slow products
_FEW_PIXELS = 256
_WAVE = 8 << 20  # bytes of the columns that wait for their product with grad_output
_SLICE = 144  # columns of the weight's gradient that one thread multiplies: fewer would not be fast
_PRODUCT = 1 << 20  # bytes of them
_RUN = 1024  # pixels of one product in float32; products are summed in float64

Block = tuple[int, slice, slice]  # an image, and the rows and columns of some of its output pixels
Images = dict[int, list[np.ndarray]]  # (.., C / offset_groups) of each offset group of an image


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: Convolution, out: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    input, out, offset, mask = g.nchw(input, out, offset, mask)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)

    def convolve(block: Block) -> None:
        n, *part = block
        # column[q, k, c] = mask[k, q] * bilinear(input[c], place[q, k]);  out[o, q] = weight[o] . column[q] + bias[o]
        columns = [
            _sampler(g, offset, mask, block, group, dtype).sums(pixels[n][group]) for group in range(g.offset_groups)
        ]
        product = _by_group(g, _joined(g, columns)) @ matrix
        if bias is not None:
            product += bias.astype(dtype).reshape(g.groups, 1, -1)
        result = out[n][:, *part]
        result[...] = _by_channel(g, product).reshape(result.shape)

    with _team(g, dtype, copies=2) as workers:
        for images in batches(g.batch, g.channels * g.height * g.width * np.dtype(dtype).itemsize):
            pixels = _pixels(g, workers, input, images, dtype)
            workers.each(convolve, _blocks(g, images, dtype))


@np.errstate(all="ignore")
def backward(
    g: Convolution, grads: Any, grad_output: Any, input: Any, offset: Any, weight: Any, bias: Any, mask: Any
) -> None:
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = grads
    input, grad_input, grad_output = g.nchw(input, grad_input, grad_output)
    offset, mask, grad_offset, grad_mask = g.nchw(offset, mask, grad_offset, grad_mask)
    dtype = arithmetic(input)
    matrix = _matrix(g, weight, dtype)
    weight_sum: np.ndarray = np.zeros((g.groups, g.out_channels // g.groups, matrix.shape[1]))
    bias_sum = np.zeros(g.out_channels)

    def differentiate(block: Block) -> Any:
        """The block's shares of the image's gradient, and what the weight's is made of; offset and mask are its own."""
        n, *part = block
        # d column[q, k, c] = sum over o of grad_output[o, q] * weight[o, c, k]
        grad_product = grad_output[n][:, *part].reshape(g.groups, g.out_channels // g.groups, -1).astype(dtype)
        grad_columns = _by_offset_group(g, grad_product.transpose(0, 2, 1) @ matrix.transpose(0, 2, 1))
        shares, columns = [], []
        for group, grad_samples in enumerate(grad_columns):
            # d input = each sample's four weights times d column[q, k], added to its pixels
            # d mask[k, q] = sum over c of d column[q, k, c] * value;  d offset[k, q] alike, with mask * slope
            sampler = _sampler(g, offset, mask, block, group, dtype)
            if sums:
                shares.append(sampler.scattered(grad_samples, g.offset_groups))
            if pixels and (grad_offset is not None or grad_mask is not None):
                shape = *(some.stop - some.start for some in part), g.taps
                products = [p.reshape(shape) for p in sampler.products(pixels[n][group], grad_samples)]
                if grad_mask is not None:
                    _taps(g, grad_mask, block, group, 1)[..., 0] = products[0]
                if grad_offset is not None:
                    for axis in (0, 1):
                        _taps(g, grad_offset, block, group, 2)[..., axis] = products[1 + axis]
            if pixels and grad_weight is not None:
                columns.append(sampler.sums(pixels[n][group]))
        bias_share = grad_product.sum(2, dtype=np.float64).ravel()
        return shares, bias_share, (grad_product, _by_group(g, _joined(g, columns))) if columns else None

    def multiply(part: slice) -> None:
        """Some columns of the weight's gradient."""
        # d weight[o, c, k] = sum over q of grad_output[o, q] * column[q, k, c]
        for grad_product, columns in kept:
            for run in (slice(first, first + _RUN) for first in range(0, columns.shape[1], _RUN)):
                weight_sum[:, :, part] += grad_product[:, :, run] @ columns[:, run, part]

    def accumulate() -> None:
        for (n, *_), (shares, bias_share, factors) in zip(blocks, workers.ordered(differentiate, blocks), strict=True):
            for total, group_shares in zip(sums[n] if sums else (), shares, strict=True):
                for share in group_shares:
                    total[share.at] += share.sums
            if pixels:
                bias_sum[...] += bias_share
            if factors is not None:
                kept.append(factors)
                if sum(array.nbytes for factors in kept for array in factors) >= _WAVE:
                    multiply_kept()
        multiply_kept()

    def multiply_kept() -> None:
        step = max(1, min(_SLICE, _PRODUCT // (g.out_channels * matrix.itemsize)))
        columns = range(0, matrix.shape[1] if kept else 0, step)
        workers.each(multiply, [slice(column, column + step) for column in columns])
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
                pixels = _pixels(g, workers, input, images, dtype)
            if grad_input is not None:
                if pixels and sum_type == np.float64 and 4 * numbers > HELD:
                    accumulate()
                    pixels = {}  # for the sums to take their place
                size = g.height * g.width, g.channels // g.offset_groups
                sums = {n: [np.zeros(size, sum_type) for _ in range(g.offset_groups)] for n in images}
            accumulate()
            for n, totals in sums.items():
                planes = _planes(g, grad_input[n])
                workers.copy((plane, total.reshape(plane.shape)) for plane, total in zip(planes, totals, strict=True))

    if grad_weight is not None:
        grad_weight[...] = weight_sum.reshape(g.out_channels, *g.kernel, -1).transpose(0, 3, 1, 2)
    if grad_bias is not None:
        grad_bias[...] = bias_sum


def _team(g: Convolution, dtype: type, copies: int) -> Any:
    """For blocks that need their size in bytes `copies` times."""
    return team(g.batch * g.out_pixels * _pixel_bytes(g, dtype), copies * _step(g, dtype) * _pixel_bytes(g, dtype))


def _pixel_bytes(g: Convolution, dtype: type) -> int:
    """What an output pixel takes: its columns, one offset group's samples, and results."""
    return np.dtype(dtype).itemsize * (g.taps * (g.channels + 12) + 2 * g.out_channels)


def _step(g: Convolution, dtype: type) -> int:
    """Output pixels of a block."""
    size = _pixel_bytes(g, dtype)
    return max(1, _BLOCK // size, min(_FEW_PIXELS, _LARGE // size))


def _blocks(g: Convolution, images: range, dtype: type) -> list[Block]:
    return [(n, *tile) for n in images for tile in tiles(g.out_height, g.out_width, _step(g, dtype))]


def _pixels(g: Convolution, workers: Team, input: np.ndarray, images: range, dtype: type) -> Images:
    return {n: flattened(workers, _planes(g, input[n]), dtype) for n in images}


def _planes(g: Convolution, image: np.ndarray) -> list[np.ndarray]:
    """(H, W, C / offset_groups) of each offset group of (C, H, W), views."""
    size = g.channels // g.offset_groups
    return [image[c : c + size].transpose(1, 2, 0) for c in range(0, g.channels, size)]


def _taps(g: Convolution, images: np.ndarray, block: Block, group: int, parts: int) -> np.ndarray:
    """(h, w, K, parts) of a block and offset group in images of offsets (2 parts) or of masks (1 part), a view."""
    n, rows, columns = block
    size = g.taps * parts
    own = images[n, group * size : (group + 1) * size, rows, columns]
    return own.reshape(g.taps, parts, *own.shape[1:]).transpose(2, 3, 0, 1)


def _sampler(g: Convolution, offset: np.ndarray, mask: Any, block: Block, group: int, dtype: type) -> Sampler:
    """Samples at (h, w, K): each output pixel's taps."""
    tap = np.divmod(np.arange(g.taps), g.kernel[1])
    shift = _taps(g, offset, block, group, 2)
    places = np.empty((2, *shift.shape[:3]), dtype)
    for axis, some in enumerate(block[1:]):
        first = np.arange(some.start, some.stop) * g.stride[axis] - g.padding[axis]
        window = first[:, None] + tap[axis] * g.dilation[axis]
        places[axis] = window[:, None] if axis == 0 else window
        places[axis] += shift[..., axis]
    modulation: Any = None if mask is None else _taps(g, mask, block, group, 1)[..., 0].astype(dtype, copy=False)
    return Sampler(places, g.height, g.width, modulation)


def _matrix(g: Convolution, weight: np.ndarray, dtype: type) -> np.ndarray:
    """(groups, K * C_in / groups, C_out / groups)"""
    split = weight.reshape(g.groups, g.out_channels // g.groups, -1, *g.kernel).transpose(0, 3, 4, 2, 1)
    return np.ascontiguousarray(split, dtype).reshape(g.groups, -1, g.out_channels // g.groups)


def _joined(g: Convolution, columns: list[np.ndarray]) -> np.ndarray:
    """(Q, K, C_in) of the offset groups' samples, each (Q * K, C_in / offset_groups)."""
    return np.concatenate(columns, axis=1).reshape(-1, g.taps, g.channels) if len(columns) > 1 else columns[0]


def _by_group(g: Convolution, columns: np.ndarray) -> np.ndarray:
    """(groups, Q, K * C_in / groups) of (Q, K, C_in)"""
    split = columns.reshape(-1, g.taps, g.groups, g.channels // g.groups)
    return split.transpose(2, 0, 1, 3).reshape(g.groups, split.shape[0], -1)


def _by_offset_group(g: Convolution, columns: np.ndarray) -> np.ndarray:
    """(offset_groups, Q * K, C_in / offset_groups) of (groups, Q, K * C_in / groups)"""
    joined = columns.reshape(g.groups, -1, g.taps, g.channels // g.groups).transpose(1, 2, 0, 3)
    return joined.reshape(-1, g.offset_groups, g.channels // g.offset_groups).transpose(1, 0, 2)


def _by_channel(g: Convolution, product: np.ndarray) -> np.ndarray:
    """(C_out, Q) of (groups, Q, C_out / groups)"""
    return product.transpose(0, 2, 1).reshape(g.out_channels, -1)
