"""mmcv.ops. As there, data and weights take the offset's dtype, and so does the result."""

from __future__ import annotations

import math
from typing import Any

import torch

from cudcn.check import Pair
from cudcn.ops.deform_conv2d import deform_conv2d as _deform_conv2d
from cudcn.ops.deform_roi_pool import deform_roi_pool as _deform_roi_pool

from .. import nn
from .deformable_detr import MultiScaleDeformableAttentionForward as _Attention, attend_as_mmcv
from .replacement import Replacement


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> torch.Tensor:
    """`cudcn.deform_conv2d` without a mask; `im2col_step` is not needed, and any batch will do."""
    if bias is not False:
        raise ValueError(f"deform_conv2d: bias must be False, as in mmcv, got {bias!r}")
    return _convolve(
        "deform_conv2d", input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups
    )


def modulated_deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> torch.Tensor:
    """`cudcn.deform_conv2d` with a mask, in mmcv's order."""
    name = "modulated_deform_conv2d"
    return _convolve(name, input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups)


def _convolve(
    name: str,
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    deform_groups: int,
) -> torch.Tensor:
    # cudcn reads both counts off the shapes
    if input.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"{name}: input must have groups * weight.shape[1] = {groups * weight.shape[1]} channels, "
            f"got {input.shape[1]}"
        )
    if offset.shape[1] != 2 * deform_groups * math.prod(weight.shape[2:]):
        raise ValueError(
            f"{name}: offset must have 2 * deform_groups * kh * kw = {2 * deform_groups * math.prod(weight.shape[2:])} "
            f"channels, got {offset.shape[1]}"
        )
    input, weight = input.type_as(offset), weight.type_as(offset)
    bias, mask = (t if t is None else t.type_as(offset) for t in (bias, mask))
    return _deform_conv2d(input, offset, weight, bias, mask, stride=stride, padding=padding, dilation=dilation)


def deform_roi_pool(
    input: torch.Tensor,
    rois: torch.Tensor,
    offset: torch.Tensor | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> torch.Tensor:
    """`cudcn.deform_roi_pool` without a mask."""
    return _deform_roi_pool(
        input, rois, offset,
        output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
    )  # fmt: skip


class _Convolution(Replacement):
    needs = frozenset({"weight", "stride", "padding", "dilation", "groups", "deform_groups"})
    allows = frozenset({"in_channels", "out_channels", "kernel_size", "im2col_step", "transposed", "output_padding"})

    def convolve(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return _convolve(
            self.kind, input, offset, mask, self.weight, getattr(self, "bias", None),
            self.stride, self.padding, self.dilation, self.groups, self.deform_groups,
        )  # fmt: skip


class DeformConv2dForward(_Convolution):
    kind = "mmcv.DeformConv2d"
    names = ("DeformConv2d",)

    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, offset)


class DeformConv2dPackForward(_Convolution):
    kind = "mmcv.DeformConv2dPack"
    names = ("DeformConv2dPack",)
    needs = _Convolution.needs | {"conv_offset"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.conv_offset(x))


class ModulatedDeformConv2dForward(_Convolution):
    kind = "mmcv.ModulatedDeformConv2d"
    names = ("ModulatedDeformConv2d",)
    needs = _Convolution.needs | {"bias"}

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, offset, mask)


class ModulatedDeformConv2dPackForward(_Convolution):
    kind = "mmcv.ModulatedDeformConv2dPack"
    names = ("ModulatedDeformConv2dPack",)
    needs = _Convolution.needs | {"bias", "conv_offset"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset_mask = self.conv_offset(x)
        taps = offset_mask.shape[1] // 3
        offset, mask = offset_mask.split((2 * taps, taps), dim=1)
        return self.convolve(x, offset, mask.sigmoid())


class _Pooling(Replacement):
    needs = frozenset({"output_size", "spatial_scale", "sampling_ratio", "gamma"})


class DeformRoIPoolForward(_Pooling):
    kind = "mmcv.DeformRoIPool"
    names = ("DeformRoIPool",)

    forward = nn.DeformRoIPool.forward


class DeformRoIPoolPackForward(_Pooling):
    kind = "mmcv.DeformRoIPoolPack"
    names = ("DeformRoIPoolPack",)
    needs = _Pooling.needs | {"offset_fc", "output_channels"}
    allows = frozenset({"deform_fc_channels"})

    forward = nn.DeformRoIPoolPack.forward


class ModulatedDeformRoIPoolPackForward(_Pooling):
    kind = "mmcv.ModulatedDeformRoIPoolPack"
    names = ("ModulatedDeformRoIPoolPack",)
    needs = DeformRoIPoolPackForward.needs | {"mask_fc"}
    allows = DeformRoIPoolPackForward.allows

    forward = nn.ModulatedDeformRoIPoolPack.forward


class MultiScaleDeformableAttentionForward(Replacement):
    kind = "mmcv.MultiScaleDeformableAttention"
    names = ("MultiScaleDeformableAttention",)
    needs = _Attention.needs | {"dropout"}
    allows = frozenset({"im2col_step", "embed_dims", "norm_cfg", "init_cfg"})

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        identity: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        reference_points: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        level_start_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        out = attend_as_mmcv(
            self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )
        identity = kwargs.get("residual", identity)  # its older name
        return self.dropout(out) + (query if identity is None else identity)


REPLACEMENTS = (
    DeformConv2dForward, DeformConv2dPackForward, ModulatedDeformConv2dForward, ModulatedDeformConv2dPackForward,
    DeformRoIPoolForward, DeformRoIPoolPackForward, ModulatedDeformRoIPoolPackForward,
    MultiScaleDeformableAttentionForward,
)  # fmt: skip
