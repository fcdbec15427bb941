"""Bilinear sampling as a sparse matrix: each row holds the four weights of one sample.

Its product with the pixels samples, its transpose scatters gradients. Pixels come from `padded`: a border of zeros
stands for all that is outside the image, so no corner needs a test of its own and a NaN in the image stays where it is.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

# a row and a column of zeros before the image and as many after; then one more of each, for a sample at
# (height, width), where all that lie nowhere near the image are put
_BORDER = 3
_GATHERED = 2 << 20  # bytes of pixels copied at a time: more would leave the cache


def padded(image: np.ndarray, dtype: type) -> np.ndarray:
    """(pixels, C) of an image (C, H, W) with its border."""
    channels, height, width = image.shape
    pixels = np.zeros((height + _BORDER, width + _BORDER, channels), dtype)
    pixels[1 : height + 1, 1 : width + 1] = image.transpose(1, 2, 0)
    return pixels.reshape(-1, channels)


def unpadded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image (C, H, W) inside (pixels, C)."""
    grid = pixels.reshape(height + _BORDER, width + _BORDER, -1)
    return grid[1 : height + 1, 1 : width + 1].transpose(2, 0, 1)


class Sampler:
    """The sampling operator at `places` (2, ...), y and x in pixels, of an image (height, width).

    `value() @ pixels` has one row per place, in C order. With `first`, row r is the sum over the places first[r] to
    first[r + 1]. With several `planes`, an axis of `places` before its last counts
    them, and the pixels of all planes at (y, x) are rows one after another, as in (pixels, planes * C).
    """

    def __init__(
        self, places: np.ndarray, height: int, width: int, first: np.ndarray | None = None, planes: int = 1
    ) -> None:
        # at exactly -1 the value is 0 but the slope is that of the cell [-1, 0]; NaN fails every comparison
        size = np.array([height, width], places.dtype).reshape(2, *(1,) * (places.ndim - 1))
        inside = np.logical_and(*((places >= -1) & (places < size)))
        places = np.where(inside, places, size)  # beyond the last row all is border
        cell = np.floor(places)
        self._y, self._x = (places - cell).reshape(2, -1)

        columns = width + _BORDER
        self._pixels = (height + _BORDER) * columns * planes
        index = np.int32 if self._pixels < 2**31 and 4 * self._y.size < 2**31 else np.int64
        top, left = cell.astype(index)
        top_left = (top + 1) * index(columns) + left + 1
        if planes > 1:
            top_left = top_left * index(planes) + np.arange(planes, dtype=index)[:, None]
        corners = np.empty((top_left.size, 4), index)
        for corner, step in enumerate((0, 1, columns, columns + 1)):
            np.add(top_left.ravel(), index(step * planes), out=corners[:, corner])
        self._indices = corners.ravel()
        self._rows = 4 * (np.arange(self._y.size + 1) if first is None else first).astype(index)

    def value(self, modulation: np.ndarray | None = None) -> csr_array:
        """Samples, each times its `modulation`."""
        bottom, right = self._y, self._x
        top, left = 1 - bottom, 1 - right
        if modulation is not None:
            top, bottom = top * modulation.ravel(), bottom * modulation.ravel()
        data = np.empty((self._y.size, 4), self._y.dtype)
        for corner, (row, column) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
            np.multiply(row, column, out=data[:, corner])
        return csr_array((data.ravel(), self._indices, self._rows), shape=(self._rows.size - 1, self._pixels))

    def products(self, pixels: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inner products of each sample, and of its slopes along y and x, with its row's vector.

        Each of shape (rows, places of a row); all rows must have as many.
        """
        indices = self._indices.reshape(len(vectors), -1)
        products = np.empty((*indices.shape, 1), pixels.dtype)
        step = max(1, _GATHERED // (indices.shape[1] * pixels[:1].nbytes))
        for part in (slice(row, row + step) for row in range(0, len(vectors), step)):
            np.matmul(np.take(pixels, indices[part], axis=0), vectors[part, :, None], out=products[part])
        top_left, top_right, bottom_left, bottom_right = products.reshape(-1, 4).T
        top, bottom = top_right - top_left, bottom_right - bottom_left
        slope_y = (bottom_left - top_left) + self._x * (bottom - top)
        slope_x = top + self._y * (bottom - top)
        value = top_left + self._x * top + self._y * slope_y
        return tuple(product.reshape(len(vectors), -1) for product in (value, slope_y, slope_x))
