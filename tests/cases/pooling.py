"""Configurations of the RoI pooling operators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from oracles import pooling as oracle

from cudcn.ops import deform_psroi_pool, deform_roi_pool, psroi_pool, roi_avg_pool

from .case import Case, Tensors


@dataclass(frozen=True)
class RoIPooling(Case):
    batch: int = 2
    channels: int = 3  # of the output
    size: tuple[int, int] = (8, 9)
    rois: int = 4
    output_size: Any = (3, 2)
    spatial_scale: float = 0.5
    channels_last: bool = False  # in memory
    whole: bool = False  # each roi the whole image

    def __str__(self) -> str:
        return f"{self.op.name} {self.name}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"output_size": self.output_size, "spatial_scale": self.spatial_scale}

    @property
    def canonical(self) -> dict[str, Any]:
        return self.op.canonical(**self.attributes)

    @property
    def groups(self) -> int:
        return 1

    def values(self, random: np.random.Generator) -> Tensors:
        image = random.standard_normal((self.batch, *self.size, self.channels * self.groups)).transpose(0, 3, 1, 2)
        return {"input": image if self.channels_last else np.ascontiguousarray(image), "rois": self.boxes(random)}

    def boxes(self, random: np.random.Generator) -> np.ndarray:
        """Boxes of all sizes; some reach out of the image, some end before they start."""
        if self.whole:
            return np.tile([0.0, 0, 0, self.size[1] - 1, self.size[0] - 1], (self.rois, 1))
        height, width = np.divide(self.size, self.spatial_scale)
        start = random.uniform(-0.2, 0.8, (self.rois, 2)) * (width, height)
        end = start + random.uniform(-0.1, 0.8, (self.rois, 2)) * (width, height)
        return np.column_stack([random.integers(0, self.batch, self.rois), start, end])

    def slow(self, **tensors: Any) -> np.ndarray:
        return getattr(oracle, self.op.name)(**tensors, **self.canonical)


@dataclass(frozen=True)
class RoIAvgPool(RoIPooling):
    op = roi_avg_pool.OP


@dataclass(frozen=True)
class PSRoIPool(RoIPooling):
    group_size: Any = None

    op = psroi_pool.OP

    @property
    def attributes(self) -> dict[str, Any]:
        return {"output_size": self.output_size, "spatial_scale": self.spatial_scale, "group_size": self.group_size}

    @property
    def groups(self) -> int:
        return int(np.prod(self.canonical["group_size"]))


@dataclass(frozen=True)
class DeformRoIPool(RoIPooling):
    sampling_ratio: int = 2
    gamma: float = 0.1
    offset: bool = True
    mask: bool = True
    reach: float = 1.0  # of the offsets

    op = deform_roi_pool.OP

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "output_size": self.output_size, "spatial_scale": self.spatial_scale,
            "sampling_ratio": self.sampling_ratio, "gamma": self.gamma,
        }  # fmt: skip

    def values(self, random: np.random.Generator) -> Tensors:
        bins = self.canonical["output_size"]
        return {
            **super().values(random),
            "offset": self.reach * random.standard_normal((self.rois, 2, *bins)) if self.offset else None,
            "mask": random.random((self.rois, *bins)) if self.mask else None,
        }


@dataclass(frozen=True)
class DeformPSRoIPool(RoIPooling):
    group_size: Any = 1
    part_size: Any = None
    classes: int = 1
    sample_per_part: int = 2
    trans_std: float = 0.1
    offset: bool = True
    mask: bool = True
    reach: float = 1.0

    op = deform_psroi_pool.OP

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "output_size": self.output_size, "spatial_scale": self.spatial_scale, "group_size": self.group_size,
            "part_size": self.part_size, "sample_per_part": self.sample_per_part, "trans_std": self.trans_std,
        }  # fmt: skip

    @property
    def groups(self) -> int:
        return int(np.prod(self.canonical["group_size"]))

    def values(self, random: np.random.Generator) -> Tensors:
        bins, parts = self.canonical["output_size"], self.canonical["part_size"]
        offset = self.reach * random.standard_normal((self.rois, 2 * self.classes, *parts))
        mask = random.random((self.rois, self.classes, *bins))
        return {
            **super().values(random),
            "offset": offset if self.offset else None,
            "mask": mask if self.mask else None,
        }


CASES: list[RoIPooling] = [
    RoIAvgPool("plain"),
    RoIAvgPool("channels last", channels=40, batch=1, channels_last=True, output_size=4),
    RoIAvgPool("one pixel", batch=1, channels=1, size=(1, 1), rois=2, output_size=1, spatial_scale=1.0),
    PSRoIPool("plain"),
    PSRoIPool("more groups than bins", group_size=(2, 5), batch=3, channels=2, spatial_scale=0.25),
    PSRoIPool("fewer groups than bins", group_size=2, output_size=(5, 4), channels_last=True),
    DeformRoIPool("plain"),
    DeformRoIPool("adaptive", sampling_ratio=0, channels_last=True, output_size=2, rois=5),
    DeformRoIPool("without offset", offset=False, sampling_ratio=3, spatial_scale=0.3),
    DeformRoIPool("without mask", mask=False, channels=20, gamma=0.3),
    DeformRoIPool("many channels", channels=70, channels_last=True, batch=1, size=(4, 5), rois=3, output_size=(1, 2)),
    DeformRoIPool("one row", batch=1, channels=1, size=(1, 2), rois=3, spatial_scale=1.0, output_size=1),
    DeformRoIPool("far offsets", reach=6.0, sampling_ratio=-1, rois=6),
    DeformPSRoIPool("plain"),
    DeformPSRoIPool("groups", group_size=(3, 2), channels=2, mask=False),
    DeformPSRoIPool("fewer parts", output_size=(4, 5), part_size=(2, 3), group_size=2, classes=2, channels=4),
    DeformPSRoIPool("more parts", part_size=5, classes=3, sample_per_part=3, channels_last=True),
    DeformPSRoIPool("without offset", offset=False, classes=3, spatial_scale=0.3),
    DeformPSRoIPool("far offsets", reach=6.0, rois=6, trans_std=0.2),
]
PLAIN = [case for case in CASES if case.name == "plain"]  # one of each operator
BY_NAME = {str(case): case for case in CASES}
SMALL = [replace(case, rois=2, channels=min(case.channels, 6)) for case in CASES if "far" not in case.name]
# whose channels lie side by side in memory by 16 bytes at least: in full slabs, and with vectors and blocks left over
WIDE: list[RoIPooling] = [
    RoIAvgPool("wide", channels=40, channels_last=True),
    DeformRoIPool("wide", channels=264, channels_last=True, rois=3, size=(5, 4), output_size=(2, 5)),
    DeformRoIPool("wide, many samples", channels=16, channels_last=True, rois=3, sampling_ratio=5),
    DeformPSRoIPool("wide", channels=48, classes=2, channels_last=True, part_size=2),
]
# for the adapters: pairs unequal, several classes; the last of each operator has all its tensors
ADAPTED = [
    RoIAvgPool("adapted", channels=2),
    PSRoIPool("adapted", group_size=(2, 3), channels=2),
    DeformRoIPool("adapted v1", mask=False, channels=2, sampling_ratio=0),
    DeformRoIPool("adapted v2", channels=2, gamma=0.25),
    DeformPSRoIPool("adapted v1", group_size=(3, 1), part_size=(2, 1), channels=2, mask=False),
    DeformPSRoIPool("adapted v2", group_size=(1, 2), part_size=(2, 1), channels=2, classes=2),
]
