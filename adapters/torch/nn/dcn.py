"""Modules over dcnv3 and dcnv4."""

from __future__ import annotations

from typing import Any

import torch

from cudcn import check
from cudcn.geometry import ceil_div
from cudcn.ops.aggregate import canonical
from cudcn.ops.dcnv3 import dcnv3
from cudcn.ops.dcnv4 import dcnv4

from .layers import xavier_, zero_

torch.fx.wrap("dcnv3")
torch.fx.wrap("dcnv4")

_ACTIVATIONS = {"GELU": torch.nn.GELU, "SiLU": torch.nn.SiLU, "ReLU": torch.nn.ReLU}


class _DCN(torch.nn.Module):
    """The attributes, checked, and named as in both originals."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dw_kernel_size: int | None,
        stride: int,
        pad: int,
        dilation: int,
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.channels = check.integer(name, "channels", channels, least=1)
        self.kernel_size = check.integer(name, "kernel_size", kernel_size, least=1)
        self.dw_kernel_size = dw_kernel_size
        if dw_kernel_size is not None and check.integer(name, "dw_kernel_size", dw_kernel_size, least=1) % 2 == 0:
            raise ValueError(f"{name}: dw_kernel_size must be odd, got {dw_kernel_size}")
        self.stride = check.integer(name, "stride", stride, least=1)
        self.pad = check.integer(name, "pad", pad, least=0)
        self.dilation = check.integer(name, "dilation", dilation, least=1)
        self.group = check.integer(name, "group", group, least=1)
        if self.channels % self.group:
            raise ValueError(f"{name}: group must divide channels, got group={group}, channels={channels}")
        if 2 * self.pad != self.dilation * (self.kernel_size - 1):
            raise ValueError(
                f"{name}: pad must be dilation * (kernel_size - 1) / 2, for the output to lie on the input's grid, "
                f"got pad={pad}, dilation={dilation}, kernel_size={kernel_size}"
            )
        self.center_feature_scale = check.flag(name, "center_feature_scale", center_feature_scale)
        if self.center_feature_scale and self.stride != 1:
            raise ValueError(f"{name}: center_feature_scale needs stride 1, got {stride}")
        self.group_channels = self.channels // self.group
        self.offset_scale = check.finite(name, "offset_scale", offset_scale)
        self.remove_center = int(check.flag(name, "remove_center", remove_center))
        canonical(name, **attributes(self), softmax=False)  # raises

    def _depthwise(self, kernel_size: int, factory: dict[str, Any]) -> torch.nn.Conv2d:
        return torch.nn.Conv2d(
            self.channels, self.channels, kernel_size, self.stride, kernel_size // 2, groups=self.channels, **factory
        )

    def _add_center_feature_scale(self, factory: dict[str, Any]) -> None:
        if self.center_feature_scale:
            weight, bias = torch.zeros(self.group, self.channels, **factory), torch.zeros(self.group, **factory)
            self.center_feature_scale_proj_weight = torch.nn.Parameter(weight)
            self.center_feature_scale_proj_bias = torch.nn.Parameter(bias)

    def extra_repr(self) -> str:
        names = "channels", "kernel_size", "dw_kernel_size", "stride", "pad", "dilation", "group", "offset_scale"
        flags = [name for name in ("center_feature_scale", "remove_center") if getattr(self, name)]
        return ", ".join([f"{name}={getattr(self, name)}" for name in names] + [f"{name}=True" for name in flags])


class DCNv3(_DCN):
    """InternImage's deformable convolution: (N, H, W, channels) to the same, or to every `stride`-th pixel.

    A depthwise convolution of the input, then a norm ("LN" or "BN") and an activation ("GELU", "SiLU" or "ReLU"),
    predict offsets and softmaxed weights for each of `group` groups; the projected input is sampled there. It starts
    with zero offsets and equal weights. With `center_feature_scale` the output is blended with the projected input, by
    a share per group that is predicted from the depthwise features; that needs stride 1.

    Arguments, attributes and parameters are the original's; there, stride is 1. `pad` must be
    dilation * (kernel_size - 1) / 2, and `dw_kernel_size` odd.

    Paper: InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions (Wang et al., 2023).
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        super().__init__(
            channels, kernel_size, dw_kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale,
            remove_center,
        )  # fmt: skip
        name, factory = type(self).__name__, {"device": device, "dtype": dtype}
        activation = _ACTIVATIONS[check.choice(name, "act_layer", act_layer, tuple(_ACTIVATIONS))]
        if check.choice(name, "norm_layer", norm_layer, ("LN", "BN")) == "LN":
            norm = torch.nn.Sequential(_ChannelsLast(), torch.nn.LayerNorm(self.channels, eps=1e-6, **factory))
        else:
            norm = torch.nn.Sequential(torch.nn.BatchNorm2d(self.channels, **factory), _ChannelsLast())
        self.dw_conv = torch.nn.Sequential(self._depthwise(dw_kernel_size, factory), norm, activation())
        taps = self.group * (self.kernel_size**2 - self.remove_center)
        self.offset = torch.nn.Linear(self.channels, 2 * taps, **factory)
        self.mask = torch.nn.Linear(self.channels, taps, **factory)
        self.input_proj = torch.nn.Linear(self.channels, self.channels, **factory)
        self.output_proj = torch.nn.Linear(self.channels, self.channels, **factory)
        self._add_center_feature_scale(factory)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        zero_(self.offset, self.mask)
        xavier_(self.input_proj, self.output_proj)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projected = self.input_proj(input)
        features = self.dw_conv(input.permute(0, 3, 1, 2))
        out = dcnv3(projected, self.offset(features), self.mask(features), softmax=True, **attributes(self))
        return self.output_proj(_blended(self, out, projected, features))  # type: ignore[no-any-return]


