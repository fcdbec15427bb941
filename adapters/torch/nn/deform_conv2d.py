"""Modules over deform_conv2d: what all share, and torchvision's.

In all of them `padding` is also "same" or "valid", as in torch.nn.Conv2d. "same" needs stride 1, and pads one
pixel more below and on the right where both sides cannot be alike; the attribute `padding` holds what that comes to.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cudcn import check
from cudcn.check import Padding, Pair
from cudcn.ops.deform_conv2d import deform_conv2d

from .layers import check_channels

torch.fx.wrap("check_channels")
torch.fx.wrap("deform_conv2d")


class Convolution(torch.nn.Module):
    """The sizes, checked, the weight and perhaps a bias, which subclasses start."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Padding | str,
        dilation: Pair,
        groups: int,
        bias: bool,
        device: Any,
        dtype: Any,
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
        self.dilation = check.pair(name, "dilation", dilation)
        top, bottom, left, right = self._sides(padding)
        self.padding = (top, left) if (top, left) == (bottom, right) else ((top, bottom), (left, right))
        bias = check.flag(name, "bias", bias)  # the eighth argument of others is a count of groups
        shape = self.out_channels, self.in_channels // self.groups, *self.kernel_size
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: torch.nn.Parameter | None
        empty = torch.nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty)

    def _sides(self, padding: Padding | str) -> tuple[int, int, int, int]:
        """Top, bottom, left, right."""
        name = type(self).__name__
        if not isinstance(padding, str):
            return check.padding(name, padding)
        if check.choice(name, "padding", padding, ("same", "valid")) == "valid":
            return 0, 0, 0, 0
        if self.stride != (1, 1):
            raise ValueError(f'{name}: padding="same" needs stride 1, got {self.stride}')
        h, w = (dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True))
        return h // 2, h - h // 2, w // 2, w - w // 2

    def convolve(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None) -> Any:
        name, axes = type(self).__name__, "(N, in_channels, H, W) with in_channels"
        check_channels(name, "input", axes, self.in_channels, input)
        return deform_conv2d(
            input, offset, self.weight, self.bias, mask,
            stride=self.stride, padding=self.padding, dilation=self.dilation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class DeformConv2d(Convolution):
    """torchvision's: deformable convolution with a weight and a bias of its own, v1 or v2.

    `forward(input, offset, mask=None)` takes, with K = kh * kw,

    - input: (N, in_channels, H, W)
    - offset: (N, 2 * offset_groups * K, H_out, W_out), in pixels, dy before dx
    - mask: (N, offset_groups * K, H_out, W_out), or None for version 1

    and returns (N, out_channels, H_out, W_out). See `cudcn.deform_conv2d` for the formula and the attributes. The
    weight and the bias start as torch.nn.Conv2d's do.

    Papers: Deformable Convolutional Networks (Dai et al., 2017); Deformable ConvNets v2 (Zhu et al., 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.convolve(input, offset, mask)
