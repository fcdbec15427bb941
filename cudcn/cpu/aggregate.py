"""dcnv3, dcnv4 and ms_deform_attn on NumPy arrays: a sparse matrix whose rows sum the samples of a query and group.

Work is split by image and groups, which share nothing; the queries of one piece are taken some rows at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..check import arithmetic
from .parallel import ordered, threads
from .sampling import Sampler, padded, unpadded

if TYPE_CHECKING:
    from ..ops.aggregate import Geometry, Level

_CHUNK = 1 << 16  # samples of one level


def forward(g: Geometry, out: Any, *tensors: Any) -> None:
    out, levels = g.by_group(out), g.images(*tensors)

    def aggregate(n: int, groups: slice) -> None:
        samples = _Samples(g, tensors, levels, n, groups)
        for rows in samples.chunks():
            weights = samples.weights(rows)
            totals = [
                samples.sampler(rows, index).value(weights[:, index]) @ pixels
                for index, pixels in enumerate(samples.pixels)
            ]
            part = out[n, rows, :, groups]
            part[...] = sum(totals).reshape(part.shape)

    _in_pieces(g, aggregate)


def backward(g: Geometry, grads: Any, grad_output: Any, *tensors: Any) -> None:
    grad_output, levels = g.by_group(grad_output), g.images(*tensors)
    grad_image, grad_places, grad_weights = g.parts(*grads)
    if (unused := g.unused(*grads)) is not None:
        unused[...] = 0

    def differentiate(n: int, groups: slice) -> None:
        samples = _Samples(g, tensors, levels, n, groups)
        sums = [np.zeros_like(pixels) for pixels in samples.pixels]
        for rows in samples.chunks():
            weights = samples.weights(rows)
            vectors = grad_output[n, rows, :, groups].reshape(-1, g.group_channels).astype(samples.dtype, copy=False)
            products = np.empty_like(weights)
            for index, (level, pixels) in enumerate(zip(levels, samples.pixels, strict=True)):
                sampler = samples.sampler(rows, index)
                if grad_image is not None:
                    sums[index] += sampler.value(weights[:, index]).T @ vectors
                if grad_places is None and grad_weights is None:
                    continue
                products[:, index], *slopes = sampler.products(pixels, vectors)
                if grad_places is not None:
                    part = grad_places[n, rows, :, groups, index]
                    for axis in (0, 1):
                        slope = slopes[axis] * weights[:, index] * samples.dtype(g.scale(level)[axis])
                        part[..., 1 - axis] = slope.reshape(part.shape[:-1])
            if grad_weights is not None:
                if g.softmax:
                    products = weights * (products - (weights * products).sum((1, 2), keepdims=True))
                part = grad_weights[n, rows, :, groups]
                part[...] = products.reshape(part.shape)
        if grad_image is not None:
            image = grad_image[n, ..., groups, :]
            image[...] = 0
            for level, total in zip(levels, sums, strict=True):
                plane = g.plane(image, level)
                grad = unpadded(total, level.height, level.width).transpose(1, 2, 0)
                plane[...] = plane + grad.reshape(plane.shape)

    _in_pieces(g, differentiate)


class _Samples:
    """Of some groups of one image: R rows, each a query of a group, of L levels of P points."""

    def __init__(self, g: Geometry, tensors: Any, levels: list[Level], n: int, groups: slice) -> None:
        image, places, weights = g.parts(*tensors)
        self.g, self.levels, self.groups = g, levels, groups.stop - groups.start
        self.dtype = arithmetic(image)
        self._places, self._weights = places[n, :, :, groups], weights[n, :, :, groups]
        planes = [g.plane(image[n, ..., groups, :], level) for level in levels]
        self.pixels = [self._padded(plane.reshape(*plane.shape[:2], -1)) for plane in planes]

    def _padded(self, plane: np.ndarray) -> np.ndarray:
        """(pixels * groups, D)"""
        return padded(plane.transpose(2, 0, 1), self.dtype).reshape(-1, self.g.group_channels)

    def chunks(self) -> Iterator[slice]:
        """Rows of queries."""
        height, width = self.g.queries
        step = max(1, _CHUNK // (width * self.groups * self.g.points))
        return (slice(row, min(row + step, height)) for row in range(0, height, step))

    def weights(self, rows: slice) -> np.ndarray:
        """(R, L, P)"""
        weights = self._weights[rows].astype(self.dtype, copy=False).reshape(-1, self.g.levels, self.g.points)
        if not self.g.softmax:
            return weights
        exponentials = np.exp(weights - weights.max((1, 2), keepdims=True))
        return exponentials / exponentials.sum((1, 2), keepdims=True)

    def sampler(self, rows: slice, index: int) -> Sampler:
        """Of the samples in one level; each row of its matrices sums P."""
        g, level = self.g, self.levels[index]
        xy = self._places[rows, :, :, index]
        places = np.empty((2, *xy.shape[:-1]), self.dtype)
        for axis in (0, 1):
            np.multiply(xy[..., 1 - axis], self.dtype(g.scale(level)[axis]), out=places[axis])
            places[axis] += g.origin(axis, rows, self.dtype)
        first = g.points * np.arange(places[0].size // g.points + 1)
        return Sampler(places, level.height, level.width, first, self.groups)


def _in_pieces(g: Geometry, work: Callable[[int, slice], None]) -> None:
    """Whole images, or as many parts of each as give every thread one."""
    parts = min(g.groups, -(-threads() // g.batch))
    bounds = [g.groups * part // parts for part in range(parts + 1)]
    items = [(n, slice(*groups)) for n in range(g.batch) for groups in itertools.pairwise(bounds)]

    def quietly(item: tuple[int, slice]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass through, as in the kernels
            work(*item)

    size = g.batch * math.prod(g.queries) * g.groups * g.levels * g.points * g.group_channels * 4
    for _ in ordered(quietly, items, size):
        pass
