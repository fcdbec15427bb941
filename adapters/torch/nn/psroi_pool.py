"""The module over deform_psroi_pool, as the paper draws it."""

from __future__ import annotations

import math
from typing import Any

import torch

from cudcn import check
from cudcn.check import Pair
from cudcn.ops.deform_psroi_pool import deform_psroi_pool
from cudcn.ops.pooling import sample_count

from .layers import zero_

torch.fx.wrap("deform_psroi_pool")


class DeformPSRoIPool(torch.nn.Module):
    """Deformable position-sensitive RoI pooling with both of the paper's branches, as in deformable R-FCN.

    `forward(input, rois)`: features (N, in_channels, H, W) and rois (R, 5) of (n, x1, y1, x2, y2) to
    (R, out_channels, GH, GW), where (GH, GW) = output_size. Two 1x1 convolutions read the features: `conv` makes score
    maps, out_channels for each of the GH * GW bins; `conv_offset` makes 2 * classes for each bin, of which a PS RoI
    pooling that moves no bin makes every roi's offsets. The scores are pooled in bins moved by them. (DCNv1's and v2's
    codes have another branch for plain RoI pooling, of linear layers: that of `DeformRoIPoolPack`.)

    `classes` divides out_channels: so many groups of channels have offsets of their own, which the scores of a
    detector's classes do (classes=out_channels). See `cudcn.deform_psroi_pool` for the formula and the other
    attributes. As in the authors' code, the scores' weights start with a deviation of 0.01, and all else at zero, so
    that the bins start in their places.

    Paper: Deformable Convolutional Networks (Dai et al., 2017), section 2.2 and figure 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        output_size: Pair,
        classes: int = 1,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
        spatial_scale: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, factory = type(self).__name__, {"device": device, "dtype": dtype}
        self.in_channels = check.integer(name, "in_channels", in_channels, least=1)
        self.out_channels = check.integer(name, "out_channels", out_channels, least=1)
        self.output_size = check.pair(name, "output_size", output_size)
        self.classes = check.integer(name, "classes", classes, least=1)
        if self.out_channels % self.classes:
            raise ValueError(
                f"{name}: classes must divide out_channels, got classes={classes}, out_channels={out_channels}"
            )
        self.sample_per_part = sample_count(name, "sample_per_part", sample_per_part, least=1)
        self.trans_std = check.finite(name, "trans_std", trans_std)
        self.spatial_scale = check.finite(name, "spatial_scale", spatial_scale)
        bins = math.prod(self.output_size)
        self.conv = torch.nn.Conv2d(self.in_channels, self.out_channels * bins, 1, **factory)
        self.conv_offset = torch.nn.Conv2d(self.in_channels, 2 * self.classes * bins, 1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        zero_(self.conv, self.conv_offset)
        torch.nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        offset = self._pool(self.conv_offset(input), rois)
        return self._pool(self.conv(input), rois, offset)

    def _pool(self, maps: torch.Tensor, rois: torch.Tensor, offset: torch.Tensor | None = None) -> Any:
        return deform_psroi_pool(
            maps, rois, offset,
            output_size=self.output_size, group_size=self.output_size, sample_per_part=self.sample_per_part,
            trans_std=self.trans_std, spatial_scale=self.spatial_scale,
        )  # fmt: skip

    def extra_repr(self) -> str:
        names = "output_size", "classes", "sample_per_part", "trans_std", "spatial_scale"
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.in_channels}, {self.out_channels}, {settings}"
