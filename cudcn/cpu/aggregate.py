"""dcnv3, dcnv4 and ms_deform_attn on NumPy arrays: a sparse matrix whose rows sum the samples of a query and group.

Work is split into blocks of one image's queries. Neither the blocks nor the order in which they are summed depend on
the number of threads.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..check import arithmetic
from .parallel import HELD, Team, batches, team
from .sampling import Sampler, interior, padded, sums_of, zeros

if TYPE_CHECKING:
    from ..ops.aggregate import Geometry, Level

_CHUNK = 16 << 20  # bytes of a block, by estimate

Block = tuple[int, slice, slice]  # an image, and the rows and columns of some of its queries
Images = dict[int, list[np.ndarray]]  # (pixels * groups, D) of each level of an image, with its border


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: Geometry, out: Any, *tensors: Any) -> None:
    image, places, weights = g.parts(*tensors)
    out, levels, dtype = g.by_group(out), g.images(*tensors), arithmetic(image)

    def aggregate(block: Block) -> None:
        n, rows, columns = block
        factors = _weights(g, weights[n, rows, columns], dtype)
        total: Any = 0
        for index, level in enumerate(levels):
            sampler = _sampler(g, level, index, places, factors, block)
            total = total + sampler.sums(pixels[n][index])
        part = out[n, rows, columns]
        part[...] = total.reshape(part.shape)

    with _team(g, dtype, _CHUNK // 2) as workers:
        for images in batches(g.batch, g.pixels * g.groups * g.group_channels * np.dtype(dtype).itemsize):
            pixels = _padded(g, workers, image, levels, images, dtype)
            for _ in workers.ordered(aggregate, _blocks(g, images)):
                pass


@np.errstate(all="ignore")
def backward(g: Geometry, grads: Any, grad_output: Any, *tensors: Any) -> None:
    image, places, weights = g.parts(*tensors)
    grad_output, levels, dtype = g.by_group(grad_output), g.images(*tensors), arithmetic(image)
    grad_image, grad_places, grad_weights = g.parts(*grads)
    if (unused := g.unused(*grads)) is not None:
        unused[...] = 0

    def differentiate(block: Block) -> list[Any]:
        """The block's shares of the levels' gradients; places and weights are its own to write."""
        n, rows, columns = block
        factors = _weights(g, weights[n, rows, columns], dtype)
        vectors = grad_output[n, rows, columns].reshape(-1, g.group_channels).astype(dtype, copy=False)
        products, counted = np.zeros_like(factors), np.zeros(factors.shape, bool)
        shares = []
        for index, level in enumerate(levels):
            sampler = _sampler(g, level, index, places, factors, block)
            if sums:
                shares.append(sampler.scattered(vectors))
            if pixels:
                products[:, index], *slopes = sampler.products(pixels[n][index], vectors)
                counted[:, index] = sampler.counted.reshape(-1, g.points)
                if grad_places is not None:
                    part = grad_places[n, rows, columns, :, index]
                    for axis in (0, 1):
                        slope = slopes[axis] * dtype(g.scale(level)[axis])
                        part[..., 1 - axis] = slope.reshape(part.shape[:-1])
        if pixels and grad_weights is not None:
            if g.softmax:
                # factors that are NaN are so all together: they count where any sample does
                mean = (factors * products).sum((1, 2), keepdims=True)
                products = np.where(counted.any((1, 2), keepdims=True), factors * (products - mean), 0)
            part = grad_weights[n, rows, columns]
            part[...] = products.reshape(part.shape)
        return shares

    def accumulate() -> None:
        for (n, *_), shares in zip(blocks, workers.ordered(differentiate, blocks), strict=True):
            for total, level_shares in zip(sums[n] if sums else (), shares, strict=True):
                for share in level_shares:
                    total[share.at] += share.sums

    with _team(g, dtype, _CHUNK // 2 + (2 << 20) * g.levels) as workers:
        numbers = g.pixels * g.groups * g.group_channels  # of an image
        for images in batches(g.batch, 12 * numbers):
            blocks = _blocks(g, images)
            pixels: Images = {}
            sums: Images = {}
            sum_type = sums_of(len(blocks) // len(images), dtype)
            if grad_places is not None or grad_weights is not None:
                pixels = _padded(g, workers, image, levels, images, dtype)
            if grad_image is not None:
                if pixels and sum_type == np.float64 and 4 * numbers > HELD:
                    accumulate()
                    pixels = {}  # for the sums to take their place
                sums = {n: [_zeros(g, level, sum_type) for level in levels] for n in images}
            accumulate()
            if grad_image is not None:
                _store(g, workers, levels, grad_image, sums)


def _team(g: Geometry, dtype: type, scratch: int) -> Any:
    size = g.batch * math.prod(g.queries) * g.groups * g.levels * g.points * g.group_channels * np.dtype(dtype).itemsize
    return team(size, scratch)


def _blocks(g: Geometry, images: range) -> list[Block]:
    """Some rows of queries, or part of one row."""
    height, width = g.queries
    queries = max(1, _CHUNK // (g.groups * g.points * (4 * g.group_channels + 128)))
    down, across = max(1, queries // width), min(width, queries)
    return [
        (n, slice(y, min(y + down, height)), slice(x, min(x + across, width)))
        for n, y, x in itertools.product(images, range(0, height, down), range(0, width, across))
    ]


def _padded(g: Geometry, workers: Team, image: np.ndarray, levels: list[Level], images: range, dtype: type) -> Images:
    planes = _planes(g, image, levels, images)
    pixels = padded(workers, [plane.reshape(*plane.shape[:2], -1) for plane in planes], dtype)
    rows = [p.reshape(-1, g.group_channels) for p in pixels]
    return {n: rows[i * len(levels) : (i + 1) * len(levels)] for i, n in enumerate(images)}


def _zeros(g: Geometry, level: Level, dtype: type) -> np.ndarray:
    return zeros(level.height, level.width, g.groups * g.group_channels, dtype).reshape(-1, g.group_channels)


def _interiors(g: Geometry, levels: list[Level], images: Images) -> list[np.ndarray]:
    """(H, W, groups, D) of each level of each image, views."""
    return [
        interior(pixels, level.height, level.width).reshape(level.height, level.width, g.groups, -1)
        for image in images.values()
        for level, pixels in zip(levels, image, strict=True)
    ]


def _planes(g: Geometry, image: np.ndarray, levels: list[Level], images: range) -> list[np.ndarray]:
    """The same of (N, ..., groups, D)."""
    return [g.plane(image[n], level) for n in images for level in levels]


def _store(g: Geometry, workers: Team, levels: list[Level], grad_image: np.ndarray, sums: Images) -> None:
    """The levels' gradients, in one image; 0 in the pixels of none, and rounded once where levels overlap."""
    spans = sorted((level.first, level.first + level.height * level.width) for level in levels)
    if any(end > first for (_, end), (first, _) in itertools.pairwise(spans)):
        for n, totals in sums.items():
            image = np.zeros(grad_image.shape[1:])
            for level, total in zip(levels, _interiors(g, levels, {n: totals}), strict=True):
                plane = g.plane(image, level)
                plane += total
            grad_image[n] = image
    else:
        images = range(min(sums), max(sums) + 1)
        grad_image[images.start : images.stop] = 0
        workers.copy(zip(_planes(g, grad_image, levels, images), _interiors(g, levels, sums), strict=True))


def _weights(g: Geometry, weights: np.ndarray, dtype: type) -> np.ndarray:
    """(queries * groups, L, P)"""
    weights = weights.astype(dtype, copy=False).reshape(-1, g.levels, g.points)
    if not g.softmax:
        return weights
    exponentials = np.exp(weights - weights.max((1, 2), keepdims=True))
    return exponentials / exponentials.sum((1, 2), keepdims=True)


def _sampler(g: Geometry, level: Level, index: int, places: np.ndarray, factors: np.ndarray, block: Block) -> Sampler:
    """Of a block's samples in one level; each row sums those of a query and group."""
    n, rows, columns = block
    xy, dtype = places[n, rows, columns, :, index], factors.dtype.type
    positions = np.empty((2, *xy.shape[:-1]), dtype)
    for axis in (0, 1):
        np.multiply(xy[..., 1 - axis], dtype(g.scale(level)[axis]), out=positions[axis])
        origin = np.asarray(g.origin(axis, rows, dtype))
        positions[axis] += origin[columns] if axis == 1 and origin.ndim else origin
    return Sampler(positions, level.height, level.width, factors[:, index], g.points, g.groups)
