"""Configurations of deform_conv2d."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from oracles import deform_conv2d as oracle

from cudcn.ops.deform_conv2d import OP

from .case import Case, Tensors

IMAGES = ("input", "offset", "mask")  # the tensors that have the layout


@dataclass(frozen=True)
class DeformConv2d(Case):
    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (7, 6)
    out_channels: int = 4
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    groups: int = 1
    offset_groups: int = 1
    bias: bool = True
    mask: bool = True
    reach: float = 2.0  # of the offsets, in pixels
    layout: str = "NCHW"

    op = OP

    def __str__(self) -> str:
        return f"{self.name} {self.layout}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "layout": self.layout}

    @property
    def canonical(self) -> dict[str, Any]:
        """As the slow loop takes them: pairs, and padding with its ends."""
        a = OP.canonical(**self.attributes)
        top, bottom, left, right = a["padding"]
        return {"stride": a["stride"], "padding": ((top, bottom), (left, right)), "dilation": a["dilation"]}

    def places(self) -> tuple[int, ...]:
        """The output's height and width."""
        a = self.canonical
        return tuple(
            (self.size[i] + sum(a["padding"][i]) - a["dilation"][i] * (self.kernel[i] - 1) - 1) // a["stride"][i] + 1
            for i in (0, 1)
        )

    def values(self, random: np.random.Generator) -> Tensors:
        taps, places = math.prod(self.kernel), self.places()
        offset_shape = (self.batch, 2 * self.offset_groups * taps, *places)
        mask_shape = (self.batch, self.offset_groups * taps, *places)
        values = {
            "input": random.standard_normal((self.batch, self.channels, *self.size)),
            "offset": self.reach * random.standard_normal(offset_shape),
            "weight": random.standard_normal((self.out_channels, self.channels // self.groups, *self.kernel)),
            "bias": random.standard_normal(self.out_channels) if self.bias else None,
            "mask": random.random(mask_shape) if self.mask else None,
        }
        return {name: self.arranged(value) if name in IMAGES else value for name, value in values.items()}

    def slow(self, **tensors: Any) -> np.ndarray:
        by_channel = {name: self.planar(tensor) if name in IMAGES else tensor for name, tensor in tensors.items()}
        return self.arranged(oracle.deform_conv2d(**by_channel, **self.canonical))

    def smooth(self, tensors: Tensors) -> Tensors:
        """No sample near the border of two cells."""
        cell = np.floor(tensors["offset"])
        return {**tensors, "offset": cell + 0.1 + 0.8 * (tensors["offset"] - cell)}

    def arranged(self, image: Any) -> Any:
        """An NCHW image in the case's layout."""
        if image is None or self.layout == "NCHW":
            return image
        return np.ascontiguousarray(image.transpose(0, 2, 3, 1))

    def planar(self, image: Any) -> Any:
        """The inverse of `arranged`."""
        return image if image is None or self.layout == "NCHW" else image.transpose(0, 3, 1, 2)


_PLAIN = [
    DeformConv2d("plain v2"),
    DeformConv2d("v1", bias=False, mask=False),
    DeformConv2d("one pixel", batch=1, channels=1, size=(1, 1), out_channels=1, kernel=(1, 1), padding=0),
    DeformConv2d("strides and dilations", size=(9, 8), kernel=(2, 3), stride=(2, 1), dilation=(1, 2), padding=(0, 2)),
    DeformConv2d("uneven padding", kernel=(2, 2), padding=((1, 0), (2, 1)), bias=False),
    DeformConv2d("groups", channels=6, out_channels=4, groups=2, offset_groups=3),
    DeformConv2d("depthwise", channels=6, out_channels=6, groups=6, offset_groups=2, mask=False),
    DeformConv2d("offset groups", channels=6, out_channels=3, offset_groups=6, kernel=(1, 2)),
    DeformConv2d("far offsets", reach=8.0, batch=3),
    DeformConv2d("many channels", batch=1, channels=40, out_channels=8, size=(3, 4), bias=False),
    DeformConv2d("large kernel", batch=1, channels=2, out_channels=2, kernel=(5, 4), padding=2),
]
CASES = [replace(case, layout=layout) for case in _PLAIN for layout in ("NCHW", "NHWC")]
BY_NAME = {str(case): case for case in CASES}
PLAIN = BY_NAME["plain v2 NCHW"]
SMALL = [replace(case, batch=1) for case in CASES[2:8] + CASES[10:14]]
# for the adapters: groups and offset groups, uneven padding, and the two pairs unequal
_UNEVEN = DeformConv2d(
    "uneven", size=(6, 7), out_channels=6, stride=(1, 2), padding=((2, 0), (0, 1)), dilation=(2, 1), groups=2,
    offset_groups=2,
)  # fmt: skip
ADAPTED = [
    replace(_UNEVEN, name=f"{name}", bias=bias, mask=mask, layout=layout)
    for name, bias, mask in (
        ("v1", False, False),
        ("v1 bias", True, False),
        ("v2", True, True),
        ("v2 no bias", False, True),
    )
    for layout in ("NCHW", "NHWC")
]
