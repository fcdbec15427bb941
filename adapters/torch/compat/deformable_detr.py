"""Deformable DETR and those who took its code over: DINO, Mask2Former, MaskDINO, Grounding DINO, RF-DETR, LW-DETR."""

from __future__ import annotations

from typing import Any

import torch

from cudcn.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_backward as _backward

from ..nn.ms_deform_attn import attend
from .replacement import Replacement


class MSDeformAttnFunction:
    """To be called as the autograd function of this name: `MSDeformAttnFunction.apply(...)`."""

    @staticmethod
    def apply(
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        """`cudcn.ms_deform_attn`; `im2col_step` is not needed, and any batch will do."""
        return ms_deform_attn(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        )


def ms_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    im2col_step: int,
) -> torch.Tensor:
    """The first function of the extension modules `MultiScaleDeformableAttention` and `groundingdino._C`."""
    return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    grad_output: torch.Tensor,
    im2col_step: int,
) -> list[torch.Tensor]:
    """The other one: the gradients of value, sampling_loc and attn_weight."""
    grads = _backward(grad_output, value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    return [grads.value, grads.sampling_locations, grads.attention_weights]


_LAYERS = frozenset({"sampling_offsets", "attention_weights", "value_proj", "output_proj"})


class MSDeformAttnForward(Replacement):
    kind = "deformable_detr.MSDeformAttn"
    names = ("MSDeformAttn",)
    needs = _LAYERS | {"d_model", "n_levels", "n_heads", "n_points"}
    allows = frozenset({"im2col_step", "ratio", "use_4D_normalizer"})  # the last two: ViT-Adapter, DINO

    @classmethod
    def misfit(cls, module: torch.nn.Module) -> str | None:
        if getattr(module, "use_4D_normalizer", False):
            return "its use_4D_normalizer is True, and must be False"
        return super().misfit(module)

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        input_spatial_shapes: torch.Tensor,
        input_level_start_index: torch.Tensor,
        input_padding_mask: torch.Tensor | None = None,
        input_spatial_shapes_hw: list[tuple[int, int]] | None = None,  # RF-DETR's
    ) -> torch.Tensor:
        return attend(
            self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
            input_padding_mask, heads=self.n_heads, levels=self.n_levels, points=self.n_points,
        )  # fmt: skip


class MultiScaleDeformableAttentionForward(Replacement):
    """Grounding DINO's: mmcv's without identity and dropout."""

    kind = "groundingdino.MultiScaleDeformableAttention"
    names = ("MultiScaleDeformableAttention",)
    needs = _LAYERS | {"num_heads", "num_levels", "num_points", "batch_first"}
    allows = frozenset({"im2col_step", "embed_dim"})

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        reference_points: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        level_start_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return attend_as_mmcv(
            self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )


def attend_as_mmcv(
    module: Any,
    query: torch.Tensor,
    value: torch.Tensor | None,
    query_pos: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    reference_points: Any,
    spatial_shapes: Any,
    level_start_index: Any,
) -> torch.Tensor:
    """The attention alone. Without a value the query is it; the batch comes second unless `batch_first`."""
    value = query if value is None else value
    query = query if query_pos is None else query + query_pos
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    out = attend(
        module, query, reference_points, value, spatial_shapes, level_start_index, key_padding_mask,
        heads=module.num_heads, levels=module.num_levels, points=module.num_points,
    )  # fmt: skip
    return out if module.batch_first else out.transpose(0, 1)


REPLACEMENTS = (MSDeformAttnForward, MultiScaleDeformableAttentionForward)
