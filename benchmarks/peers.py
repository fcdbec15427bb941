"""Who the operators are compared with: functions of torch tensors that autograd can differentiate.

A peer takes the case and the tensors by name. One whose result is another operator's, given as a scale, is not
`exact`: its values are not compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cases import Case

import cudcn


class Unavailable(Exception):
    """A contestant cannot take part in a case; the message says why and stands in its row."""


@dataclass(frozen=True)
class Peer:
    call: Callable[..., Any]
    exact: bool = True


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable("not installed") from None


def ours(case: Case, **tensors: Any) -> Any:
    return getattr(cudcn, case.operator)(**tensors, **case.attributes)


# Running a pass: the output, and after it, if the pass goes backward, the gradients that there are


def run_arrays(case: Case, which: str, tensors: dict[str, Any], grad_output: Any) -> list[Any]:
    """cudcn's raw pair on NumPy or CuPy arrays."""
    out = ours(case, **tensors)
    if which == "forward":
        return [out]
    grads = getattr(cudcn, f"{case.operator}_backward")(grad_output, **tensors, **case.attributes)
    return [out, *(grad for grad in grads if grad is not None)]


def run_torch(call: Callable[..., Any], case: Case, which: str, tensors: dict[str, Any], grad_output: Any) -> list[Any]:
    """A peer on the tensors that `leaves` returns."""
    import torch

    if which == "forward":
        with torch.no_grad():
            return [call(case, **tensors)]
    out = call(case, **tensors)
    wanted = [t for t in tensors.values() if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, grad_output, allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)]


def leaves(case: Case, tensors: dict[str, Any]) -> dict[str, Any]:
    """Torch tensors over the same memory, to be differentiated where the operator has a gradient."""
    return {name: t.detach().requires_grad_(name not in case.op.non_differentiable) for name, t in tensors.items()}


# deform_conv2d


