"""The dtypes of data, and which of them meet in one call."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    ctype: str  # in kernels
    size: int  # bytes
    half: bool  # too coarse for positions and modulation, which may be float32 beside it
    arithmetic: type  # of positions and sums: `arithmetic_t` of bilinear.cuh


DTYPES = {  # by its name in every framework
    "float16": DType("__half", 2, half=True, arithmetic=np.float32),
    "bfloat16": DType("__nv_bfloat16", 2, half=True, arithmetic=np.float32),
    "float32": DType("float", 4, half=False, arithmetic=np.float32),
    "float64": DType("double", 8, half=False, arithmetic=np.float64),
}


def of(array: Any) -> DType:
    return DTYPES[name(array)]


def name(array: Any) -> str:
    return _name(array.dtype)


def arithmetic(array: Any) -> type:
    """The type of positions and sums for an array's dtype."""
    return of(array).arithmetic


@functools.cache  # str(dtype) takes 2 us
def _name(dtype: Any) -> str:
    return str(dtype)


def together(count: int) -> list[tuple[DType, ...]]:
    """All that can meet in one call: the data's dtype, and those of `count` tensors, each float32 if not the same."""
    return [
        (dtype, *others)
        for dtype in DTYPES.values()
        for others in itertools.product((dtype, DTYPES["float32"]) if dtype.half else (dtype,), repeat=count)
    ]
