"""torch.nn modules over the operators."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import check
from ..check import Padding, Pair
from ..ops.dcnv3 import dcnv3
from ..ops.dcnv4 import dcnv4
from ..ops.deform_conv2d import deform_conv2d
from ..ops.ms_deform_attn import ms_deform_attn


class DeformConv2d(torch.nn.Module):
    """Deformable convolution with a weight and a bias of its own; parameters and their start as in torchvision.

    `forward(input, offset, mask=None)` takes, with K = kh * kw,

    - input: (N, in_channels, H, W)
    - offset: (N, 2 * offset_groups * K, H_out, W_out), in pixels, dy before dx
    - mask: (N, offset_groups * K, H_out, W_out), or None for version 1

    and returns (N, out_channels, H_out, W_out). See `cudcn.deform_conv2d` for the formula and the attributes.

    Papers: Deformable Convolutional Networks (Dai et al., 2017); Deformable ConvNets v2 (Zhu et al., 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: groups must divide in_channels and out_channels, "
                f"got groups={groups}, in_channels={in_channels}, out_channels={out_channels}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = check.pair(name, "kernel_size", kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self._convolve(input, offset, mask)

    def _convolve(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return deform_conv2d(
            input, offset, self.weight, self.bias, mask,
            stride=self.stride, padding=self.padding, dilation=self.dilation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class ModulatedDeformConv2d(DeformConv2d):
    """Deformable convolution v2 that predicts its offsets and mask from its input, to put in a Conv2d's place.

    `forward(input)`: (N, in_channels, H, W) to (N, out_channels, H_out, W_out). `conv_offset`, an ordinary
    convolution of the same window, makes 3 * offset_groups * kh * kw channels: first all offsets, then the mask
    before its sigmoid, named and ordered as in mmcv's ModulatedDeformConv2dPack. It starts at zero, so that the
    module starts as a regular convolution with every tap at half weight, as in the paper.

    Paper: Deformable ConvNets v2: More Deformable, Better Results (Zhu et al., 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(
                f"{type(self).__name__}: offset_groups must divide in_channels, "
                f"got offset_groups={offset_groups}, in_channels={in_channels}"
            )
        self.offset_groups = offset_groups
        self.conv_offset = torch.nn.Conv2d(
            in_channels, 3 * offset_groups * math.prod(self.kernel_size), self.kernel_size,
            stride=stride, padding=padding, dilation=dilation,
        )  # fmt: skip
        torch.nn.init.zeros_(self.conv_offset.weight)
        torch.nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        taps = self.offset_groups * math.prod(self.kernel_size)
        offset, mask = self.conv_offset(input).split((2 * taps, taps), dim=1)
        return self._convolve(input, offset, mask.sigmoid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"


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
        dw_kernel_size = dw_kernel_size or kernel_size
        _check_groups(type(self).__name__, channels, group, stride, center_feature_scale, kernel_size, dw_kernel_size)
        taps = group * (kernel_size**2 - remove_center)
        self.group = group
        self.attributes = _attributes(kernel_size, stride, dilation, group, offset_scale, remove_center)
        depthwise = torch.nn.Conv2d(
            channels, channels, dw_kernel_size, stride=stride, padding=dw_kernel_size // 2, groups=channels
        )
        norm = torch.nn.Sequential(_ChannelsLast(), torch.nn.LayerNorm(channels, eps=1e-6))
        self.dw_conv = torch.nn.Sequential(depthwise, norm, torch.nn.GELU())
        self.offset = _zeroed(channels, 2 * taps)
        self.mask = _zeroed(channels, taps)
        self.input_proj = _projection(channels)
        self.output_proj = _projection(channels)
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
        _check_groups(name, channels, group, stride, center_feature_scale, kernel_size, dw_kernel_size or 1)
        if stride > 1 and dw_kernel_size is None:
            raise ValueError(f"{name}: stride above 1 needs dw_kernel_size, got stride={stride}")
        self.group = group
        self.attributes = _attributes(kernel_size, stride, dilation, group, offset_scale, remove_center)
        self.offset_mask_dw = dw_kernel_size and torch.nn.Conv2d(
            channels, channels, dw_kernel_size, stride=stride, padding=dw_kernel_size // 2, groups=channels
        )
        self.offset_mask = _zeroed(channels, -(-3 * group * (kernel_size**2 - remove_center) // 8) * 8)
        self.value_proj = torch.nn.Identity() if without_pointwise else _projection(channels)
        self.output_proj = torch.nn.Identity() if without_pointwise else _projection(channels, output_bias)
        _add_center_feature_scale(self, channels, group, center_feature_scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        projected, features = self.value_proj(input), input
        if self.offset_mask_dw is not None:
            features = self.offset_mask_dw(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = dcnv4(projected, self.offset_mask(features), **self.attributes)
        return self.output_proj(_blended(self, out, projected, out))


class MSDeformAttn(torch.nn.Module):
    """Multi-scale deformable attention: each query looks at `n_points` places of every level, near its own place.

    `forward(query, reference_points, input_flatten, spatial_shapes, level_start_index, padding_mask=None)` takes

    - query: (N, Q, d_model)
    - reference_points: (N, Q, n_levels, 2), (x, y) in [0, 1], or (N, Q, n_levels, 4) with (width, height) after them
    - input_flatten: (N, sum of H * W, d_model), the levels one after the other
    - spatial_shapes: (n_levels, 2), (H, W) of each; level_start_index: (n_levels,)
    - padding_mask: (N, sum of H * W), True where the input is padding

    and returns (N, Q, d_model). Parameters are named, and start, as in Deformable DETR's module: head m looks in
    the direction m / n_heads of a turn, point p at p + 1 pixels, all with equal weight.

    Paper: Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021).
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"{type(self).__name__}: n_heads must divide d_model, got n_heads={n_heads}, d_model={d_model}"
            )
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = _zeroed(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = _zeroed(d_model, n_heads * n_levels * n_points)
        self.value_proj = _projection(d_model)
        self.output_proj = _projection(d_model)
        angle = torch.arange(n_heads) * (2 * math.pi / n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, n_points + 1)
        start = (direction[:, None, None] * steps[:, None]).expand(-1, n_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.reshape(-1))

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        spatial_shapes: torch.Tensor,
        level_start_index: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        value = self.value_proj(input_flatten)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        places = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).reshape(*places, 2)
        logits = self.attention_weights(query).reshape(places)
        points = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            locations = points + offsets / spatial_shapes.flip(-1)[:, None]
        elif reference_points.shape[-1] == 4:
            locations = points[..., :2] + offsets / self.n_points * points[..., 2:] / 2
        else:
            raise ValueError(
                f"{type(self).__name__}: reference_points must be (N, Q, n_levels, 2) or (N, Q, n_levels, 4), "
                f"got {tuple(reference_points.shape)}"
            )
        heads = value.reshape(*value.shape[:2], self.n_heads, -1)
        out = ms_deform_attn(heads, spatial_shapes, level_start_index, locations, logits, softmax=True)
        return self.output_proj(out)


class _ChannelsLast(torch.nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.permute(0, 2, 3, 1)


def _check_groups(name: str, channels: int, group: int, stride: int, scale: bool, *kernel_sizes: int) -> None:
    if group < 1 or channels % group:
        raise ValueError(f"{name}: group must divide channels, got group={group}, channels={channels}")
    if scale and stride != 1:
        raise ValueError(f"{name}: center_feature_scale needs stride 1, got {stride}")
    for size in kernel_sizes:
        if size % 2 == 0:
            raise ValueError(f"{name}: kernel sizes must be odd, for the output to lie on the input's grid, got {size}")


def _attributes(
    kernel_size: int, stride: int, dilation: int, group: int, offset_scale: float, remove_center: bool
) -> dict[str, Any]:
    """Of dcnv3 and dcnv4; the padding keeps the output on the input's grid."""
    return {
        "kernel_size": kernel_size, "stride": stride, "padding": dilation * (kernel_size // 2), "dilation": dilation,
        "group": group, "offset_scale": offset_scale, "remove_center": remove_center,
    }  # fmt: skip


def _zeroed(features: int, out_features: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(features, out_features)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def _projection(features: int, bias: bool = True) -> torch.nn.Linear:
    layer = torch.nn.Linear(features, features, bias)
    torch.nn.init.xavier_uniform_(layer.weight)
    if bias:
        torch.nn.init.zeros_(layer.bias)
    return layer


def _add_center_feature_scale(module: Any, channels: int, group: int, wanted: bool) -> None:
    for name, shape in (("weight", (group, channels)), ("bias", (group,))):
        parameter = torch.nn.Parameter(torch.zeros(shape)) if wanted else None
        module.register_parameter(f"center_feature_scale_proj_{name}", parameter)


def _blended(module: Any, out: torch.Tensor, projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
    if weight is None:
        return out
    share = torch.nn.functional.linear(features, weight, bias).sigmoid()
    share = share.repeat_interleave(out.shape[-1] // module.group, -1)
    return out * (1 - share) + projected * share