def torchvision_deform_conv2d(case: Any, **tensors: Any) -> Any:
    if case.layout == "NHWC":
        raise Unavailable("NCHW only")  # channels_last memory it copies to NCHW first
    return module("torchvision.ops").deform_conv2d(**tensors, padding=case.kernel // 2)


def convolution(case: Any, input: Any, weight: Any, bias: Any, **_: Any) -> Any:
    import torch

    convolve, padding = torch.nn.functional.conv2d, case.kernel // 2
    if case.layout == "NCHW":
        return convolve(input, weight, bias, padding=padding)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return convolve(input.permute(0, 3, 1, 2), weight, bias, padding=padding).permute(0, 2, 3, 1)


# RoI pooling


def torchvision_roi_align(case: Any, input: Any, rois: Any, **_: Any) -> Any:
    """deform_roi_pool without its offsets."""
    ratio = case.attributes.get("sampling_ratio", 2)
    return module("torchvision.ops").roi_align(input, rois, case.bins, case.SCALE, ratio, aligned=True)


def torchvision_ps_roi_pool(case: Any, input: Any, rois: Any) -> Any:
    """It rounds otherwise, and never reads the last row and column."""
    return module("torchvision.ops").ps_roi_pool(input, rois, case.bins, case.SCALE)


def mmcv_deform_roi_pool(case: Any, input: Any, rois: Any, offset: Any) -> Any:
    pool = module("mmcv.ops").deform_roi_pool  # has no mask, and a wrong offset gradient near the border
    return pool(input, rois, offset, (case.bins, case.bins), case.SCALE, case.attributes["sampling_ratio"], 0.1)


# The aggregate family, composed of torch's own grid_sample


def grid_sample_dcnv3(case: Any, input: Any, offset: Any, mask: Any) -> Any:
    import torch

    n, height, width, channels = input.shape
    group, pixels = case.group, height * width
    planes = input.permute(0, 3, 1, 2).reshape(n * group, channels // group, height, width)
    x_tap, y_tap = (torch.arange(9, device=input.device) // 3 - 1, torch.arange(9, device=input.device) % 3 - 1)
    y, x = (
        torch.arange(pixels, device=input.device)[:, None] // width,
        torch.arange(pixels, device=input.device)[:, None] % width,
    )
    base = torch.stack([x + x_tap, y + y_tap], -1)  # (pixels, 9, 2)
    shift = offset.reshape(n, pixels, group, 9, 2).transpose(1, 2).reshape(n * group, pixels, 9, 2)
    size = torch.tensor([width, height], dtype=input.dtype, device=input.device)
    grid = (2 * (base + shift) + 1) / size - 1
    samples = torch.nn.functional.grid_sample(planes, grid, align_corners=False)  # (n * group, C / group, pixels, 9)
    weights = mask.reshape(n, pixels, group, 9).transpose(1, 2).reshape(n * group, 1, pixels, 9)
    return (samples * weights).sum(-1).reshape(n, channels, height, width).permute(0, 2, 3, 1)


def grid_sample_dcnv4(case: Any, input: Any, offset_mask: Any) -> Any:
    n, height, width, _ = input.shape
    packed = offset_mask[..., : 27 * case.group].reshape(n, height, width, case.group, 27)
    offset, mask = (part.reshape(n, height, width, -1) for part in packed.split((18, 9), -1))
    return grid_sample_dcnv3(case, input, offset, mask)


def grid_sample_attention(
    case: Any, value: Any, spatial_shapes: Any, level_start_index: Any, sampling_locations: Any, attention_weights: Any
) -> Any:
    import torch

    n, _, heads, dimensions = value.shape
    queries, points = sampling_locations.shape[1], case.points
    total = value.new_zeros(())
    for level, part in enumerate(value.split([h * w for h, w in case.levels], 1)):
        planes = part.permute(0, 2, 3, 1).reshape(n * heads, dimensions, *case.levels[level])
        grid = 2 * sampling_locations[:, :, :, level].transpose(1, 2).reshape(n * heads, queries, points, 2) - 1
        samples = torch.nn.functional.grid_sample(planes, grid, align_corners=False)
        weights = attention_weights[:, :, :, level].transpose(1, 2).reshape(n * heads, 1, queries, points)
        total = total + (samples * weights).sum(-1)
    return total.reshape(n, heads * dimensions, queries).transpose(1, 2)


# Their published kernels, where they are built


def published_dcnv3(case: Any, input: Any, offset: Any, mask: Any) -> Any:
    function = module("ops_dcnv3.functions").DCNv3Function
    size = case.channels // case.group
    return function.apply(input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, case.group, size, 1.0, 256, 0)


def published_dcnv4(case: Any, input: Any, offset_mask: Any) -> Any:
    function = module("DCNv4.functions").DCNv4Function
    size = case.channels // case.group
    return function.apply(input, offset_mask, 3, 3, 1, 1, 1, 1, 1, 1, case.group, size, 1.0, 256, False)


def mmcv_attention(case: Any, **tensors: Any) -> Any:
    function = module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    return function.apply(*tensors.values(), 64)


PEERS: dict[str, dict[str, Peer]] = {
    "deform_conv2d": {
        "torchvision": Peer(torchvision_deform_conv2d),
        "plain convolution": Peer(convolution, exact=False),
    },
    "roi_avg_pool": {"torchvision RoIAlign": Peer(torchvision_roi_align, exact=False)},
    "psroi_pool": {"torchvision ps_roi_pool": Peer(torchvision_ps_roi_pool, exact=False)},
    "deform_roi_pool": {
        "mmcv": Peer(mmcv_deform_roi_pool),
        "torchvision RoIAlign": Peer(torchvision_roi_align, exact=False),
    },
    "deform_psroi_pool": {
        "torchvision ps_roi_pool": Peer(
            lambda case, input, rois, offset: torchvision_ps_roi_pool(case, input, rois), exact=False
        )
    },
    "dcnv3": {"published DCNv3": Peer(published_dcnv3), "grid_sample": Peer(grid_sample_dcnv3)},
    "dcnv4": {"published DCNv4": Peer(published_dcnv4), "grid_sample": Peer(grid_sample_dcnv4)},
    "ms_deform_attn": {"mmcv": Peer(mmcv_attention), "grid_sample": Peer(grid_sample_attention)},
}
