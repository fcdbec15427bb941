"""Modules over dcnv3 and dcnv4."""

from __future__ import annotations

from typing import Any

import torch

from cudcn import check
from cudcn.geometry import ceil_div
from cudcn.ops.aggregate import canonical
from cudcn.ops.dcnv3 import dcnv3
from cudcn.ops.dcnv4 import dcnv4

from .layers import projection, zeroed


class DCNv3(torch.nn.Module):
    """The deformable convolution of InternImage: (N, H, W, channels) to the same, or to every `stride`-th pixel.

    A depthwise convolution of the input predicts offsets and softmaxed weights for each of `group` groups; the
    projected input is sampled there. Parameters are named as in InternImage's module, and start as there: zero
    offsets, equal weights. With `center_feature_scale` the output is blended with the projected input, by a share per
    group that is predicted from the depthwise features; that needs stride 1.

    Paper: InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions (Wang et al., 2023).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        super().__init__()
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        self.attributes = _attributes(
            type(self).__name__, channels, kernel_size, dw_kernel_size, stride, dilation, group, offset_scale,
            center_feature_scale, remove_center,
        )  # fmt: skip
        self.group = group
        taps = group * (kernel_size**2 - remove_center)
        norm = torch.nn.Sequential(_ChannelsLast(), torch.nn.LayerNorm(channels, eps=1e-6))
        self.dw_conv = torch.nn.Sequential(_depthwise(channels, dw_kernel_size, stride), norm, torch.nn.GELU())
        self.offset = zeroed(channels, 2 * taps)
        self.mask = zeroed(channels, taps)
        self.input_proj = projection(channels)
        self.output_proj = projection(channels)
        _add_center_feature_scale(self, channels, group, center_feature_scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projected = self.input_proj(input)
        features = self.dw_conv(input.permute(0, 3, 1, 2))
        out = dcnv3(projected, self.offset(features), self.mask(features), softmax=True, **self.attributes)
        return self.output_proj(_blended(self, out, projected, features))


class DCNv4(torch.nn.Module):
    """The deformable convolution of DCNv4: (N, H, W, channels) to the same, or to every `stride`-th pixel.

    A linear layer predicts offsets and unbounded weights from the input, after a depthwise convolution if
    `dw_kernel_size` is given (stride 2 and more needs it). Parameters are named as in the authors' module.
    `without_pointwise` leaves out the projections of input and output. With `center_feature_scale` the output is
    blended with the projected input, by a share per group that is predicted from the output; that needs stride 1.

    Paper: Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications (Xiong et
    al., 2024).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.attributes = _attributes(
            name, channels, kernel_size, 1 if dw_kernel_size is None else dw_kernel_size, stride, dilation, group,
            offset_scale, center_feature_scale, remove_center,
        )  # fmt: skip
        if stride > 1 and dw_kernel_size is None:
            raise ValueError(f"{name}: stride above 1 needs dw_kernel_size, got stride={stride}")
        output_bias = check.flag(name, "output_bias", output_bias)
        without_pointwise = check.flag(name, "without_pointwise", without_pointwise)
        self.group = group
        self.offset_mask_dw = None if dw_kernel_size is None else _depthwise(channels, dw_kernel_size, stride)
        self.offset_mask = zeroed(channels, ceil_div(3 * group * (kernel_size**2 - remove_center), 8) * 8)
        self.value_proj = torch.nn.Identity() if without_pointwise else projection(channels)
        self.output_proj = torch.nn.Identity() if without_pointwise else projection(channels, output_bias)
        _add_center_feature_scale(self, channels, group, center_feature_scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projected, features = self.value_proj(input), input
        if self.offset_mask_dw is not None:
            features = self.offset_mask_dw(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = dcnv4(projected, self.offset_mask(features), **self.attributes)
        return self.output_proj(_blended(self, out, projected, out))


def _depthwise(channels: int, kernel_size: int, stride: int) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=channels)


class _ChannelsLast(torch.nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.permute(0, 2, 3, 1)


def _attributes(
    name: str,
    channels: int,
    kernel_size: int,
    dw_kernel_size: int,
    stride: int,
    dilation: int,
    group: int,
    offset_scale: float,
    center_feature_scale: bool,
    remove_center: bool,
) -> dict[str, Any]:
    """The attributes of dcnv3 and dcnv4, checked; the padding keeps the output on the input's grid."""
    for argument, value in (
        ("channels", channels), ("kernel_size", kernel_size), ("dw_kernel_size", dw_kernel_size), ("stride", stride),
        ("dilation", dilation), ("group", group),
    ):  # fmt: skip
        check.integer(name, argument, value, least=1)
    if channels % group:
        raise ValueError(f"{name}: group must divide channels, got group={group}, channels={channels}")
    if check.flag(name, "center_feature_scale", center_feature_scale) and stride != 1:
        raise ValueError(f"{name}: center_feature_scale needs stride 1, got {stride}")
    for size in kernel_size, dw_kernel_size:
        if size % 2 == 0:
            raise ValueError(f"{name}: kernel sizes must be odd, for the output to lie on the input's grid, got {size}")
    attributes = {
        "kernel_size": kernel_size, "stride": stride, "padding": dilation * (kernel_size // 2), "dilation": dilation,
        "group": group, "offset_scale": offset_scale, "remove_center": remove_center,
    }  # fmt: skip
    canonical(name, **attributes, softmax=False)  # raises
    return attributes


def _add_center_feature_scale(module: Any, channels: int, group: int, wanted: bool) -> None:
    for name, shape in (("weight", (group, channels)), ("bias", (group,))):
        parameter = torch.nn.Parameter(torch.zeros(shape)) if wanted else None
        module.register_parameter(f"center_feature_scale_proj_{name}", parameter)


def _blended(module: Any, out: torch.Tensor, projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
    return out if weight is None else blend(out, projected, features, weight, bias)


def blend(
    out: torch.Tensor, projected: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """center_feature_scale: a share of what went in, predicted from the features for each group, a row of weight."""
    share = torch.nn.functional.linear(features, weight, bias).sigmoid()
    share = share.repeat_interleave(out.shape[-1] // len(weight), -1)
    return out * (1 - share) + projected * share
