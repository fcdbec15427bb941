"""Modules over deform_roi_pool: mmcv's."""

from __future__ import annotations

import math
from typing import Any

import torch

from cudcn import check
from cudcn.check import Pair
from cudcn.ops.deform_roi_pool import deform_roi_pool
from cudcn.ops.pooling import sample_count

from .layers import check_channels, zero_

torch.fx.wrap("check_channels")
torch.fx.wrap("deform_roi_pool")


class DeformRoIPool(torch.nn.Module):
    """mmcv's: deformable RoI pooling; it has no parameters.

    `forward(input, rois, offset=None)` takes, with (PH, PW) = output_size,

    - input: (N, C, H, W)
    - rois: (R, 5) of (n, x1, y1, x2, y2)
    - offset: (R, 2, PH, PW), x before y, in units of gamma times the roi's size, or None for zeros

    and returns (R, C, PH, PW). See `cudcn.deform_roi_pool` for the formula and the attributes.

    Paper: Deformable Convolutional Networks (Dai et al., 2017), section 2.2.
    """

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.output_size = check.pair(name, "output_size", output_size)
        self.spatial_scale = check.finite(name, "spatial_scale", spatial_scale)
        self.sampling_ratio = sample_count(name, "sampling_ratio", sampling_ratio, -check.LARGEST)
        self.gamma = check.finite(name, "gamma", gamma)

    def forward(self, input: torch.Tensor, rois: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        return _pool(self, input, rois, offset)

    def extra_repr(self) -> str:
        names = "output_size", "spatial_scale", "sampling_ratio", "gamma"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class DeformRoIPoolPack(DeformRoIPool):
    """mmcv's: deformable RoI pooling that predicts its offsets from what the bins hold where they are.

    `forward(input, rois)`: (N, output_channels, H, W) and (R, 5) to (R, output_channels, PH, PW). `offset_fc` makes the
    offsets of three linear layers; the last starts at zero, so that the bins start in their places.

    Paper: Deformable Convolutional Networks (Dai et al., 2017), section 2.2.
    """

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        name, factory = type(self).__name__, {"device": device, "dtype": dtype}
        self.output_channels = check.integer(name, "output_channels", output_channels, least=1)
        self.deform_fc_channels = check.integer(name, "deform_fc_channels", deform_fc_channels, least=1)
        bins = math.prod(self.output_size)
        self.offset_fc = torch.nn.Sequential(
            torch.nn.Linear(bins * self.output_channels, self.deform_fc_channels, **factory),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(self.deform_fc_channels, self.deform_fc_channels, **factory),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(self.deform_fc_channels, 2 * bins, **factory),
        )
        zero_(self.offset_fc[-1])

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        offset = self.offset_fc(_still(self, input, rois))
        return _pool(self, input, rois, offset.unflatten(1, (2, *self.output_size)))


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """mmcv's: deformable RoI pooling v2, which predicts a mask beside its offsets.

    `forward(input, rois)`: (N, output_channels, H, W) and (R, 5) to (R, output_channels, PH, PW). `mask_fc` makes the
    mask of two linear layers and a sigmoid; the last layer starts at zero, so that every bin starts at half weight.

    Paper: Deformable ConvNets v2: More Deformable, Better Results (Zhu et al., 2019), section 3.2.
    """

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma, device=device,
            dtype=dtype,
        )  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        bins = math.prod(self.output_size)
        self.mask_fc = torch.nn.Sequential(
            torch.nn.Linear(bins * self.output_channels, self.deform_fc_channels, **factory),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(self.deform_fc_channels, bins, **factory),
            torch.nn.Sigmoid(),
        )
        zero_(self.mask_fc[2])

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        pooled = _still(self, input, rois)
        offset, mask = self.offset_fc(pooled), self.mask_fc(pooled)
        offset, mask = offset.unflatten(1, (2, *self.output_size)), mask.unflatten(1, self.output_size)
        return _pool(self, input, rois, offset, mask)


# These take any module with the attributes, as another library's is after `patch`.


def _pool(
    module: Any,
    input: torch.Tensor,
    rois: torch.Tensor,
    offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Any:
    return deform_roi_pool(
        input, rois, offset, mask,
        output_size=module.output_size, spatial_scale=module.spatial_scale, sampling_ratio=module.sampling_ratio,
        gamma=module.gamma,
    )  # fmt: skip


def _still(module: Any, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """What offsets are predicted from: each roi's bins, not moved, in a row."""
    name, axes = type(module).__name__, "(N, output_channels, H, W) with output_channels"
    check_channels(name, "input", axes, module.output_channels, input)
    pooled: torch.Tensor = _pool(module, input, rois)
    return pooled.flatten(1)
