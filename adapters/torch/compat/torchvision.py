"""torchvision.ops."""

from __future__ import annotations

import torch

from cudcn.check import Pair
from cudcn.ops.deform_conv2d import deform_conv2d as _deform_conv2d

from .replacement import Replacement


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cudcn.deform_conv2d` with torchvision's order of arguments."""
    return _deform_conv2d(input, offset, weight, bias, mask, stride=stride, padding=padding, dilation=dilation)


class DeformConv2dForward(Replacement):
    kind = "torchvision.DeformConv2d"
    names = ("DeformConv2d",)
    needs = frozenset({"weight", "bias", "stride", "padding", "dilation"})
    allows = frozenset({"in_channels", "out_channels", "kernel_size", "groups"})

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


REPLACEMENTS = (DeformConv2dForward,)
