"""The package DCNv4: its convolution, and FlashDeformAttn."""

from __future__ import annotations

import torch

from cudcn.ops.dcnv4 import dcnv4, dcnv4_backward as _dcnv4_backward
from cudcn.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_backward

from ..nn import DCNv4 as DCNv4, FlashDeformAttn as FlashDeformAttn
from .deformable_detr import MSDeformAttnForward
from .internimage import window
from .replacement import Replacement


class DCNv4Function:
    """To be called as the autograd function of this name: `DCNv4Function.apply(...)`."""

    @staticmethod
    def apply(
        input: torch.Tensor,
        offset_mask: torch.Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        group: int,
        group_channels: int,
        offset_scale: float,
        im2col_step: int,
        remove_center: bool | int,
    ) -> torch.Tensor:
        """`cudcn.dcnv4`; `im2col_step` is not needed, and any batch will do."""
        return dcnv4(
            input, offset_mask,
            **window(
                kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, offset_scale,
                remove_center,
            ),
        )  # fmt: skip


def dcnv4_forward(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int,
    remove_center: bool | int,
    d_stride: int,
    block_thread: int,
    softmax: bool,
) -> torch.Tensor:
    """The extension's; how it cuts up its work (`d_stride`, `block_thread`) is not needed."""
    return dcnv4(
        input, offset_mask,
        **window(
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, offset_scale,
            remove_center,
        ),
        softmax=softmax,
    )  # fmt: skip


def dcnv4_backward(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int,
    grad_output: torch.Tensor,
    remove_center: bool | int,
    d_stride: int,
    block_thread: int,
    softmax: bool,
) -> list[torch.Tensor]:
    """The gradients of input and offset_mask."""
    grads = _dcnv4_backward(
        grad_output, input, offset_mask,
        **window(
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, offset_scale,
            remove_center,
        ),
        softmax=softmax,
    )  # fmt: skip
    return [*grads]


class FlashDeformAttnFunction:
    """To be called as the autograd function of this name: `FlashDeformAttnFunction.apply(...)`."""

    @staticmethod
    def apply(
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_level_start_index: torch.Tensor,
        sampling_loc_attn: torch.Tensor,
        im2col_step: int,
        K: int = 8,
    ) -> torch.Tensor:
        """`cudcn.ms_deform_attn(..., softmax=True)`; sampling_loc_attn: (N, Q, M, L * K * 3)."""
        places = _unpacked(sampling_loc_attn, len(value_spatial_shapes), K)
        return ms_deform_attn(value, value_spatial_shapes, value_level_start_index, *places, softmax=True)


def _unpacked(sampling_loc_attn: torch.Tensor, levels: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First x and y of each of the points of each level, then the logits."""
    locations, logits = sampling_loc_attn.split((2 * levels * points, levels * points), -1)
    return locations.unflatten(-1, (levels, points, 2)), logits.unflatten(-1, (levels, points))


def flash_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc_attn: torch.Tensor,
    im2col_step: int,
    K: int,
    d_stride: int,
    block_thread: int,
) -> torch.Tensor:
    """The extension's."""
    return FlashDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_loc_attn, im2col_step, K)


def flash_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc_attn: torch.Tensor,
    grad_output: torch.Tensor,
    im2col_step: int,
    K: int,
    d_stride: int,
    block_thread: int,
) -> list[torch.Tensor]:
    """The gradients of value and sampling_loc_attn."""
    places = _unpacked(sampling_loc_attn, len(spatial_shapes), K)
    grads = ms_deform_attn_backward(grad_output, value, spatial_shapes, level_start_index, *places, softmax=True)
    return [grads.value, torch.cat([grads.sampling_locations.flatten(-3), grads.attention_weights.flatten(-2)], -1)]


class DCNv4Forward(Replacement):
    kind = "dcnv4.DCNv4"
    names = ("DCNv4",)
    needs = frozenset(
        {"offset_mask", "channels", "kernel_size", "stride", "pad", "dilation", "group", "offset_scale",
         "dw_kernel_size", "center_feature_scale", "remove_center", "without_pointwise"}
    )  # fmt: skip
    allows = frozenset(
        {"offset_mask_dw", "value_proj", "output_proj", "K", "group_channels", "center_feature_scale_proj_weight",
         "center_feature_scale_proj_bias", "center_feature_scale_module"}
    )  # fmt: skip

    forward = DCNv4.forward


class FlashDeformAttnForward(MSDeformAttnForward):
    """The sampling places keep their precision, where the original rounds them to half."""

    kind = "dcnv4.FlashDeformAttn"
    names = ("FlashDeformAttn",)


REPLACEMENTS = (DCNv4Forward, FlashDeformAttnForward)
