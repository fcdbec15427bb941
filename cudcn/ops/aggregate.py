"""What dcnv3, dcnv4 and ms_deform_attn have in common, and the two kinds of geometry that make them differ.

Every output is a sum of weighted samples of its own group's channels::

    out[n, q, g] = sum over l, s of weight[n, q, g, l, s] * bilinear(image[n, level l, g], origin + scale * place)

where `place` is what the caller gives: an offset of `Windows`, a location of `Attention`. Queries have two axes here,
levels one, so that one piece of code takes all three operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import check
from ..op import Spec


class Level(NamedTuple):
    """An image that is sampled: its first pixel, and its size."""

    first: int
    height: int
    width: int


@dataclass(frozen=True)
class Windows:
    """dcnv3 and dcnv4: a query is an output pixel, its samples are the taps of a window around it."""

    name: str
    batch: int
    height: int
    width: int
    queries: tuple[int, int]  # the output's height and width
    groups: int
    group_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    offset_scale: float
    remove_center: bool
    packed: bool  # offsets and weights in one tensor
    softmax: bool
    output: Spec
    source: ClassVar[str] = "Taps"  # of the kernels

    @property
    def levels(self) -> int:
        return 1

    @property
    def points(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def center(self) -> tuple[int, int]:
        """From the window's first tap to the middle that offsets are scaled about; rounded down."""
        return self.dilation[0] * (self.kernel[0] - 1) // 2, self.dilation[1] * (self.kernel[1] - 1) // 2

    def parts(self, input: Any, offset: Any, mask: Any = None) -> tuple[Any, Any, Any]:
        """Views of the image (N, H, W, G, D), the places (N, *queries, G, 1, P, 2) and their weights (..., 1, P)."""
        group = (self.groups, 1)
        if offset is not None and self.packed:
            per_group = offset[..., : self.groups * self.points * 3].reshape(*offset.shape[:3], *group, -1)
            offset, mask = per_group[..., : 2 * self.points], per_group[..., 2 * self.points :]
        return (
            None if input is None else self.by_group(input),
            None if offset is None else offset.reshape(*offset.shape[:3], *group, self.points, 2),
            None if mask is None else mask.reshape(*mask.shape[:3], *group, self.points),
        )

    def by_group(self, image: Any) -> Any:
        return image.reshape(*image.shape[:3], self.groups, self.group_channels)

    def unused(self, input: Any, offset: Any, *_: Any) -> Any:
        """The channels of dcnv4's packed tensor that hold nothing; None if there are none."""
        return offset[..., self.groups * self.points * 3 :] if self.packed and offset is not None else None

    def images(self, input: np.ndarray, *_: np.ndarray) -> list[Level]:
        return [Level(0, self.height, self.width)]

    def origin(self, axis: int, queries: slice, points: slice, dtype: type) -> Any:
        """Where samples lie with offsets of 0, y (axis 0) or x of them, broadcasting to (*queries, G, P)."""
        tap = np.arange(self.points + self.remove_center)
        if self.remove_center:
            tap = np.delete(tap, self.points // 2)
        tap = np.divmod(tap[points], self.kernel[0])[1 - axis] * self.dilation[axis] - self.center[axis]
        query = np.arange(queries.start, queries.stop)
        middle: np.ndarray = (query * self.stride[axis] - self.padding[axis] + self.center[axis]).astype(dtype)
        around = tap.astype(dtype) * dtype(self.offset_scale)
        return middle.reshape((-1, 1, 1, 1) if axis == 0 else (-1, 1, 1)) + around

    def scale(self, level: Level) -> tuple[float, float]:
        return self.offset_scale, self.offset_scale


def canonical(
    name: str,
    *,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    group: Any,
    offset_scale: Any,
    remove_center: Any,
    softmax: Any,
) -> dict[str, Any]:
    """The attributes of dcnv3 and dcnv4."""
    kernel = check.pair(name, "kernel_size", kernel_size)
    remove_center = check.flag(name, "remove_center", remove_center)
    if remove_center and (kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] == 1):
        raise ValueError(f"{name}: remove_center needs a square kernel of odd size above 1, got kernel_size {kernel}")
    return {
        "kernel_size": kernel,
        "stride": check.pair(name, "stride", stride),
        "padding": check.padding(name, padding),
        "dilation": check.pair(name, "dilation", dilation),
        "group": check.integer(name, "group", group, least=1),
        "offset_scale": check.finite(name, "offset_scale", offset_scale),
        "remove_center": remove_center,
        "softmax": check.flag(name, "softmax", softmax),
    }


def windows(
    name: str,
    input: Any,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    group: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    packed: bool,
) -> Windows:
    """The geometry that follows from the input and the attributes; the other tensors are the caller's to check."""
    check.rank(name, "input", input, "(N, H, W, C)")
    check.floating(name, "input", input)
    batch, height, width, channels = input.shape
    if channels < 1 or channels % group:
        raise ValueError(f"{name}: group must divide input's channels, got {group} and {channels} in {input.shape}")
    top, bottom, left, right = padding
    queries = (
        check.window(name, "height", height, top + bottom, kernel_size[0], stride[0], dilation[0]),
        check.window(name, "width", width, left + right, kernel_size[1], stride[1], dilation[1]),
    )
    check.pixels(name, "an input image", height * width)
    check.pixels(name, "an output image", queries[0] * queries[1])
    return Windows(
        name, batch, height, width, queries, group, channels // group, kernel_size, stride, (top, left), dilation,
        offset_scale, remove_center, packed, softmax, Spec((batch, *queries, channels), input.dtype),
    )  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """ms_deform_attn: samples lie anywhere in the images of all levels."""

    name: str
    batch: int
    pixels: int  # of all levels
    queries: tuple[int, int]  # the second is 1
    groups: int  # heads
    group_channels: int
    levels: int
    points: int  # of one level
    softmax: bool
    output: Spec
    packed: ClassVar[bool] = False
    source: ClassVar[str] = "Levels"  # of the kernels

    def parts(self, value: Any, shapes: Any, starts: Any, locations: Any, weights: Any) -> tuple[Any, Any, Any]:
        """Views of the images (N, pixels, G, D), the places (N, *queries, G, L, P, 2) and their weights (..., L, P)."""
        return value, *(None if part is None else part[:, :, None] for part in (locations, weights))

    def by_group(self, output: Any) -> Any:
        return output.reshape(*output.shape[:2], 1, self.groups, self.group_channels)

    def unused(self, *_: Any) -> Any:
        return None

    def images(self, value: np.ndarray, shapes: np.ndarray, starts: np.ndarray, *_: np.ndarray) -> list[Level]:
        levels = [Level(int(first), int(h), int(w)) for first, (h, w) in zip(starts, shapes, strict=True)]
        for first, height, width in levels:
            if min(height, width) < 1 or first < 0 or first + height * width > self.pixels:
                raise ValueError(
                    f"{self.name}: each level must have a pixel and lie inside value's {self.pixels}, "
                    f"got spatial_shapes {shapes.tolist()} and level_start_index {starts.tolist()}"
                )
        return levels

    def origin(self, axis: int, queries: slice, points: slice, dtype: type) -> Any:
        """Locations begin at the upper left edge of the first pixel, half a pixel before its centre."""
        return dtype(-0.5)

    def scale(self, level: Level) -> tuple[float, float]:
        return level.height, level.width


Geometry = Windows | Attention
