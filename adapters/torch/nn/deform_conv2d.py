"""Modules over deform_conv2d."""

from __future__ import annotations

import math
from typing import Any

import torch

from cudcn import check
from cudcn.check import Padding, Pair
from cudcn.ops.deform_conv2d import deform_conv2d


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
        self.in_channels = check.integer(name, "in_channels", in_channels, least=1)
        self.out_channels = check.integer(name, "out_channels", out_channels, least=1)
        self.groups = check.integer(name, "groups", groups, least=1)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{name}: groups must divide in_channels and out_channels, "
                f"got groups={groups}, in_channels={in_channels}, out_channels={out_channels}"
            )
        self.kernel_size = check.pair(name, "kernel_size", kernel_size)
        self.stride = check.pair(name, "stride", stride)
        top, bottom, left, right = check.padding(name, padding)
        self.padding = (top, left) if (top, left) == (bottom, right) else ((top, bottom), (left, right))
        self.dilation = check.pair(name, "dilation", dilation)
        bias = check.flag(name, "bias", bias)  # the eighth argument of others is a count of groups
        self.weight = torch.nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        )
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(self.out_channels)) if bias else None)
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
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        name = type(self).__name__
        self.offset_groups = check.integer(name, "offset_groups", offset_groups, least=1)
        if self.in_channels % self.offset_groups:
            raise ValueError(
                f"{name}: offset_groups must divide in_channels, "
                f"got offset_groups={offset_groups}, in_channels={in_channels}"
            )
        top, bottom, left, right = check.padding(name, padding)
        # which an ordinary convolution cannot do
        self._uneven = (left, right, top, bottom) if (top, left) != (bottom, right) else None
        self.conv_offset = torch.nn.Conv2d(
            self.in_channels, 3 * self.offset_groups * math.prod(self.kernel_size), self.kernel_size,
            stride=self.stride, padding=0 if self._uneven else (top, left), dilation=self.dilation,
        )  # fmt: skip
        for parameter in self.conv_offset.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        taps = self.offset_groups * math.prod(self.kernel_size)
        padded = torch.nn.functional.pad(input, self._uneven) if self._uneven else input
        offset, mask = self.conv_offset(padded).split((2 * taps, taps), dim=1)
        return self._convolve(input, offset, mask.sigmoid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"
