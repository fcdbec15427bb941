"""The cases as data: an operator at one size, its tensors, and the work that no implementation can avoid."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from cudcn.op import Op, specs

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A subclass has its sizes as fields, and says what the tensors are."""

    operator: ClassVar[str]

    @property
    def op(self) -> Op:
        return importlib.import_module(f"cudcn.ops.{self.operator}").OP

    @property
    def attributes(self) -> dict[str, Any]:
        raise NotImplementedError

    def tensors(self, seed: int = 0) -> Tensors:
        """float32 tensors as a trained model has them, in the operator's order."""
        raise NotImplementedError

    @functools.cached_property
    def specs(self) -> dict[str, Any]:
        """Shape and dtype of each tensor, None for those left out."""
        given = self.tensors()
        return dict(zip(self.op.tensors, specs(map(given.get, self.op.tensors)), strict=True))

    @property
    def output(self) -> tuple[int, ...]:
        attributes = self.op.canonical(**{**self.op.function.__kwdefaults__, **self.attributes})
        return self.op.geometry(tuple(self.specs.values()), **attributes).output.shape

    def grad_output(self, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(self.output, np.float32)

    def flops(self, which: str) -> int:
        """Those of the matrix products alone."""
        return 0

    def bytes(self, which: str, itemsize: int) -> int:
        """Each tensor read or written once a pass, below which no implementation can go."""
        given = {name: t for name, t in self.specs.items() if t is not None}
        sizes = {n: math.prod(t.shape) * (itemsize if "float" in t.dtype else 8) for n, t in given.items()}
        read, out = sum(sizes.values()), math.prod(self.output) * itemsize
        grads = sum(size for name, size in sizes.items() if name not in self.op.non_differentiable)
        forward = read + out
        return forward if which == "forward" else forward + out + read + grads


@dataclass(frozen=True)
class DeformConv2d(Case):
    """With mask and bias, 'same' padding, stride 1 and as many channels out as in."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    layout: str = "NCHW"
    spread: float = 1.0

    operator = "deform_conv2d"

    def __str__(self) -> str:
        layout = "" if self.layout == "NCHW" else f" {self.layout}"
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}{layout}{_spread(self.spread)}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"padding": self.kernel // 2, "layout": self.layout}

    def tensors(self, seed: int = 0) -> Tensors:
        """Offsets of about `spread` pixels, masks in [0, 1]."""
        random, taps = np.random.default_rng(seed), self.kernel**2
        scale = (self.channels * taps) ** -0.5
        return {
            "input": random.standard_normal(self._image(self.channels), np.float32),
            "offset": self.spread * random.standard_normal(self._image(2 * taps), np.float32),
            "weight": scale * random.standard_normal((self.channels, self.channels, *[self.kernel] * 2), np.float32),
            "bias": random.standard_normal(self.channels, np.float32),
            "mask": random.random(self._image(taps), np.float32),
        }

    def _image(self, channels: int) -> tuple[int, ...]:
        size = {"N": self.batch, "C": channels, "H": self.height, "W": self.width}
        return tuple(size[axis] for axis in self.layout)

    def flops(self, which: str) -> int:
        """One product in the forward pass, two more in the backward pass."""
        out = self.batch * self.channels * self.height * self.width
        return 2 * out * self.channels * self.kernel**2 * (1 if which == "forward" else 3)


@dataclass(frozen=True)
class RoIPooling(Case):
    """7x7 bins of boxes of all sizes, evenly spread over the images of a stride-4 pyramid level."""

    batch: int
    channels: int
    height: int
    width: int
    rois: int
    bins: int = 7

    SCALE: ClassVar[float] = 0.25

    def __str__(self) -> str:
        image = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        return f"{self.rois} rois, {self.bins}x{self.bins}, on {image}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"output_size": self.bins, "spatial_scale": self.SCALE}

    def tensors(self, seed: int = 0) -> Tensors:
        random = np.random.default_rng(seed)
        image = random.standard_normal((self.batch, self.channels, self.height, self.width), np.float32)
        whole = np.array([self.width, self.height], np.float32) / self.SCALE
        size = whole * random.uniform(0.05, 0.5, (self.rois, 2))
        start = (whole - size) * random.random((self.rois, 2))
        index = np.arange(self.rois).reshape(-1, 1) % self.batch
        return {"input": image, "rois": np.hstack([index, start, start + size]).astype(np.float32)}


class RoIAvgPool(RoIPooling):
    operator = "roi_avg_pool"


class PSRoIPool(RoIPooling):
    """`channels` are bins**2 times the number of classes."""

    operator = "psroi_pool"


class DeformRoIPool(RoIPooling):
    operator = "deform_roi_pool"

    @property
    def attributes(self) -> dict[str, Any]:
        return {**super().attributes, "sampling_ratio": 2}

    def tensors(self, seed: int = 0) -> Tensors:
        random = np.random.default_rng(seed + 100)
        offset = random.standard_normal((self.rois, 2, self.bins, self.bins), np.float32)
        return {**super().tensors(seed), "offset": offset}


class DeformPSRoIPool(RoIPooling):
    """One offset per part for all classes; `channels` are bins**2 times the number of classes."""

    operator = "deform_psroi_pool"

    @property
    def attributes(self) -> dict[str, Any]:
        return {**super().attributes, "group_size": self.bins}

    def tensors(self, seed: int = 0) -> Tensors:
        random = np.random.default_rng(seed + 100)
        offset = random.standard_normal((self.rois, 2, self.bins, self.bins), np.float32)
        return {**super().tensors(seed), "offset": offset}


@dataclass(frozen=True)
class DCNv3(Case):
    """3x3, 'same' padding, softmaxed weights."""

    batch: int
    height: int
    width: int
    channels: int
    group: int
    spread: float = 1.0

    operator = "dcnv3"

    def __str__(self) -> str:
        image = f"{self.batch}x{self.height}x{self.width}x{self.channels}"
        return f"{image}, {self.group} groups{_spread(self.spread)}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"kernel_size": 3, "padding": 1, "group": self.group}

    def tensors(self, seed: int = 0) -> Tensors:
        """Offsets of about `spread` pixels."""
        random, image = np.random.default_rng(seed), (self.batch, self.height, self.width)
        weights = np.exp(random.standard_normal((*image, self.group, 9), np.float32))
        return {
            "input": random.standard_normal((*image, self.channels), np.float32),
            "offset": self.spread * random.standard_normal((*image, self.group * 18), np.float32),
            "mask": (weights / weights.sum(-1, keepdims=True)).reshape(*image, -1),
        }


class DCNv4(DCNv3):
    """3x3, 'same' padding."""

    operator = "dcnv4"

    def tensors(self, seed: int = 0) -> Tensors:
        input, offset, mask = super().tensors(seed).values()
        image = input.shape[:3]
        packed = np.concatenate([offset.reshape(*image, self.group, 18), mask.reshape(*image, self.group, 9)], -1)
        packed = packed.reshape(*image, -1)
        return {"input": input, "offset_mask": np.pad(packed, [(0, 0)] * 3 + [(0, -packed.shape[-1] % 8)])}


@dataclass(frozen=True)
class MSDeformAttn(Case):
    """An encoder: the queries are the pixels of all levels, and look around their own places."""

    batch: int
    levels: tuple[tuple[int, int], ...] = field(repr=False)
    heads: int = 8
    dimensions: int = 32
    points: int = 4
    spread: float = 2.0

    operator = "ms_deform_attn"

    def __str__(self) -> str:
        largest = "x".join(map(str, self.levels[0]))
        return (
            f"batch {self.batch}, {len(self.levels)} levels from {largest}, {self.heads} heads of {self.dimensions}, "
            f"{self.points} points{_spread(self.spread, 2)}"
        )

    @property
    def attributes(self) -> dict[str, Any]:
        return {}

    def tensors(self, seed: int = 0) -> Tensors:
        """Sampling points about `spread` pixels around."""
        random = np.random.default_rng(seed)
        shapes = np.array(self.levels, np.int64)
        sizes = shapes.prod(1)
        centres = np.concatenate([_centres(h, w) for h, w in self.levels])
        places = (self.batch, len(centres), self.heads, len(shapes), self.points)
        shift = (
            self.spread * random.standard_normal((*places, 2), np.float32) / shapes[:, None, ::-1].astype(np.float32)
        )
        weights = np.exp(random.standard_normal(places, np.float32))
        return {
            "value": random.standard_normal((self.batch, len(centres), self.heads, self.dimensions), np.float32),
            "spatial_shapes": shapes,
            "level_start_index": np.concatenate([[0], sizes.cumsum()[:-1]]),
            "sampling_locations": centres[:, None, None, None] + shift,
            "attention_weights": weights / weights.sum((-2, -1), keepdims=True),
        }


def _spread(pixels: float, usual: float = 1) -> str:
    return "" if pixels == usual else f", offsets of {pixels:g} pixels"


def _centres(height: int, width: int) -> np.ndarray:
    """(height * width, 2) of (x, y) in [0, 1]."""
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    return np.stack([(x + 0.5) / width, (y + 0.5) / height], -1).astype(np.float32)
