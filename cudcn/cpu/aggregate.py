"""dcnv3, dcnv4 and ms_deform_attn on NumPy arrays: a sparse matrix whose rows sum a query's samples.

Work is split by image and group, which share nothing; the queries of one are taken some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..check import arithmetic
from .parallel import ordered
from .sampling import Sampler, padded, unpadded

if TYPE_CHECKING:
    from ..ops.aggregate import Attention, Level, Windows

    Geometry = Windows | Attention

_CHUNK = 8 << 20  # bytes of the pixels that some rows of queries touch


def forward(g: Geometry, out: Any, *tensors: Any) -> None:
    out, levels = g.by_group(out), g.images(*tensors)

    def aggregate(n: int, group: int) -> None:
        samples = _Samples(g, tensors, levels, n, group)
        for rows in samples.chunks():
            weights = samples.weights(rows)
            totals = [
                samples.sampler(rows, index).value(weights[:, index]) @ plane
                for index, plane in enumerate(samples.planes)
            ]
            part = out[n, rows, :, group]
            part[...] = sum(totals).reshape(part.shape)

    _for_each_group(g, aggregate)


def backward(g: Geometry, grads: Any, grad_output: Any, *tensors: Any) -> None:
    grad_output, levels = g.by_group(grad_output), g.images(*tensors)
    grad_image, grad_places, grad_weights = g.parts(*grads)
    if g.packed and grads[1] is not None:
        g.unused(grads[1])[...] = 0

    def differentiate(n: int, group: int) -> None:
        samples = _Samples(g, tensors, levels, n, group)
        sums = [np.zeros_like(plane) for plane in samples.planes]
        for rows in samples.chunks():
            weights = samples.weights(rows)
            vectors = grad_output[n, rows, :, group].reshape(-1, g.group_channels).astype(samples.dtype, copy=False)
            products = np.empty_like(weights)
            for index, (level, plane) in enumerate(zip(levels, samples.planes, strict=True)):
                sampler = samples.sampler(rows, index)
                if grad_image is not None:
                    sums[index] += sampler.value(weights[:, index]).T @ vectors
                if grad_places is None and grad_weights is None:
                    continue
                products[:, index], *slopes = sampler.products(plane, vectors)
                if grad_places is not None:
                    part = grad_places[n, rows, :, group, index]
                    for axis, slope, scale in zip((1, 0), slopes, g.scale(level), strict=True):
                        part[..., axis] = (weights[:, index] * slope * samples.dtype(scale)).reshape(part.shape[:-1])
            if grad_weights is not None:
                if g.softmax:
                    products = weights * (products - (weights * products).sum((1, 2), keepdims=True))
                part = grad_weights[n, rows, :, group]
                part[...] = products.reshape(part.shape)
        if grad_image is not None:
            image = grad_image[n, ..., group, :]
            image[...] = 0
            for level, total in zip(levels, sums, strict=True):
                plane = g.plane(image, level)
                plane[...] = plane + unpadded(total, level.height, level.width).transpose(1, 2, 0)

    _for_each_group(g, differentiate)


class _Samples:
    """Of one image and group. Q queries of L levels of P points."""

    def __init__(self, g: Geometry, tensors: Any, levels: list[Level], n: int, group: int) -> None:
        image, places, weights = g.parts(*tensors)
        self.g, self.levels = g, levels
        self.dtype = arithmetic(image)
        self._places, self._weights = places[n, :, :, group], weights[n, :, :, group]
        pixels = image[n, ..., group, :]
        self.planes = [padded(g.plane(pixels, level).transpose(2, 0, 1), self.dtype) for level in levels]

    def chunks(self) -> Iterator[slice]:
        """Rows of queries."""
        g = self.g
        step = max(1, _CHUNK // (g.queries[1] * _bytes_per_query(g)))
        return (slice(row, min(row + step, g.queries[0])) for row in range(0, g.queries[0], step))

    def weights(self, rows: slice) -> np.ndarray:
        """(Q, L, P)"""
        weights = self._weights[rows].astype(self.dtype).reshape(-1, self.g.levels, self.g.points)
        if not self.g.softmax:
            return weights
        exponentials = np.exp(weights - weights.max((1, 2), keepdims=True))
        return exponentials / exponentials.sum((1, 2), keepdims=True)

    def sampler(self, rows: slice, index: int) -> Sampler:
        """Of (Q, P) samples in one level; each row of its matrices is a query."""
        level, points = self.levels[index], self.g.points
        xy = self._places[rows, :, index].astype(self.dtype, copy=False).reshape(-1, points, 2)
        scale = np.array(self.g.scale(level), self.dtype).reshape(2, 1, 1)
        places = self.g.origins(rows, self.dtype) + scale * xy.transpose(2, 0, 1)[::-1]
        return Sampler(places, level.height, level.width, points * np.arange(len(xy) + 1))


def _bytes_per_query(g: Geometry) -> int:
    return 4 * g.levels * g.points * g.group_channels * 4


def _for_each_group(g: Geometry, work: Callable[[int, int], None]) -> None:
    def quietly(item: tuple[int, int]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass through, as in the kernels
            work(*item)

    items = list(np.ndindex(g.batch, g.groups))
    for _ in ordered(quietly, items, len(items) * math.prod(g.queries) * _bytes_per_query(g)):
        pass
