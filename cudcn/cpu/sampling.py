"""Bilinear sampling as a sparse matrix: each row holds the four weights of one sample, or of several.

Its product with the pixels samples, its transpose scatters gradients. Pixels have a border of zeros that stands for all
that is outside the image, so no corner needs a test of its own and a NaN in the image stays where it is. Samples that
are left out lie in the border too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from .parallel import Team

_BORDER = 1  # on each side
_STRIP = 1 << 20  # bytes copied at a time
_SHARE = 4 << 20  # bytes of sums that a thread leaves to be added up
_GATHERED = 1 << 20  # bytes of pixels copied at a time: more would leave the cache
_FEW = 16  # blocks whose shares may be summed in float32
_RUN = 128  # terms of one running sum in float32: it may lose 2e-6, and 16 times that in 16 times as many


def sums_of(blocks: int, dtype: type) -> type:
    """The type that sums over the blocks of an image are kept in."""
    return dtype if blocks <= _FEW else np.float64


def padded(workers: Team, images: Sequence[np.ndarray], dtype: type) -> list[np.ndarray]:
    """(pixels, C) of each image (H, W, C) with its border."""
    grids = [np.empty((len(i) + 2 * _BORDER, i.shape[1] + 2 * _BORDER, i.shape[2]), dtype) for i in images]

    def fill(strip: tuple[np.ndarray, np.ndarray, int, int]) -> None:
        grid, image, start, stop = strip
        grid[start:stop] = 0  # more than the border: what has just been zeroed is in the cache when it is written
        part = image[max(0, start - _BORDER) : stop - _BORDER]
        grid[max(start, _BORDER) :][: len(part), _BORDER:-_BORDER] = part

    strips = []
    for grid, image in zip(grids, images, strict=True):
        step = max(1, _STRIP * len(grid) // grid.nbytes)
        strips += [(grid, image, row, row + step) for row in range(0, len(grid), step)]
    for _ in workers.ordered(fill, strips):
        pass
    return [grid.reshape(-1, grid.shape[2]) for grid in grids]


def zeros(height: int, width: int, channels: int, dtype: type) -> np.ndarray:
    """(pixels, C) of an image and its border."""
    return np.zeros(((height + 2 * _BORDER) * (width + 2 * _BORDER), channels), dtype)


def interior(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C), a view of the image inside its border."""
    grid = pixels.reshape(height + 2 * _BORDER, width + 2 * _BORDER, -1)
    return grid[_BORDER : _BORDER + height, _BORDER : _BORDER + width]


class Share(NamedTuple):
    at: tuple[slice | np.ndarray, slice]  # pixels and channels
    sums: np.ndarray


