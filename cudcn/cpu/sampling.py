"""Bilinear sampling as a sparse matrix: each row holds the four weights of one sample, or of several.

Its product with the pixels samples, its transpose scatters gradients. One pixel of zeros before the others stands for
all that is outside the image, so that a NaN in the image stays where it is. Samples that are left out lie there too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from .parallel import Team

_SHARE = 4 << 20  # bytes of sums that a thread leaves to be added up
_GATHERED = 1 << 20  # bytes of pixels copied at a time: more would leave the cache
_FEW = 16  # blocks whose shares may be summed in float32
_RUN = 128  # terms of one running sum in float32: it may lose 2e-6, and 16 times that in 16 times as many


def sums_of(blocks: int, dtype: type) -> type:
    """The type that sums over the blocks of an image are kept in."""
    return dtype if blocks <= _FEW else np.float64


def flattened(workers: Team, images: Sequence[np.ndarray], dtype: type) -> list[np.ndarray]:
    """(1 + pixels, C) of each image (..., C): a pixel of zeros, then the image's."""
    pixels: list[np.ndarray] = [np.empty((1 + math.prod(image.shape[:-1]), image.shape[-1]), dtype) for image in images]
    for each in pixels:
        each[0] = 0
    workers.copy((each[1:].reshape(image.shape), image) for each, image in zip(pixels, images, strict=True))
    return pixels


class Share(NamedTuple):
    at: tuple[slice | np.ndarray, slice]  # pixels and channels
    sums: np.ndarray


