"""Arrays as the emulator sees them: the span of memory that an array covers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike


def empty(shape: int | Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """A new array of 0xFF bytes, NaN in every float type: what a kernel fails to write shows."""
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)


class Span(NamedTuple):
    """The bytes from an array's lowest to its highest, and where in them its first element is."""

    address: int
    size: int
    offset: int


def span_of(array: np.ndarray) -> Span:
    """Where the elements of `array` lie; strides may be of any size and sign."""
    if array.size == 0:
        return Span(0, 0, 0)
    first = array.__array_interface__["data"][0]
    if array.flags.c_contiguous:
        return Span(first, array.nbytes, 0)
    steps = [stride * (length - 1) for stride, length in zip(array.strides, array.shape, strict=True)]
    below = -sum(step for step in steps if step < 0)
    above = sum(step for step in steps if step > 0)
    return Span(first - below, below + above + array.itemsize, below)


def overlap(a: Span, b: Span) -> bool:
    return a.address < b.address + b.size and b.address < a.address + a.size and min(a.size, b.size) > 0
