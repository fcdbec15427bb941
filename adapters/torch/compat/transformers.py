"""Hugging Face transformers: the attention of Deformable DETR and of those that followed it.

`patch` knows, in any model, the class `MultiScaleDeformableAttention` (Deformable DETR, Grounding DINO, OmDet-Turbo,
RT-DETR, LW-DETR, RF-DETR, PP-DocLayout), and the modules that call `multi_scale_deformable_attention` (Mask2Former,
OneFormer) or `multi_scale_deformable_attention_v2` (RT-DETRv2, D-FINE, DEIMv2).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from cudcn.ops.ms_deform_attn import ms_deform_attn

from .replacement import Replacement, parameters


def multi_scale_deformable_attention(
    value: torch.Tensor,
    value_spatial_shapes: torch.Tensor | Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """`cudcn.ms_deform_attn` with the levels one after the other, given by their shapes alone.

    On CUDA a list of shapes costs a copy to the device in each call; a tensor that is there costs none.
    """
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: torch.Tensor,
    value_spatial_shapes: torch.Tensor | Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> torch.Tensor:
    """RT-DETRv2's attention: `num_points_list` says how many of a query's points lie in each level.

    sampling_locations are (N, Q, M, P, 2) and attention_weights (N, Q, M, P), for all P points of all levels in turn.
    With `method="discrete"` a point reads one pixel, and has no gradient: see `cudcn.ms_deform_attn`.
    """
    if method not in ("default", "discrete"):
        raise ValueError(f'multi_scale_deformable_attention_v2: method must be "default" or "discrete", got {method!r}')
    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # whose gradient is None there, where ours would be 0
    return ms_deform_attn(
        value, value_spatial_shapes, None, sampling_locations, attention_weights,
        points=tuple(num_points_list), method="bilinear" if method == "default" else method,
    )  # fmt: skip


class MultiScaleDeformableAttentionForward(Replacement):
    kind = "transformers.MultiScaleDeformableAttention"
    names = ("MultiScaleDeformableAttention",)

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        return ms_deform_attn(value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights)


class _OtherCore(Replacement):
    """The module's own forward, with `core` in the place of the library's function of that name."""

    core: ClassVar[Callable[..., torch.Tensor]]

    @classmethod
    def theirs(cls, module: torch.nn.Module) -> Any:
        """The function that the module's forward calls; None if it calls none of the name."""
        forward = type(module).forward
        called = isinstance(forward, types.FunctionType) and cls.core.__name__ in forward.__code__.co_names
        return forward.__globals__.get(cls.core.__name__) if called else None

    @classmethod
    def claims(cls, module: torch.nn.Module) -> bool:
        return cls.theirs(module) is not None

    @classmethod
    def misfit(cls, module: torch.nn.Module) -> str | None:
        theirs, ours = parameters(cls.theirs(module)), parameters(cls.core)
        name = cls.core.__name__
        return None if theirs == ours else f"its {name} takes ({', '.join(theirs)}), and not ({', '.join(ours)})"

    @classmethod
    def members(cls, original: type[torch.nn.Module]) -> dict[str, Any]:
        theirs: Any = original.forward
        scope = {**theirs.__globals__, cls.core.__name__: cls.core}
        forward = types.FunctionType(theirs.__code__, scope, "forward", theirs.__defaults__, theirs.__closure__)
        forward.__kwdefaults__ = theirs.__kwdefaults__
        return {"forward": forward}


class CallsCore(_OtherCore):
    kind = "transformers.multi_scale_deformable_attention"
    core = staticmethod(multi_scale_deformable_attention)


class CallsCoreV2(_OtherCore):
    kind = "transformers.multi_scale_deformable_attention_v2"
    core = staticmethod(multi_scale_deformable_attention_v2)


class HoldsCoreV2(CallsCoreV2):
    """D-FINE and DEIMv2 keep the function as an attribute."""

    @classmethod
    def theirs(cls, module: torch.nn.Module) -> Any:
        held = getattr(module, "ms_deformable_attn_core", None)
        return held if getattr(held, "__name__", None) == cls.core.__name__ else None

    @classmethod
    def members(cls, original: type[torch.nn.Module]) -> dict[str, Any]:
        # a property comes before what the instance holds, and leaves it there
        return {"ms_deformable_attn_core": property(lambda self: cls.core)}


REPLACEMENTS = (MultiScaleDeformableAttentionForward, CallsCore, CallsCoreV2, HoldsCoreV2)