class DCNv4(_DCN):
    """DCNv4's deformable convolution of an image (N, H, W, channels), or of its pixels (N, L, channels).

    `forward(input, shape=None)`: of pixels, `shape` is (H, W) with H * W = L, and may be left out where the image is
    square. The output is alike, or every `stride`-th pixel of it.

    A linear layer predicts offsets and unbounded weights from the input, after a depthwise convolution if
    `dw_kernel_size` is given (stride 2 and more needs it). It starts at zero. `without_pointwise` leaves out the
    projections of input and output. With `center_feature_scale` the output is blended with the projected input, by a
    share per group that is predicted from the output; that needs stride 1.

    Arguments, attributes and parameters are the original's; there, stride is 1, and a group has a multiple of 16
    channels. `pad` must be dilation * (kernel_size - 1) / 2, and `dw_kernel_size` odd.

    Paper: Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications (Xiong et
    al., 2024).
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,  # act_layer and norm_layer in the authors' models: the original does not look at them either
    ) -> None:
        super().__init__(
            channels, kernel_size, dw_kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale,
            remove_center,
        )  # fmt: skip
        name, factory = type(self).__name__, {"device": device, "dtype": dtype}
        if self.stride > 1 and self.dw_kernel_size is None:
            raise ValueError(f"{name}: stride above 1 needs dw_kernel_size, got stride={stride}")
        output_bias = check.flag(name, "output_bias", output_bias)
        self.without_pointwise = check.flag(name, "without_pointwise", without_pointwise)
        self.K = self.group * (self.kernel_size**2 - self.remove_center)  # taps of all groups
        if dw_kernel_size is not None:
            self.offset_mask_dw = self._depthwise(dw_kernel_size, factory)
        self.offset_mask = torch.nn.Linear(self.channels, ceil_div(3 * self.K, 8) * 8, **factory)
        if not self.without_pointwise:
            self.value_proj = torch.nn.Linear(self.channels, self.channels, **factory)
            self.output_proj = torch.nn.Linear(self.channels, self.channels, bias=output_bias, **factory)
        self._add_center_feature_scale(factory)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        zero_(self.offset_mask)
        if not self.without_pointwise:
            xavier_(self.value_proj, self.output_proj)

    def forward(self, input: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
        image = _as_image(type(self).__name__, input, shape)
        projected = image if self.without_pointwise else self.value_proj(image)
        features = image
        if self.dw_kernel_size is not None:
            features = self.offset_mask_dw(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = dcnv4(projected, self.offset_mask(features), **attributes(self))
        out = _blended(self, out, projected, out)
        out = out if self.without_pointwise else self.output_proj(out)
        return _as_given(out, input)


# These take any module with the attributes, as another library's is after `patch`.


def attributes(module: Any) -> dict[str, Any]:
    """Those of the operator."""
    return {
        "kernel_size": module.kernel_size, "stride": module.stride, "padding": module.pad, "dilation": module.dilation,
        "group": module.group, "offset_scale": module.offset_scale, "remove_center": bool(module.remove_center),
    }  # fmt: skip


def _blended(module: Any, out: torch.Tensor, projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """center_feature_scale: a share of what went in, predicted from the features for each group, a row of weight."""
    if not module.center_feature_scale:
        return out
    weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
    share = torch.nn.functional.linear(features, weight, bias).sigmoid()
    share = share.repeat_interleave(module.channels // module.group, -1)
    return out * (1 - share) + projected * share


@torch.fx.wrap
def _as_image(name: str, input: torch.Tensor, shape: tuple[int, int] | None) -> torch.Tensor:
    if input.ndim == 4 and shape is None:
        return input
    if input.ndim != 3:
        raise ValueError(
            f"{name}: input must be (N, L, channels), or (N, H, W, channels) without a shape, "
            f"got {tuple(input.shape)} and {shape}"
        )
    length = input.shape[1]
    height, width = shape or [int(length**0.5)] * 2
    if height * width != length:
        raise ValueError(
            f"{name}: shape must be (H, W) with H * W = {length}, as input is {tuple(input.shape)}, got {shape}"
        )
    return input.unflatten(1, (height, width))


@torch.fx.wrap
def _as_given(image: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return image if input.ndim == 4 else image.flatten(1, 2)


class _ChannelsLast(torch.nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.permute(0, 2, 3, 1)
