"""The module over ms_deform_attn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cudcn import check
from cudcn.ops.ms_deform_attn import ms_deform_attn

from ..bind import as_tensor
from .layers import projection, zeroed


class MSDeformAttn(torch.nn.Module):
    """Multi-scale deformable attention: each query looks at `n_points` places of every level, near its own place.

    `forward(query, reference_points, input_flatten, spatial_shapes, level_start_index, padding_mask=None)` takes

    - query: (N, Q, d_model)
    - reference_points: (N, Q, n_levels, 2), (x, y) in [0, 1], or (N, Q, n_levels, 4) with (width, height) after them
    - input_flatten: (N, sum of H * W, d_model), the levels one after the other
    - spatial_shapes: (n_levels, 2), (H, W) of each; level_start_index: (n_levels,); NumPy arrays will do
    - padding_mask: (N, sum of H * W), True where the input is padding

    and returns (N, Q, d_model). Parameters are named, and start, as in Deformable DETR's module: head m looks in
    the direction m / n_heads of a turn, point p at p + 1 pixels, all with equal weight.

    Paper: Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021).
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (
            ("d_model", d_model), ("n_levels", n_levels), ("n_heads", n_heads), ("n_points", n_points)
        ):  # fmt: skip
            check.integer(name, argument, value, least=1)
        if d_model % n_heads:
            raise ValueError(f"{name}: n_heads must divide d_model, got n_heads={n_heads}, d_model={d_model}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = zeroed(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = zeroed(d_model, n_heads * n_levels * n_points)
        self.value_proj = projection(d_model)
        self.output_proj = projection(d_model)
        angle = torch.arange(n_heads) * (2 * math.pi / n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, n_points + 1)
        start = (direction[:, None, None] * steps[:, None]).expand(-1, n_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.reshape(-1))

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        spatial_shapes: torch.Tensor | np.ndarray,
        level_start_index: torch.Tensor | np.ndarray,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return attend(
            self, query, reference_points, input_flatten, spatial_shapes, level_start_index, padding_mask,
            heads=self.n_heads, levels=self.n_levels, points=self.n_points,
        )  # fmt: skip


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
    places = (*query.shape[:2], heads, levels, points)
    offsets = module.sampling_offsets(query).reshape(*places, 2)
    logits = module.attention_weights(query).reshape(places)
    reference = reference_points[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        locations = reference + offsets / shapes.flip(-1)[:, None]
    elif reference_points.shape[-1] == 4:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] / 2
    else:
        raise ValueError(
            f"{type(module).__name__}: reference_points must be (N, Q, n_levels, 2) or (N, Q, n_levels, 4), "
            f"got {tuple(reference_points.shape)}"
        )
    out = ms_deform_attn(value.unflatten(-1, (heads, -1)), shapes, level_start_index, locations, logits, softmax=True)
    return module.output_proj(out)