class Sampler:
    """The sampling operator at `places` (2, ...), y and x in pixels, of an image (height, width).

    Each row sums `points` places, in C order, each times its `modulation`. With several `planes`, an axis of `places`
    before its last counts them. The pixel of plane p at (y, x) is number first + (y * width + x) * stride + p of those
    that are sampled, not counting the pixel of zeros before them. `places` may be written to.

    A place is outside where it is <= -1 or >= the size along either axis, NaN or infinite. Its sample is left out
    whatever its modulation is. One at exactly -1 has slopes all the same, those of the cell [-1, 0].

    `discrete`: a place's sample is the pixel (floor(y), floor(x)), clamped into the image. Only NaN and infinity are
    outside.
    """

    def __init__(
        self,
        places: np.ndarray,
        height: int,
        width: int,
        modulation: np.ndarray | None,
        points: int = 1,
        planes: int = 1,
        stride: int = 1,
        first: int = 0,
        discrete: bool = False,
    ) -> None:
        flat, dtype = places.reshape(2, -1), places.dtype
        if discrete:
            flat[np.isinf(flat)] = np.nan
            np.floor(np.clip(flat, 0, np.nextafter(_ends(height, width, dtype), 0, dtype=dtype)), out=flat)
        inner: np.ndarray = np.logical_and(*((flat >= 0) & (flat < _ends(height - 1, width - 1, dtype))))  # NaN is not
        rim = np.flatnonzero(~inner)  # places with corners outside
        before_end = flat[:, rim] < _ends(height, width, dtype)
        sloped = np.logical_and(*((flat[:, rim] >= -1) & before_end))
        self._outside = rim[~sloped]
        self._left_out = rim[~np.logical_and(*((flat[:, rim] > -1) & before_end))]
        if self._outside.size:  # to some place that is not
            place = inner.argmax() if rim.size < inner.size else rim[sloped.argmax()]
            flat[:, self._outside] = flat[:, place, None] if self._outside.size < inner.size else 0
        cell = np.floor(flat)
        self._y, self._x = flat - cell

        row = width * stride
        top_row, end_row = max(0, int(cell[0].min())), min(height, int(cell[0].max()) + 2)
        self._touched = slice(first + top_row * row, first + (end_row - 1) * row + (width - 1) * stride + planes)
        index = np.int32 if max(first + (height + 1) * row, 4 * flat.shape[1]) < 2**31 else np.int64
        top, left = cell.astype(index)
        outside = _corners_outside(top[rim], left[rim], height, width)
        outside[~sloped] = True
        top *= index(row)
        left *= index(stride)
        top += left
        shift = np.arange(1 + first, 1 + first + planes, dtype=index)
        top_left = (top.reshape(-1, planes, places.shape[-1]) + shift[:, None]).ravel()
        self._corners = np.empty((top_left.size, 4), index)
        for corner, step in enumerate((0, stride, row, row + stride)):
            np.add(top_left, index(step), out=self._corners[:, corner])
        self._corners[rim] = np.where(outside, 0, self._corners[rim])
        if discrete:
            self._corners[:, 1:] = 0
        # samples that may lack a corner
        self._rim = slice(None) if discrete else rim
        self._rows = 4 * points * np.arange(top_left.size // points + 1, dtype=index)
        self._points = points
        self._modulation = None if modulation is None else modulation.ravel()
        self._made: csr_array | None = None

    @property
    def counted(self) -> np.ndarray:
        """(samples,): whether each is not left out."""
        counted = np.ones(len(self._corners), bool)
        counted[self._left_out] = False
        return counted

    @property
    def _operator(self) -> csr_array:
        """(rows, pixels to the last one touched), made once; a cached_property's lock would be shared by all threads,
        and by a fork."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> csr_array:
        bottom, right = self._y, self._x
        top, left = 1 - bottom, 1 - right
        if self._modulation is not None:
            modulation = self._modulation
            if self._left_out.size:
                modulation = modulation.copy()
                modulation[self._left_out] = 0
            top, bottom = top * modulation, bottom * modulation
        weights = np.empty(self._corners.shape, self._y.dtype)
        for corner, (row, column) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
            np.multiply(row, column, out=weights[:, corner])
        corners = self._corners
        if self._left_out.size > self._outside.size:
            corners = corners.copy()
            corners[self._left_out] = 0  # at -1 too: the pixels beside may be NaN
        shape = len(self._rows) - 1, 1 + self._touched.stop
        return csr_array((weights.ravel(), corners.ravel(), self._rows), shape=shape)

    def sums(self, pixels: np.ndarray) -> np.ndarray:
        """(rows, C): the sum of each row's samples."""
        operator, pixels = self._operator, pixels[: 1 + self._touched.stop]
        runs = math.ceil(4 * self._points / _RUN)
        if runs == 1:
            return operator @ pixels
        ends = np.minimum(self._rows[:-1, None] + _RUN * np.arange(1, runs + 1), self._rows[1:, None])
        rows = np.append(0, ends).astype(self._rows.dtype)
        parts = csr_array((operator.data, operator.indices, rows), shape=(ends.size, len(pixels))) @ pixels
        total = parts.reshape(-1, runs, pixels.shape[1]).sum(axis=1, dtype=np.float64)
        return total.astype(pixels.dtype, copy=False)

    def scattered(self, vectors: np.ndarray, samplers: int = 1) -> Iterable[Share]:
        """The samples' shares in the vectors of their rows, summed for each pixel that they touch.

        Many are not computed before they are asked for, and then some channels at a time. So are those of one of many
        `samplers` together.
        """
        weights, start = self._operator.data, self._touched.start
        corners, width = self._operator.indices - start, 1 + self._touched.stop - start
        np.maximum(corners, 0, out=corners)
        touched: slice | np.ndarray = self._touched
        if width > corners.size:  # few of the pixels in the rows between the first and the last one
            numbers, corners = np.unique(np.append(0, corners), return_inverse=True)  # 0 remains 0
            touched, width = numbers[1:] + (start - 1), len(numbers)
            corners = corners[1:].astype(self._rows.dtype)
        last = corners[3::4].copy()  # or any other: neighbours of a heap have one too
        last[self._rim] = corners.reshape(-1, 4)[self._rim].max(axis=1)
        samples_of_a_cell = np.bincount(last)[1:]
        if vectors.dtype == np.float32 and 4 * samples_of_a_cell.max(initial=0) > _RUN:
            weights, vectors = weights.astype(np.float64), vectors.astype(np.float64)
        scatter = csr_array((weights, corners, self._rows), shape=(len(self._rows) - 1, width)).T
        if width * vectors.shape[1] * vectors.itemsize * samplers <= _SHARE:
            return [Share((touched, slice(None)), (scatter @ vectors)[1:])]
        step = max(1, _SHARE // (width * vectors.itemsize))
        channels = (slice(c, c + step) for c in range(0, vectors.shape[1], step))
        return (Share((touched, some), (scatter @ vectors[:, some])[1:]) for some in channels)

    def products(self, pixels: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The products of each row's vector with the values at its places, and with their modulated slopes along y, x.

        Each (rows, points).
        """
        corners = self._corners.reshape(len(vectors), -1)
        products = np.empty((*corners.shape, 1), pixels.dtype)
        step = max(1, _GATHERED // (corners.shape[1] * pixels[:1].nbytes))
        gathered = np.empty((min(step, len(vectors)), corners.shape[1], pixels.shape[1]), pixels.dtype)
        for part in (slice(row, row + step) for row in range(0, len(vectors), step)):
            # with an `out`, any mode but "raise" writes to it directly
            found = np.take(pixels, corners[part], axis=0, out=gathered[: len(vectors[part])], mode="clip")
            np.matmul(found, vectors[part, :, None], out=products[part])
        top_left, top_right, bottom_left, bottom_right = products.reshape(-1, 4).T
        top, bottom = top_right - top_left, bottom_right - bottom_left
        slope_y = (bottom_left - top_left) + self._x * (bottom - top)
        slope_x = top + self._y * (bottom - top)
        value = top_left + self._x * top + self._y * slope_y
        value[self._left_out] = 0
        if self._modulation is not None:
            slope_y, slope_x = slope_y * self._modulation, slope_x * self._modulation
        slope_y[self._outside] = slope_x[self._outside] = 0
        return tuple(product.reshape(len(vectors), -1) for product in (value, slope_y, slope_x))


def _corners_outside(top: np.ndarray, left: np.ndarray, height: int, width: int) -> np.ndarray:
    """(cells, 4): whether the image lacks the corner at the top left, top right, bottom left, bottom right."""
    rows = np.stack([top < 0, top + 1 >= height], axis=1)
    columns = np.stack([left < 0, left + 1 >= width], axis=1)
    return (rows[:, :, None] | columns[:, None]).reshape(-1, 4)


@functools.lru_cache
def _ends(height: int, width: int, dtype: np.dtype) -> np.ndarray:
    """(2, 1) of the type's least numbers that are not below the sizes, so that no number comes between."""
    ends: np.ndarray = np.array([[height], [width]], dtype)
    return np.where(ends.astype(np.float64) < [[height], [width]], np.nextafter(ends, dtype.type(np.inf)), ends)
