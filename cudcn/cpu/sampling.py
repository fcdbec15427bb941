"""Bilinear sampling as a sparse matrix: each row holds the four weights of one sample.

Its product with the pixels samples, its transpose scatters gradients, and the same pattern with the weights'
derivatives gives slopes. Pixels come from `padded`: a border of zeros stands for all that is outside the image,
so no corner needs a test of its own and a NaN in the image stays where it is.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

# one row and column of zeros before the image and one after, and one more row for samples that are nowhere near
_BORDER_ROWS, _BORDER_COLUMNS = 3, 2


def padded(image: np.ndarray, dtype: type) -> np.ndarray:
    """(pixels, C) of an image (C, H, W) with its border."""
    channels, height, width = image.shape
    pixels = np.zeros((height + _BORDER_ROWS, width + _BORDER_COLUMNS, channels), dtype)
    pixels[1 : height + 1, 1 : width + 1] = image.transpose(1, 2, 0)
    return pixels.reshape(-1, channels)


def unpadded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image (C, H, W) inside (pixels, C)."""
    grid = pixels.reshape(height + _BORDER_ROWS, width + _BORDER_COLUMNS, -1)
    return grid[1 : height + 1, 1 : width + 1].transpose(2, 0, 1)


class Sampler:
    """The sampling operator at positions `y` and `x` (any shape, in pixels) of an image (height, width).

    `value() @ pixels` has one row per position, in C order; so have the slopes along y and x.
    """

    def __init__(self, y: np.ndarray, x: np.ndarray, height: int, width: int) -> None:
        # at exactly -1 the value is 0 but the slope is that of the cell [-1, 0]; NaN fails every comparison
        inside = (y >= -1) & (y < height) & (x >= -1) & (x < width)
        y = np.where(inside, y, y.dtype.type(height))
        x = np.where(inside, x, x.dtype.type(0))
        top, left = np.floor(y), np.floor(x)
        self._y, self._x = (y - top).ravel(), (x - left).ravel()

        columns = width + _BORDER_COLUMNS
        self._pixels = (height + _BORDER_ROWS) * columns
        index = np.int32 if self._pixels < 2**31 and 4 * y.size < 2**31 else np.int64
        first = (top.astype(index) + 1) * index(columns) + (left.astype(index) + 1)
        corners = np.array([0, 1, columns, columns + 1], index)
        self._indices = (first.reshape(-1, 1) + corners).ravel()
        self._rows = np.arange(0, 4 * y.size + 1, 4, dtype=index)

    def _matrix(self, *weights: np.ndarray) -> csr_array:
        """The operator with these weights at the corners top left, top right, bottom left, bottom right."""
        data = np.empty((self._y.size, 4), self._y.dtype)
        for corner, weight in enumerate(weights):
            data[:, corner] = weight
        return csr_array((data.ravel(), self._indices, self._rows), shape=(self._y.size, self._pixels))

    def value(self, modulation: np.ndarray | None = None) -> csr_array:
        """Samples, each times its `modulation`."""
        bottom, right = self._y, self._x
        top, left = 1 - bottom, 1 - right
        if modulation is not None:
            top, bottom = top * modulation.ravel(), bottom * modulation.ravel()
        return self._matrix(top * left, top * right, bottom * left, bottom * right)

    def slope_y(self) -> csr_array:
        left, right = 1 - self._x, self._x
        return self._matrix(-left, -right, left, right)

    def slope_x(self) -> csr_array:
        top, bottom = 1 - self._y, self._y
        return self._matrix(-top, top, -bottom, bottom)
