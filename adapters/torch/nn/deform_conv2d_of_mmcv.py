"""mmcv's modules over deform_conv2d; its own `DeformConv2d` is torchvision's without a mask."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from cudcn import check
from cudcn.check import Padding, Pair

from .deform_conv2d import Convolution
from .layers import check_channels, zero_

torch.fx.wrap("check_channels")


class _OfMMCV(Convolution):
    """With `deform_groups`, and where it predicts something, with `conv_offset` for that."""

    _predicted: ClassVar[int] = 0  # channels for each tap

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Padding | str,
        dilation: Pair,
        groups: int,
        deform_groups: int,
        bias: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype)
        name = type(self).__name__
        self.deform_groups = check.integer(name, "deform_groups", deform_groups, least=1)
        if self.in_channels % self.deform_groups:
            raise ValueError(
                f"{name}: deform_groups must divide in_channels, "
                f"got deform_groups={deform_groups}, in_channels={in_channels}"
            )
        self.transposed, self.output_padding = False, (0,)  # which mmcv's layers ask of any convolution
        if not self._predicted:
            return
        top, bottom, left, right = check.padding(name, self.padding)
        # which an ordinary convolution cannot do
        self._uneven = (left, right, top, bottom) if (top, left) != (bottom, right) else None
        self.conv_offset = torch.nn.Conv2d(
            self.in_channels, self._predicted * self.deform_groups * math.prod(self.kernel_size), self.kernel_size,
            stride=self.stride, padding=0 if self._uneven else (top, left), dilation=self.dilation,
            device=device, dtype=dtype,
        )  # fmt: skip

    def _predict(self, x: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.conv_offset(torch.nn.functional.pad(x, self._uneven) if self._uneven else x)
        return predicted

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}"


class DeformConv2dPack(_OfMMCV):
    """mmcv's: deformable convolution v1 that predicts its offsets from its input, to put in a Conv2d's place.

    `forward(x)`: (N, in_channels, H, W) to (N, out_channels, H_out, W_out). `conv_offset`, an ordinary convolution of
    the same window, makes 2 * deform_groups * kh * kw channels of offsets. It starts at zero, so that the module starts
    as a regular convolution. There is no bias, as in mmcv; `im2col_step` is not needed, and any batch will do.

    Paper: Deformable Convolutional Networks (Dai et al., 2017).
    """

    _predicted = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias, device,
            dtype,
        )  # fmt: skip
        name = type(self).__name__
        if self.bias is not None:
            raise ValueError(f"{name}: bias must be False, as in mmcv, got {bias!r}")
        self.im2col_step = check.integer(name, "im2col_step", im2col_step, least=1)
        self.reset_parameters()
        self.init_offset()

    def reset_parameters(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def init_offset(self) -> None:
        zero_(self.conv_offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self._predict(x), None)


class ModulatedDeformConv2d(_OfMMCV):
    """mmcv's: deformable convolution v2 with a weight and a bias of its own.

    `forward(x, offset, mask)` takes, with K = kh * kw,

    - x: (N, in_channels, H, W)
    - offset: (N, 2 * deform_groups * K, H_out, W_out), in pixels, dy before dx
    - mask: (N, deform_groups * K, H_out, W_out)

    and returns (N, out_channels, H_out, W_out). See `cudcn.deform_conv2d` for the formula and the attributes. The
    weight starts uniform within 1 / sqrt(in_channels * K), the bias at zero.

    Paper: Deformable ConvNets v2: More Deformable, Better Results (Zhu et al., 2019).
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
        deform_groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias, device,
            dtype,
        )  # fmt: skip
        self.init_weights()

    def init_weights(self) -> None:
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))  # as in mmcv, whatever groups is
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        channels = 2 * self.deform_groups * math.prod(self.kernel_size)
        name, axes = type(self).__name__, "(N, C, H_out, W_out) with C = 2 * deform_groups * kh * kw"
        check_channels(name, "offset", axes, channels, offset)
        return self.convolve(x, offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """mmcv's: deformable convolution v2 that predicts its offsets and mask from its input, for a Conv2d's place.

    `forward(x)`: (N, in_channels, H, W) to (N, out_channels, H_out, W_out). `conv_offset`, an ordinary convolution of
    the same window, makes 3 * deform_groups * kh * kw channels: first all offsets, then the mask before its sigmoid.
    It starts at zero, so that the module starts as a regular convolution with every tap at half weight, as in the
    paper.

    Paper: Deformable ConvNets v2: More Deformable, Better Results (Zhu et al., 2019).
    """

    _predicted = 3

    def init_weights(self) -> None:
        super().init_weights()
        zero_(self.conv_offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        taps = self.deform_groups * math.prod(self.kernel_size)
        offset, mask = self._predict(x).split((2 * taps, taps), dim=-3)
        return self.convolve(x, offset, mask.sigmoid())
