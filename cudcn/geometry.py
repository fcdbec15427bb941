"""The sizes and attributes of a call, as an operator's checks hand them to its CPU and CUDA code: a class a family.

Pairs are (h, w). Each is the same as itself alone, so that what follows from one can be remembered cheaply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import sources

# Pixels along a side that RoI pooling takes, and samples along an axis of a bin: so far float32 has all whole numbers
# and the halves between.
MOST = sources.constant("pooling.cuh", "MOST")
# Levels of an attention that has a number of points for each.
MOST_LEVELS = sources.constant("aggregate.cuh", "BOUNDS") - 1


class Spec(NamedTuple):
    """What an operator's rules need to know of a tensor; the dtype by its name, the same in every framework."""

    shape: tuple[int, ...]
    dtype: str


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Convolution:
    """deform_conv2d, in either layout."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    groups: int
    offset_groups: int
    layout: str  # "NCHW" or "NHWC"
    output: Spec

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_pixels(self) -> int:
        return self.out_height * self.out_width

    def nchw(self, *images: Any) -> list[Any]:
        """(N, C, H, W) views of images in the call's layout: the CPU and CUDA code know no other."""
        order = tuple(self.layout.index(axis) for axis in "NCHW")
        return [None if image is None else image.transpose(order) for image in images]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoIPooling:
    """The RoI pooling operators.

    Output channel c is of class c // (out_channels // classes). In a bin of group (gh, gw) it is the mean of input
    channel (c * Gh + gh) * Gw + gw.
    """

    name: str  # of the operator
    kind: str  # where a bin's samples lie: "Average", "DeformRoI" or "DeformPSRoI", as in kernels_cu/pooling.cuh
    batch: int
    channels: int
    height: int
    width: int
    rois: int
    output_size: tuple[int, int]
    group_size: tuple[int, int]
    part_size: tuple[int, int]
    classes: int
    samples: int  # along each axis of a bin; 0 for as many as it has pixels
    spatial_scale: float
    offset_unit: float  # an offset of 1 moves a bin by so many roi sizes
    output: Spec

    @property
    def out_channels(self) -> int:
        return self.channels // (self.group_size[0] * self.group_size[1])


# Every output of dcnv3, dcnv4 and ms_deform_attn is a sum of weighted samples of its own group's channels:
#
#   out[n, q, g] = sum over samples s of weight[n, q, g, s] * bilinear(image[n, level of s, g], origin + scale * place)
#
# where `place` is what the caller gives: an offset of Windows, a location of Attention, and samples are the levels'
# points, one level's after the other's. Queries have two axes in both, so that one piece of code takes all three.


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """dcnv3 and dcnv4: a query is an output pixel, its samples are the taps of a window around it."""

    name: str  # of the operator
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

    @property
    def levels(self) -> int:
        return 1

    @property
    def points(self) -> tuple[int]:
        return (self.kernel[0] * self.kernel[1] - self.remove_center,)

    @property
    def samples(self) -> int:
        return self.points[0]

    @property
    def discrete(self) -> bool:
        return False

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def center(self) -> tuple[int, int]:
        """From the window's first tap to the middle that offsets are scaled about; rounded down."""
        return self.dilation[0] * (self.kernel[0] - 1) // 2, self.dilation[1] * (self.kernel[1] - 1) // 2

    def views(self, input: Any, offset: Any, mask: Any = None) -> tuple[Any, Any, Any]:
        """The image (N, H, W, G, D), the places (N, *queries, G, samples, 2) and their weights (..., samples)."""
        group = (self.groups, self.samples)
        if offset is not None and self.packed:
            per_group = offset[..., : 3 * math.prod(group)].reshape(*offset.shape[:3], self.groups, -1)
            offset, mask = per_group[..., : 2 * self.samples], per_group[..., 2 * self.samples :]
        return (
            None if input is None else self.by_group(input),
            None if offset is None else offset.reshape(*offset.shape[:3], *group, 2),
            None if mask is None else mask.reshape(*mask.shape[:3], *group),
        )

    def by_group(self, image: Any) -> Any:
        return image.reshape(*image.shape[:3], self.groups, self.group_channels)

    def unused(self, input: Any, offset: Any, *_: Any) -> Any:
        """The channels of dcnv4's packed tensor that hold nothing; None if there are none."""
        return offset[..., self.groups * self.samples * 3 :] if self.packed and offset is not None else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """ms_deform_attn: samples lie anywhere in the images of all levels."""

    name: str  # of the operator
    batch: int
    pixels: int  # of all levels
    queries: tuple[int, int]  # the second is 1
    groups: int  # heads
    group_channels: int
    points: tuple[int, ...]  # of each level
    softmax: bool
    discrete: bool  # a sample is the pixel that its place lies in
    layout: str  # of the value: "NSMD" or "NMDS"
    output: Spec

    @property
    def levels(self) -> int:
        return len(self.points)

    @property
    def samples(self) -> int:
        return sum(self.points)

    @property
    def packed(self) -> bool:
        return False

    def image(self, value: Any) -> Any:
        """An (N, pixels, G, D) view of a value, or of its gradient, in the call's layout."""
        return value if value is None or self.layout == "NSMD" else value.swapaxes(1, 3).swapaxes(2, 3)

    def views(self, value: Any, shapes: Any, starts: Any, locations: Any, weights: Any) -> tuple[Any, Any, Any]:
        """The images (N, pixels, G, D), the places (N, *queries, G, samples, 2) and their weights (..., samples)."""
        per_group = (self.batch, *self.queries, self.groups, self.samples)
        return (
            self.image(value),
            None if locations is None else locations.reshape(*per_group, 2),
            None if weights is None else weights.reshape(per_group),
        )

    def by_group(self, output: Any) -> Any:
        return output.reshape(*output.shape[:2], 1, self.groups, self.group_channels)

    def unused(self, *_: Any) -> Any:
        return None


Aggregation = Windows | Attention
