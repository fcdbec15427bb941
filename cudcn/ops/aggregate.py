"""What dcnv3 and dcnv4 share: their attributes, and the rules of their input."""

from __future__ import annotations

from typing import Any

from .. import check
from ..geometry import Spec, Windows


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
        name=name, batch=batch, height=height, width=width, queries=queries, groups=group,
        group_channels=channels // group, kernel=kernel_size, stride=stride, padding=(top, left), dilation=dilation,
        offset_scale=offset_scale, remove_center=remove_center, packed=packed, softmax=softmax,
        output=Spec((batch, *queries, channels), input.dtype),
    )  # fmt: skip
