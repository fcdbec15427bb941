"""What the RoI pooling operators share: the rules of their tensors."""

from __future__ import annotations

import math
from typing import Any

from .. import check
from ..geometry import MOST, RoIPooling, Spec


def geometry(
    name: str,
    kind: str,
    input: Spec,
    rois: Spec,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int] = (1, 1),
    part_size: tuple[int, int] | None = None,
    classes: int = 1,
    samples: int = 1,
    offset_unit: float = 0.0,
) -> RoIPooling:
    check.rank(name, "input", input, "(N, C, H, W)")
    check.rank(name, "rois", rois, "(R, 5)")
    check.floating(name, "input", input)
    check.same_dtype(name, "rois", rois, input.dtype, or_float32=True)
    count = rois.shape[0]
    check.shape(name, "rois", rois, "(R, 5)", (count, 5))
    batch, channels, height, width = input.shape
    if min(channels, height, width) < 1:
        raise ValueError(f"{name}: input's channels, height and width must not be empty, got {input.shape}")
    if max(height, width) > MOST:
        raise ValueError(f"{name}: input's height and width must be at most 2**23, got {input.shape}")
    groups = group_size[0] * group_size[1]
    if channels % groups:
        raise ValueError(
            f"{name}: group_size {group_size} must divide input's channels into {groups} equal groups, got {channels}"
        )
    if classes < 1 or channels // groups % classes:
        raise ValueError(
            f"{name}: the classes of offset and mask must divide the output's {channels // groups} channels, "
            f"got {classes}"
        )
    part_size = output_size if part_size is None else part_size
    places = count * max(math.prod(output_size), math.prod(part_size))
    product = max(o * max(g, p) for o, g, p in zip(output_size, group_size, part_size, strict=True))
    if places >= 2**30 or product > check.LARGEST:
        raise ValueError(
            f"{name}: there must be fewer than 2**30 bins and parts, got {count} rois of {output_size} bins in groups "
            f"{group_size} and parts {part_size}"
        )
    return RoIPooling(
        name=name, kind=kind, batch=batch, channels=channels, height=height, width=width, rois=count,
        output_size=output_size, group_size=group_size, part_size=part_size, classes=classes, samples=samples,
        spatial_scale=spatial_scale, offset_unit=offset_unit,
        output=Spec((count, channels // groups, *output_size), input.dtype),
    )  # fmt: skip


def sample_count(name: str, attribute: str, value: Any, least: int) -> int:
    number = check.integer(name, attribute, value, least)
    if number > MOST:
        raise ValueError(f"{name}: {attribute} must be at most 2**23, got {number}")
    return number


def check_fine(name: str, tensor: str, spec: Spec | None, dtype: str, axes: str, want: tuple[int, ...]) -> None:
    """The rules of offset and mask."""
    if spec is not None:
        check.same_dtype(name, tensor, spec, dtype, or_float32=True)
        check.shape(name, tensor, spec, axes, want)
