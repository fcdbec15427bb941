"""Configurations of dcnv3, dcnv4 and ms_deform_attn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from oracles import aggregate as oracle

from cudcn.ops import dcnv3, dcnv4, ms_deform_attn

from .case import Case, Tensors


@dataclass(frozen=True)
class Windows(Case):
    """A configuration of dcnv3 or dcnv4."""

    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (7, 6)
    kernel: Any = 3
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    group: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False
    reach: float = 2.0  # of the offsets, in pixels

    def __str__(self) -> str:
        return f"{self.op.name} {self.name}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel, "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "group": self.group, "offset_scale": self.offset_scale, "remove_center": self.remove_center,
            "softmax": self.softmax,
        }  # fmt: skip

    @property
    def canonical(self) -> dict[str, Any]:
        return self.op.canonical(**self.attributes)

    @property
    def points(self) -> int:
        return len(oracle.taps(self.canonical["kernel_size"], self.remove_center))

    def places(self) -> tuple[int, int]:
        """The output's height and width."""
        a = self.canonical
        height, width = (
            (self.size[i] + sum(a["padding"][2 * i : 2 * i + 2]) - a["dilation"][i] * (a["kernel_size"][i] - 1) - 1)
            // a["stride"][i] + 1
            for i in (0, 1)
        )  # fmt: skip
        return height, width

    def image(self, random: np.random.Generator) -> np.ndarray:
        return random.standard_normal((self.batch, *self.size, self.channels))

    def offset_and_mask(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.batch, *self.places(), self.group * self.points)
        offset = self.reach * random.standard_normal((*shape[:3], 2 * shape[3]))
        return offset, random.standard_normal(shape) if self.softmax else random.random(shape)

    def inside_cells(self, offset: np.ndarray) -> np.ndarray:
        """Offsets whose samples lie near the border of no two cells."""
        s = self.offset_scale
        cell = np.floor(offset * s)
        return (cell + 0.1 + 0.3 * (offset * s - cell)) / s


@dataclass(frozen=True)
class DCNv3(Windows):
    op = dcnv3.OP

    def values(self, random: np.random.Generator) -> Tensors:
        image = self.image(random)
        offset, mask = self.offset_and_mask(random)
        return {"input": image, "offset": offset, "mask": mask}

    def slow(self, **tensors: Any) -> np.ndarray:
        return oracle.dcnv3(**tensors, **self.canonical)

    def smooth(self, tensors: Tensors) -> Tensors:
        return {**tensors, "offset": self.inside_cells(tensors["offset"])}


