"""Bilinear sampling as a sparse matrix: each row holds the four weights of one sample, or of several.

Its product with the pixels samples, its transpose scatters gradients. Pixels have a border of zeros that stands for all
that is outside the image, so no corner needs a test of its own and a NaN in the image stays where it is. Samples that
are left out lie in the border too.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import csr_array

# Rows and columns of zeros around the image: two before it, so that there is a cell of border alone, and one after.
_BEFORE, _BORDER = 2, 3
_GATHERED = 1 << 20  # bytes of pixels copied at a time: more would leave the cache
_RUN = 128  # terms of one running sum in float32: it may lose 2e-6, and 16 times that in 16 times as many


def bordered(channels: int, height: int, width: int, dtype: type) -> np.ndarray:
    """(pixels, C), all 0, of an image and its border."""
    return np.zeros(((height + _BORDER) * (width + _BORDER), channels), dtype)


def interior(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C), a view of the image inside its border."""
    grid = pixels.reshape(height + _BORDER, width + _BORDER, -1)
    return grid[_BEFORE : _BEFORE + height, _BEFORE : _BEFORE + width]


class Sampler:
    """The sampling operator at `places` (2, ...), y and x in pixels, of an image (height, width).

    Each row sums `points` places, in C order. With several `planes`, an axis of `places` before its last counts them,
    and the pixels of all planes at (y, x) are rows one after another, as in (pixels, planes * C).

    A place is outside where it is <= -1 or >= the size along either axis, NaN or infinite. Its sample is left out
    whatever its modulation is. One at exactly -1 has slopes all the same, those of the cell [-1, 0].
    """

    def __init__(self, places: np.ndarray, height: int, width: int, points: int = 1, planes: int = 1) -> None:
        flat = places.reshape(2, -1)
        ends = np.array([[_ceiling(size, places.dtype.type)] for size in (height, width)])
        self._sloped: np.ndarray = np.logical_and(*((flat >= -1) & (flat < ends)))  # NaN is not
        self.counted = self._sloped & ~np.logical_or(*(flat == -1))
        flat = np.where(self._sloped, flat, -_BEFORE)
        cell = np.floor(flat)
        self._y, self._x = flat - cell

        columns = width + _BORDER
        self._pixels = (height + _BORDER) * columns * planes
        index = np.int32 if max(self._pixels, 4 * flat.shape[1]) < 2**31 else np.int64
        top, left = cell.astype(index) + index(_BEFORE)
        top_left = top * index(columns) + left
        if planes > 1:
            plane = np.arange(planes, dtype=index)[:, None]
            top_left = (top_left.reshape(-1, planes, places.shape[-1]) * index(planes) + plane).ravel()
        self._steps = np.array([0, planes, columns * planes, (columns + 1) * planes], index)
        self._corners = np.empty((top_left.size, 4), index)
        for corner, step in enumerate(self._steps):
            np.add(top_left, step, out=self._corners[:, corner])
        self._rows = 4 * points * np.arange(top_left.size // points + 1, dtype=index)
        self._points = points

    def _value(self, modulation: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Of all corners, their weights, and their pixels."""
        bottom, right = self._y, self._x
        top, left = 1 - bottom, 1 - right
        if modulation is not None:
            modulation = np.where(self.counted, modulation.ravel(), 0)
            top, bottom = top * modulation, bottom * modulation
        weights = np.empty(self._corners.shape, self._y.dtype)
        for corner, (row, column) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
            np.multiply(row, column, out=weights[:, corner])
        corners = self._corners
        if np.count_nonzero(self.counted) < np.count_nonzero(self._sloped):
            corners = np.where(self.counted[:, None], corners, 0)  # not the pixels beside -1, which may be NaN
        return weights.ravel(), corners.ravel()

    def sums(self, pixels: np.ndarray, modulation: np.ndarray | None = None) -> np.ndarray:
        """(rows, C): the sum of each row's samples, each times its `modulation`."""
        weights, corners = self._value(modulation)
        runs = math.ceil(4 * self._points / _RUN)
        if runs == 1:
            return _matrix(weights, corners, self._rows, len(pixels)) @ pixels
        ends = np.minimum(self._rows[:-1, None] + _RUN * np.arange(1, runs + 1), self._rows[1:, None])
        parts = _matrix(weights, corners, np.append(0, ends).astype(corners.dtype), len(pixels)) @ pixels
        total = parts.reshape(-1, runs, pixels.shape[1]).sum(axis=1, dtype=np.float64)
        return total.astype(pixels.dtype, copy=False)

    def scattered(
        self, vectors: np.ndarray, modulation: np.ndarray | None = None
    ) -> tuple[slice | np.ndarray, np.ndarray]:
        """Which pixels the samples touch, and each one's sum of its samples' shares of their rows' vectors."""
        weights, corners = self._value(modulation)
        top_left = self._corners[self.counted, 0]
        if not top_left.size:
            return slice(0), np.empty((0, vectors.shape[1]), vectors.dtype)
        first, end = int(top_left.min()), int(top_left.max() + self._steps[-1]) + 1
        rows: slice | np.ndarray = slice(first, end)
        corners = np.maximum(corners - (first - 1), 0)  # 0 for what is left out
        if end - first > corners.size:  # far apart
            number, corners = np.unique(np.append(0, corners), return_inverse=True)
            rows, corners, end = number[1:] + (first - 1), corners[1:].astype(self._rows.dtype), first + len(number) - 1
        if vectors.dtype == np.float32 and np.bincount(corners)[1:].max() > _RUN:
            weights, vectors = weights.astype(np.float64), vectors.astype(np.float64)
        return rows, (_matrix(weights, corners, self._rows, end - first + 1).T @ vectors)[1:]

    def products(
        self, pixels: np.ndarray, vectors: np.ndarray, modulation: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inner products of each sample, and of its slopes along y and x times its `modulation`, with its row's
        vector: each (rows, points)."""
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
        if modulation is not None:
            slope_y, slope_x = slope_y * modulation.ravel(), slope_x * modulation.ravel()
        kept = (value, self.counted), (slope_y, self._sloped), (slope_x, self._sloped)
        value, slope_y, slope_x = (np.where(mask, product, 0).reshape(len(vectors), -1) for product, mask in kept)
        return value, slope_y, slope_x


def _matrix(weights: np.ndarray, pixels: np.ndarray, rows: np.ndarray, width: int) -> csr_array:
    return csr_array((weights, pixels, rows), shape=(len(rows) - 1, width))


def _ceiling(size: int, dtype: type) -> float:
    """The least number of the type that is not below `size`: one of its numbers is below both or neither."""
    end = dtype(size)
    return end if float(end) >= size else np.nextafter(end, dtype(np.inf))
