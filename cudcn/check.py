"""The checks that operators share. Each error names the operator, the rule and what it got."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from .dtypes import DTYPES

Pair = int | Sequence[int]  # one number, or (h, w)
Padding = int | Sequence[int] | Sequence[Sequence[int]]  # one number, (h, w), or ((top, bottom), (left, right))

LARGEST = 2**31 - 1
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def _shown(value: Any) -> str:
    """What an error says that it got: on one line, and not a page of digits."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its __repr__'s own, or Python's, which writes no int of more than 4300 digits
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def integer(op: str, name: str, value: Any, least: int) -> int:
    try:
        if isinstance(value, bool | np.bool_):  # NumPy 1 takes its own for numbers
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {_shown(value)}") from None
    if not least <= number <= LARGEST:
        raise ValueError(f"{op}: {name} must be at least {least} and below 2**31, got {_shown(value)}")
    return number


def finite(op: str, name: str, value: Any) -> float:
    """A number that float32 holds too, as positions are float32 unless the data is float64."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # of an int or a Fraction
        number = math.inf
    if not -_LARGEST_FLOAT32 <= number <= _LARGEST_FLOAT32:
        raise ValueError(f"{op}: {name} must be finite in float32, got {_shown(value)}")
    return number


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} must be True or False, got {_shown(value)}")
    return bool(value)


def pair(op: str, name: str, value: Any, least: int = 1, axes: str = "(h, w)") -> tuple[int, int]:
    """`value` for each of two axes."""
    if isinstance(value, Sequence) and len(value) == 2 and not isinstance(value, str | bytes | bytearray):
        return integer(op, name, value[0], least), integer(op, name, value[1], least)
    if isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim):
        raise ValueError(f"{op}: {name} must be an int or a pair {axes}, got {_shown(value)}")
    number = integer(op, name, value, least)
    return number, number


def integers(op: str, name: str, value: Any, least: int) -> tuple[int, ...]:
    """A sequence of at least one."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray) or not value:
        raise ValueError(f"{op}: {name} must be a sequence of ints, got {_shown(value)}")
    return tuple([integer(op, f"{name}[{i}]", each, least) for i, each in enumerate(value)])


def padding(op: str, value: Any) -> tuple[int, int, int, int]:
    """`value` as (top, bottom, left, right)."""
    if isinstance(value, Sequence) and len(value) == 2 and any(isinstance(v, Sequence) for v in value):
        top, bottom = pair(op, "padding[0]", value[0], 0, "(top, bottom)")
        left, right = pair(op, "padding[1]", value[1], 0, "(left, right)")
        return top, bottom, left, right
    h, w = pair(op, "padding", value, 0, "(h, w), or ((top, bottom), (left, right))")
    return h, h, w, w


def choice(op: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """The allowed string itself: a subclass, such as np.str_, may be written differently."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, allowed))}, got {_shown(value)}")
    return allowed[allowed.index(value)]


def rank(op: str, name: str, spec: Any, axes: str) -> None:
    """`axes` as in "(N, C, H, W)"."""
    if len(spec.shape) != axes.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {axes}, got shape {spec.shape}")


def floating(op: str, name: str, spec: Any) -> None:
    if spec.dtype not in DTYPES:
        *names, last = DTYPES
        raise TypeError(f"{op}: {name} must be {', '.join(names)} or {last}, got {spec.dtype}")


def indices(op: str, name: str, spec: Any) -> None:
    if spec.dtype not in ("int32", "int64"):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {spec.dtype}")


def same_dtype(op: str, name: str, spec: Any, dtype: str, *, like: str = "input", or_float32: bool = False) -> None:
    """`or_float32`: for positions and modulation, which half types are too coarse for."""
    float32_too = or_float32 and DTYPES[dtype].half
    if spec.dtype != dtype and not (float32_too and spec.dtype == "float32"):
        rule = f"{dtype} like {like}" + (" (or float32)" if float32_too else "")
        raise TypeError(f"{op}: {name} must be {rule}, got {spec.dtype}")


def shape(op: str, name: str, spec: Any, axes: str, want: tuple[int, ...]) -> None:
    if spec.shape != want:
        raise ValueError(f"{op}: {name} must be {axes} = {want}, got {spec.shape}")


def window(op: str, axis: str, size: int, padding: int, kernel: int, stride: int, dilation: int) -> int:
    """How many places a kernel takes along one axis: floor((size + padding - reach) / stride) + 1."""
    padded = size + padding
    reach = dilation * (kernel - 1) + 1
    if padded > LARGEST:
        raise ValueError(f"{op}: the padded {axis} must be below 2**31, got {padded}")
    if reach > padded:
        raise ValueError(
            f"{op}: the output's {axis} would be empty: the dilated kernel spans {reach}, the padded input {padded}"
        )
    return (padded - reach) // stride + 1


def pixels(op: str, image: str, count: int) -> None:
    if count > LARGEST:
        raise ValueError(f"{op}: {image} must have fewer than 2**31 pixels, got {count}")
