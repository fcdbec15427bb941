"""What every operator makes of its attributes: plain Python values, or an error with operator, rule and value."""

from __future__ import annotations

import enum
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cudcn import check
from cudcn.op import Op
from cudcn.ops import OPS, dcnv3, deform_conv2d, deform_roi_pool

ATTRIBUTES = [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in op.attributes]
HUGE = 10**5000  # Python refuses to print it


class Three(enum.IntEnum):
    THREE = 3


def canonical(op: Op, name: str, value: Any) -> Any:
    return op.canonical(**{**dict.fromkeys(op.attributes, 2), **op.function.__kwdefaults__, name: value})[name]


def refused(op: Op, name: str, value: Any) -> str:
    """The error's text, in which the value is short."""
    with pytest.raises((ValueError, TypeError)) as caught:
        canonical(op, name, value)
    text = str(caught.value)
    assert text.startswith((f"{op.name}: {name} must be ", f"{op.name}: {name}["))
    assert len(text) < 300
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_numbers_too_large(op: Op, name: str) -> None:
    for value in (
        10**400,
        -(10**400),
        HUGE,
        -HUGE,
        Fraction(10**400),
        np.longdouble("1e4000"),
        [HUGE, 1],
        (1, 10**400),
    ):
        refused(op, name, value)


@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_what_no_attribute_can_be(op: Op, name: str) -> None:
    odd = (
        1j, "3", b"3", b"\x03\x03", np.str_("3"), np.nan, np.float32("nan"), Decimal(1), {3: 3}, {3}, (), [1, 2, 3],
        np.array([3, 3]), np.array(["NCHW"]), np.array([["NCHW"] * 9] * 9), ((1, 2), (3, 4), (5, 6)), object, ...,
    )  # fmt: skip
    for value in odd:
        if name != "points" or type(value) is not list:
            refused(op, name, value)
    if name not in ("part_size", "group_size", "points"):  # None follows the output size or a tensor's shape there
        refused(op, name, None)


@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_a_swap_is_seen_by_its_type(op: Op, name: str) -> None:
    """An int is no flag, a flag no number, and a fraction no count."""
    kind = op.attributes[name]
    for value in (True, np.True_) if kind != "bool" else (0, 1, np.int64(1), 1.0, np.array(True)):
        refused(op, name, value)
    if kind not in ("float", "bool"):
        for value in (2.0, np.float32(2), Fraction(2), np.array(2.0)):
            refused(op, name, value)
    if kind == "str":
        refused(op, name, 1)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (((1,), (1, 2)), r"padding[0] must be an int or a pair (top, bottom), got (1,)"),
        (((1, 2), (1, 2, 3)), r"padding[1] must be an int or a pair (left, right), got (1, 2, 3)"),
        (((1, 2), ((1, 2), 2)), r"padding[1] must be an int, got (1, 2)"),
        (((1, 2), (1, 2), (1, 2)), r"padding must be an int or a pair (h, w), or ((top, bottom), (left, right)), got"),
        ((1, 1, 1, 1), r"padding must be an int or a pair (h, w), or ((top, bottom), (left, right)), got"),
        (((1, -2), (1, 2)), r"padding[0] must be at least 0 and below 2**31, got -2"),
        ("same", r"padding must be an int or a pair (h, w), or ((top, bottom), (left, right)), got 'same'"),
        (((1, 2), "12"), r"padding[1] must be an int or a pair (left, right), got '12'"),
    ],
    ids=str,
)
def test_nested_padding(value: Any, rule: str) -> None:
    assert refused(deform_conv2d.OP, "padding", value).startswith(f"deform_conv2d: {rule}")


@pytest.mark.parametrize(
    ("op", "name", "value", "want"),
    [
        (dcnv3.OP, "group", np.int64(3), 3),
        (dcnv3.OP, "group", np.array(3), 3),
        (dcnv3.OP, "group", Three.THREE, 3),
        (dcnv3.OP, "kernel_size", [np.int32(3), Three.THREE], (3, 3)),
        (dcnv3.OP, "kernel_size", range(3, 5), (3, 4)),
        (dcnv3.OP, "offset_scale", 2, 2.0),
        (dcnv3.OP, "offset_scale", np.float16(0.5), 0.5),
        (dcnv3.OP, "offset_scale", np.float64(0.5), 0.5),
        (dcnv3.OP, "offset_scale", Fraction(1, 2), 0.5),
        (dcnv3.OP, "softmax", np.True_, True),
        (deform_conv2d.OP, "padding", (1, [2, np.int64(3)]), (1, 1, 2, 3)),
        (deform_conv2d.OP, "layout", np.str_("NHWC"), "NHWC"),
        (deform_roi_pool.OP, "sampling_ratio", np.int64(-1), 0),
    ],
    ids=lambda v: v.name if isinstance(v, Op) else repr(v),
)
def test_canonical_values_are_plain(op: Op, name: str, value: Any, want: Any) -> None:
    """By their type too: repr and hash of a subclass may be others, and what is remembered by them."""
    got = canonical(op, name, value)
    assert repr(got) == repr(want)
    assert type(got) is type(want)


def test_a_choice_is_the_allowed_string_itself() -> None:
    allowed = ("NCHW", "NHWC")
    assert check.choice("op", "layout", np.str_("NHWC"), allowed) is allowed[1]


def test_an_error_shows_a_value_that_has_no_repr() -> None:
    class Mute(int):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    assert refused(dcnv3.OP, "group", Mute(-1)).endswith("got <Mute that cannot be shown>")
    assert refused(dcnv3.OP, "group", 10**5000).endswith("got <int that cannot be shown>")
