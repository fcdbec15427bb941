"""The module over ms_deform_attn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cudcn import check
from cudcn.ops.ms_deform_attn import ms_deform_attn

from ..bind import as_tensor
from .layers import xavier_, zero_

torch.fx.wrap("ms_deform_attn")


class MSDeformAttn(torch.nn.Module):
    """Deformable DETR's multi-scale deformable attention: each query looks at `n_points` places of every level.

    `forward(query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
    input_padding_mask=None)` takes

    - query: (N, Q, d_model)
    - reference_points: (N, Q, n_levels, 2), (x, y) in [0, 1], or (N, Q, n_levels, 4) with (width, height) after them
    - input_flatten: (N, sum of H * W, d_model), the levels one after the other
    - input_spatial_shapes: (n_levels, 2), (H, W) of each; input_level_start_index: (n_levels,); NumPy arrays will do
    - input_padding_mask: (N, sum of H * W), True where the input is padding

    and returns (N, Q, d_model). Arguments, attributes and parameters are the original's, and start as there: head m
    looks in the direction m / n_heads of a turn, point p at p + 1 pixels, all with equal weight.

    Paper: Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021).
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, factory = type(self).__name__, {"device": device, "dtype": dtype}
        self.d_model = check.integer(name, "d_model", d_model, least=1)
        self.n_levels = check.integer(name, "n_levels", n_levels, least=1)
        self.n_heads = check.integer(name, "n_heads", n_heads, least=1)
        self.n_points = check.integer(name, "n_points", n_points, least=1)
        if self.d_model % self.n_heads:
            raise ValueError(f"{name}: n_heads must divide d_model, got n_heads={n_heads}, d_model={d_model}")
        self.im2col_step = 64  # which is not needed: any batch will do
        places = self.n_heads * self.n_levels * self.n_points
        self.sampling_offsets = torch.nn.Linear(self.d_model, 2 * places, **factory)
        self.attention_weights = torch.nn.Linear(self.d_model, places, **factory)
        self.value_proj = torch.nn.Linear(self.d_model, self.d_model, **factory)
        self.output_proj = torch.nn.Linear(self.d_model, self.d_model, **factory)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        zero_(self.sampling_offsets, self.attention_weights)
        xavier_(self.value_proj, self.output_proj)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1)
        start = (direction[:, None, None] * steps[:, None]).expand(-1, self.n_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.reshape(-1))

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        input_spatial_shapes: torch.Tensor | np.ndarray,
        input_level_start_index: torch.Tensor | np.ndarray,
        input_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return attend(
            self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
            input_padding_mask, heads=self.n_heads, levels=self.n_levels, points=self.n_points,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"


class FlashDeformAttn(MSDeformAttn):
    """DCNv4's name for the same; the sampling places keep their precision, where the original rounds them to half."""


def attend(
    module: Any,
    query: torch.Tensor,
    reference_points: torch.Tensor,
    input: torch.Tensor,
    spatial_shapes: torch.Tensor | np.ndarray,
    level_start_index: torch.Tensor | np.ndarray,
    padding_mask: torch.Tensor | None,
    *,
    heads: int,
    levels: int,
    points: int,
) -> torch.Tensor:
    """What every library's module of this kind computes, with the four layers of `module`, named alike in all."""
    shapes: torch.Tensor = as_tensor(spatial_shapes, like=query)
    value = module.value_proj(input)
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0)
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
    logits = module.attention_weights(query).unflatten(-1, (heads, levels, points))
    locations = _locations(type(module).__name__, reference_points, offsets, shapes)
    out = ms_deform_attn(value.unflatten(-1, (heads, -1)), shapes, level_start_index, locations, logits, softmax=True)
    return module.output_proj(out)


@torch.fx.wrap
def _locations(
    name: str, reference_points: torch.Tensor, offsets: torch.Tensor, spatial_shapes: torch.Tensor
) -> torch.Tensor:
    """Offsets count pixels of a level from a point, or, from a box, halves of it by as many as there are points."""
    reference = reference_points[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        return reference + offsets / spatial_shapes.flip(-1)[:, None]
    if reference_points.shape[-1] == 4:
        return reference[..., :2] + offsets / offsets.shape[-2] * reference[..., 2:] / 2
    raise ValueError(
        f"{name}: reference_points must be (N, Q, n_levels, 2) or (N, Q, n_levels, 4), "
        f"got {tuple(reference_points.shape)}"
    )