class Sampler:
    """The sampling operator at `places` (2, ...), y and x in pixels, of an image (height, width).

    Each row sums `points` places, in C order, each times its `modulation`. With several `planes`, an axis of `places`
    before its last counts them, and the pixels of all planes at (y, x) are rows one after another, as in
    (pixels, planes * C).

    A place is outside where it is <= -1 or >= the size along either axis, NaN or infinite. Its sample is left out
    whatever its modulation is. One at exactly -1 has slopes all the same, those of the cell [-1, 0].
    """

    def __init__(
        self,
        places: np.ndarray,
        height: int,
        width: int,
        modulation: np.ndarray | None,
        points: int = 1,
        planes: int = 1,
    ) -> None:
        flat = places.reshape(2, -1)
        before_end = flat < _ends(height, width, places.dtype)
        sloped: np.ndarray = np.logical_and(*((flat >= -1) & before_end))  # NaN is not
        self.counted: np.ndarray = np.logical_and(*((flat > -1) & before_end))
        self._outside = np.flatnonzero(~sloped)
        if self._outside.size:  # to some place that is not
            flat = np.where(sloped, flat, flat[:, sloped.argmax(), None] if sloped.any() else -1)
        cell = np.floor(flat)
        self._y, self._x = flat - cell

        # The corners' numbers count from the border of the first row that is touched. Number 0 stands for all that has
        # no corners.
        columns = (width + 2 * _BORDER) * planes
        first, end = int(cell[0].min()) + _BORDER, int(cell[0].max()) + _BORDER + 2
        self._touched = slice(first * columns, end * columns)
        index = np.int32 if max(end * columns, 4 * flat.shape[1]) < 2**31 else np.int64
        top, left = cell.astype(index)
        top *= index(columns)
        left *= index(planes)
        top += left
        shift: np.ndarray = np.arange(planes)[:, None] + _BORDER * (columns + planes) - first * columns
        top_left = (top.reshape(-1, planes, places.shape[-1]) + shift.astype(index)).ravel()
        self._corners = np.empty((top_left.size, 4), index)
        for corner, step in enumerate((0, planes, columns, columns + planes)):
            np.add(top_left, index(step), out=self._corners[:, corner])
        self._corners[self._outside] = 0
        self._rows = 4 * points * np.arange(top_left.size // points + 1, dtype=index)
        self._points = points
        self._modulation = None if modulation is None else modulation.ravel()
        self._made: csr_array | None = None

    @property
    def _operator(self) -> csr_array:
        """(rows, pixels touched), made once; a cached_property's lock would be shared by all threads, and by a fork."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> csr_array:
        bottom, right = self._y, self._x
        top, left = 1 - bottom, 1 - right
        if self._modulation is not None:
            modulation = np.where(self.counted, self._modulation, 0)
            top, bottom = top * modulation, bottom * modulation
        weights = np.empty(self._corners.shape, self._y.dtype)
        for corner, (row, column) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
            np.multiply(row, column, out=weights[:, corner])
        corners = self._corners
        left_out = np.flatnonzero(~self.counted)
        if left_out.size > self._outside.size:
            corners = corners.copy()
            corners[left_out] = 0  # at -1 too: the pixels beside may be NaN
        shape = len(self._rows) - 1, self._touched.stop - self._touched.start
        return csr_array((weights.ravel(), corners.ravel(), self._rows), shape=shape)

    def sums(self, pixels: np.ndarray) -> np.ndarray:
        """(rows, C): the sum of each row's samples."""
        operator, pixels = self._operator, pixels[self._touched]
        runs = math.ceil(4 * self._points / _RUN)
        if runs == 1:
            return operator @ pixels
        ends = np.minimum(self._rows[:-1, None] + _RUN * np.arange(1, runs + 1), self._rows[1:, None])
        rows = np.append(0, ends).astype(self._rows.dtype)
        parts = csr_array((operator.data, operator.indices, rows), shape=(ends.size, len(pixels))) @ pixels
        total = parts.reshape(-1, runs, pixels.shape[1]).sum(axis=1, dtype=np.float64)
        return total.astype(pixels.dtype, copy=False)

    def scattered(self, vectors: np.ndarray) -> Iterable[Share]:
        """The samples' shares in the vectors of their rows, summed for each pixel that they touch.

        Many are not computed before they are asked for, and then some channels at a time.
        """
        weights, corners, width = self._operator.data, self._operator.indices, self._operator.shape[1]
        touched: slice | np.ndarray = self._touched
        if width > corners.size:  # few of the pixels in the rows between the first and the last one
            numbers, corners = np.unique(np.append(0, corners), return_inverse=True)  # 0 remains 0
            touched, width = numbers + self._touched.start, len(numbers)
            corners = corners[1:].astype(self._rows.dtype)
        samples_of_a_cell = np.bincount(corners[::4][self.counted])
        if vectors.dtype == np.float32 and 4 * samples_of_a_cell.max(initial=0) > _RUN:
            weights, vectors = weights.astype(np.float64), vectors.astype(np.float64)
        scatter = csr_array((weights, corners, self._rows), shape=(len(self._rows) - 1, width)).T
        step = max(1, _SHARE // (width * vectors.itemsize))
        if step >= vectors.shape[1]:
            return [Share((touched, slice(None)), scatter @ vectors)]
        channels = (slice(c, c + step) for c in range(0, vectors.shape[1], step))
        return (Share((touched, some), scatter @ vectors[:, some]) for some in channels)

    def products(self, pixels: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row's vector with the values at its places, and with their modulated slopes along y and x.

        Each (rows, points).
        """
        corners, pixels = self._corners.reshape(len(vectors), -1), pixels[self._touched]
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
        value[~self.counted] = 0
        if self._modulation is not None:
            slope_y, slope_x = slope_y * self._modulation, slope_x * self._modulation
        slope_y[self._outside] = slope_x[self._outside] = 0
        return tuple(product.reshape(len(vectors), -1) for product in (value, slope_y, slope_x))


@functools.lru_cache
def _ends(height: int, width: int, dtype: np.dtype) -> np.ndarray:
    """(2, 1) of the type's least numbers that are not below the sizes, so that no number comes between."""
    ends: np.ndarray = np.array([[height], [width]], dtype)
    return np.where(ends.astype(np.float64) < [[height], [width]], np.nextafter(ends, dtype.type(np.inf)), ends)
