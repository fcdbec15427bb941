"""InternImage's DCNv3."""

from __future__ import annotations

from typing import Any

import torch

from cudcn.ops.dcnv3 import dcnv3, dcnv3_backward as _backward

from .. import nn
from .replacement import Replacement


def window(
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    offset_scale: float,
    remove_center: bool | int,
) -> dict[str, Any]:
    """The attributes of dcnv3 and dcnv4 from the numbers that both libraries pass one by one."""
    return {
        "kernel_size": (kernel_h, kernel_w), "stride": (stride_h, stride_w), "padding": (pad_h, pad_w),
        "dilation": (dilation_h, dilation_w), "group": group, "offset_scale": offset_scale,
        "remove_center": bool(remove_center),
    }  # fmt: skip


def dcnv3_core_pytorch(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
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
    remove_center: bool | int = False,
) -> torch.Tensor:
    """`cudcn.dcnv3` with InternImage's arguments."""
    return dcnv3(
        input, offset, mask,
        **window(
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, offset_scale,
            remove_center,
        ),
    )  # fmt: skip


class DCNv3Function:
    """To be called as the autograd function of this name: `DCNv3Function.apply(...)`."""

    @staticmethod
    def apply(*arguments: Any) -> torch.Tensor:
        """`dcnv3_core_pytorch` with an `im2col_step`, which is not needed, after offset_scale."""
        return dcnv3_forward(*arguments)


def dcnv3_forward(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
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
    remove_center: bool | int = False,
) -> torch.Tensor:
    """The first function of the extension module `DCNv3`."""
    return dcnv3_core_pytorch(
        input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
        group_channels, offset_scale, remove_center,
    )  # fmt: skip


def dcnv3_backward(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
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
    grad_output: torch.Tensor,
    im2col_step: int,
    remove_center: bool | int = False,
) -> list[torch.Tensor]:
    """The other one: the gradients of input, offset and mask."""
    grads = _backward(
        grad_output, input, offset, mask,
        **window(
            kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, offset_scale,
            remove_center,
        ),
    )  # fmt: skip
    return [*grads]


class DCNv3Forward(Replacement):
    kind = "internimage.DCNv3"
    names = ("DCNv3", "DCNv3_pytorch")
    needs = frozenset(
        {"dw_conv", "offset", "mask", "input_proj", "output_proj", "channels", "kernel_size", "stride", "pad",
         "dilation", "group", "offset_scale", "center_feature_scale", "remove_center"}
    )  # fmt: skip
    allows = frozenset(
        {"dw_kernel_size", "group_channels", "center_feature_scale_proj_weight", "center_feature_scale_proj_bias",
         "center_feature_scale_module"}
    )  # fmt: skip

    forward = nn.DCNv3.forward


REPLACEMENTS = (DCNv3Forward,)
