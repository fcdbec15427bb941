"""Bilinear sampling by its formula."""

from __future__ import annotations

import math

import numpy as np


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    """The value of `image` (H, W) at (y, x); pixels outside are 0, and so is all beyond one pixel from the border."""
    height, width = image.shape
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total