@dataclass(frozen=True)
class DCNv4(Windows):
    op = dcnv4.OP

    def values(self, random: np.random.Generator) -> Tensors:
        image = self.image(random)
        return {"input": image, "offset_mask": self.packed(*self.offset_and_mask(random))}

    def packed(self, offset: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """With numbers in the unused channels too: nobody may read them."""
        parts = []
        for g in range(self.group):
            parts += [offset[..., g * 2 * self.points : (g + 1) * 2 * self.points]]
            parts += [mask[..., g * self.points : (g + 1) * self.points]]
        unused = -3 * self.group * self.points % 8
        return np.concatenate([*parts, np.full((*offset.shape[:3], unused), 7.0)], axis=-1)

    def unpacked(self, offset_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return oracle.unpacked(offset_mask, self.group, self.points)

    def slow(self, input: Any, offset_mask: Any) -> np.ndarray:
        return oracle.dcnv3(input, *self.unpacked(offset_mask), **self.canonical)

    def smooth(self, tensors: Tensors) -> Tensors:
        offset, mask = self.unpacked(tensors["offset_mask"])
        return {**tensors, "offset_mask": self.packed(self.inside_cells(offset), mask)}


@dataclass(frozen=True)
class Attention(Case):
    batch: int = 2
    queries: int = 5
    heads: int = 2
    channels: int = 3
    sizes: tuple[tuple[int, int], ...] = ((5, 4), (3, 2))
    points: int | tuple[int, ...] = 2  # of every level, or of each
    softmax: bool = False
    gap: int = 0  # pixels of no level, before each
    index: str = "int64"
    method: str = "bilinear"
    layout: str = "NSMD"
    starts: bool = True  # whether level_start_index is given

    op = ms_deform_attn.OP

    def __str__(self) -> str:
        return f"{self.op.name} {self.name}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "softmax": self.softmax, "points": None if isinstance(self.points, int) else self.points,
            "method": self.method, "layout": self.layout,
        }  # fmt: skip

    def values(self, random: np.random.Generator) -> Tensors:
        shapes = np.array(self.sizes, self.index)
        ends = np.cumsum(shapes.prod(1) + self.gap)
        samples = (len(shapes), self.points) if isinstance(self.points, int) else (sum(self.points),)
        weights_shape = (self.batch, self.queries, self.heads, *samples)
        weights = random.standard_normal(weights_shape) if self.softmax else random.random(weights_shape)
        value = random.standard_normal((self.batch, ends[-1], self.heads, self.channels))
        return {
            "value": value if self.layout == "NSMD" else np.moveaxis(value, 1, -1),
            "spatial_shapes": shapes,
            "level_start_index": (ends - shapes.prod(1)).astype(self.index) if self.starts else None,
            "sampling_locations": 1.6 * random.random((*weights_shape, 2)) - 0.3,
            "attention_weights": weights,
        }

    def slow(self, **tensors: Any) -> np.ndarray:
        return oracle.ms_deform_attn(**tensors, **self.attributes)

    def smooth(self, tensors: Tensors) -> Tensors:
        size = np.repeat(tensors["spatial_shapes"], oracle.counts(self.points, len(self.sizes)), 0)[:, ::-1]
        locations = tensors["sampling_locations"]
        middle = 0.5 if self.method == "discrete" else -0.5
        position = locations.reshape(*locations.shape[:3], -1, 2) * size + middle
        cell = np.floor(position)
        moved = (cell + 0.1 + 0.8 * (position - cell) - middle) / size
        return {**tensors, "sampling_locations": moved.reshape(locations.shape)}


_UNEVEN = {"kernel": (2, 3), "stride": (2, 1), "dilation": (1, 2), "padding": ((1, 0), (2, 3)), "size": (6, 5)}
DCNV3 = [
    DCNv3("plain"),
    DCNv3("one pixel", batch=1, channels=1, size=(1, 1), kernel=1, padding=0, group=1),
    DCNv3("uneven", **_UNEVEN, offset_scale=0.5),
    DCNv3("no centre", kernel=3, remove_center=True, softmax=True, offset_scale=2.0, batch=1),
    DCNv3("large kernel", kernel=(5, 4), padding=2, batch=1, size=(5, 5), softmax=True),
    DCNv3("many channels", channels=80, group=1, batch=1, size=(3, 4)),
    DCNv3("prime channels", channels=37, group=1, batch=1, size=(3, 2)),
    DCNv3("far offsets", reach=8.0, batch=3, size=(4, 5), channels=6, group=3),
]
DCNV4 = [
    DCNv4("plain", channels=16, batch=1, size=(4, 5)),
    DCNv4("uneven", **_UNEVEN, channels=9, group=3, softmax=True),
    DCNv4("no centre", kernel=5, padding=2, remove_center=True, batch=1, size=(4, 3)),
    # what the published launcher and kernel get wrong or refuse
    DCNv4("odd sizes", batch=3, size=(9, 11), channels=2),
    DCNv4("stride 2", batch=7, size=(5, 7), stride=2, channels=2, group=1),
    DCNv4("batch of one, even kernel", batch=1, size=(5, 3), kernel=2, channels=10, group=1),
    DCNv4("odd channels", batch=1, size=(3, 5), channels=21, group=3, kernel=(1, 3), padding=(0, 1)),
]
ATTENTION = [
    Attention("plain"),
    Attention("one of each", batch=1, queries=1, heads=1, channels=1, sizes=((1, 1),), points=1),
    Attention("softmax", softmax=True, index="int32", channels=8),
    Attention("levels apart", batch=1, gap=3, sizes=((2, 5), (4, 3), (1, 1)), points=3, softmax=True),
    Attention("many queries", batch=3, queries=70, heads=1, channels=2, sizes=((3, 3),), points=1),
    Attention("uneven points", channels=8, sizes=((5, 4), (3, 2), (2, 2)), points=(3, 1, 4), softmax=True),
    Attention("even points", points=(3, 3), starts=False),
    Attention("discrete", channels=8, softmax=True, method="discrete"),
    Attention("discrete, uneven points", batch=3, gap=2, points=(1, 4), method="discrete", index="int32"),
    Attention("pixels last", channels=4, layout="NMDS", starts=False),
    Attention("discrete, pixels last", layout="NMDS", method="discrete", sizes=((1, 1), (2, 3), (4, 4))),
    Attention("more samples than are held", queries=2, points=(150, 3), softmax=True),
]
CASES = [*DCNV3, *DCNV4, *ATTENTION]
BY_NAME = {str(case): case for case in CASES}
SMALL = [replace(case, batch=min(case.batch, 2)) for case in CASES if "far" not in case.name]
ADAPTED = [
    replace(BY_NAME["dcnv3 uneven"], softmax=True),
    replace(BY_NAME["dcnv4 uneven"]),
    replace(BY_NAME["ms_deform_attn discrete, uneven points"], index="int64", starts=False, gap=0, softmax=True),
    replace(BY_NAME["ms_deform_attn softmax"], index="int64"),
]
