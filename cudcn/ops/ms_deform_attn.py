"""Multi-scale deformable attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..cpu import aggregate as cpu
from ..cuda import aggregate as cuda
from ..geometry import Attention, Spec
from ..op import Op


def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    softmax: bool = False,
) -> Any:
    """Multi-scale deformable attention: each query samples a few points in the feature maps of all levels.

    ::

        out[n, q, m] = sum over levels l and points p of
            attention_weights[n, q, m, l, p] * bilinear(value[n, level l, m], y * H_l - 0.5, x * W_l - 0.5)

    with (x, y) = sampling_locations[n, q, m, l, p] and level l = pixels level_start_index[l] and following,
    H_l * W_l of them, row by row; m stands for head m's D channels. Outside a level its value counts as 0, so a
    sample fades out over one pixel beyond the border. Where a position p, in pixels, is <= -1 or >= the level's
    size, NaN or infinite, it is left out: it adds nothing and gets no gradient, even if its weight or grad_output
    is NaN. Any other sample takes all four pixels around it, so that a NaN counts at weight 0 too. The gradient of
    a position is the slope of the cell [floor(p), floor(p) + 1], at whole numbers too, and at exactly -1, where
    there is no other gradient.

    Args:
        value: (N, S, M, D), the pixels of all levels, for M heads; float16, bfloat16, float32 or float64.
        spatial_shapes: (L, 2), the height and width of each level; int32 or int64.
        level_start_index: (L,), where each level begins in value's S pixels; int32 or int64.
        sampling_locations: (N, Q, M, L, P, 2), (x, y) in parts of the level's width and height: (0, 0) is the
            upper left edge of its first pixel, (1, 1) the lower right edge of its last.
        attention_weights: (N, Q, M, L, P).
        softmax: take `attention_weights` as logits, and normalise them over all levels and points, of samples that
            are left out too. A NaN makes its head of the query NaN, unless all samples are left out.

    The floating tensors have one dtype, but beside half-precision data sampling_locations and attention_weights may
    be float32. Positions, weights and sums are float32 for half types (float64 for float64).

    Returns:
        (N, Q, M * D), of value's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        the floating tensors, once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; on the CPU also where a level
            is empty or does not lie inside value. (On CUDA, where nobody looks at the numbers beforehand, such a
            level adds 0. Where JAX runs the call, its own `jax.errors.JaxRuntimeError` may carry this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Paper: Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021).

    >>> import numpy as np, cudcn
    >>> value, where = np.ones((1, 80, 2, 4), np.float32), np.full((1, 5, 2, 2, 3, 2), 0.5, np.float32)
    >>> shapes, starts = np.array([[8, 8], [4, 4]]), np.array([0, 64])
    >>> cudcn.ms_deform_attn(value, shapes, starts, where, where[..., 0], softmax=True).shape
    (1, 5, 8)
    """
    return OP(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, softmax=softmax)


class MSDeformAttnGradients(NamedTuple):
    """One gradient per tensor of `ms_deform_attn`, of its tensor's shape and dtype; None for the levels' two."""

    value: Any
    spatial_shapes: Any
    level_start_index: Any
    sampling_locations: Any
    attention_weights: Any


def ms_deform_attn_backward(
    grad_output: Any,
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    softmax: bool = False,
) -> MSDeformAttnGradients:
    """The gradients of `sum(grad_output * ms_deform_attn(...))`; of the logits with `softmax=True`.

    `grad_output` has the output's shape and dtype; the rest is as in `ms_deform_attn`. The result is
    deterministic, on CUDA too.
    """
    return OP.backward_of(
        grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, softmax=softmax
    )


def _canonical(*, softmax: Any) -> dict[str, Any]:
    return {"softmax": check.flag("ms_deform_attn", "softmax", softmax)}


def _geometry(specs: tuple[Any, ...], *, softmax: bool) -> Attention:
    name = "ms_deform_attn"
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights = specs
    check.rank(name, "value", value, "(N, S, M, D)")
    check.rank(name, "spatial_shapes", spatial_shapes, "(L, 2)")
    check.rank(name, "sampling_locations", sampling_locations, "(N, Q, M, L, P, 2)")
    check.floating(name, "value", value)
    check.indices(name, "spatial_shapes", spatial_shapes)
    check.indices(name, "level_start_index", level_start_index)
    batch, pixels, heads, channels = value.shape
    levels = spatial_shapes.shape[0]
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    check.shape(name, "spatial_shapes", spatial_shapes, "(L, 2)", (levels, 2))
    check.shape(name, "level_start_index", level_start_index, "(L,)", (levels,))
    if min(heads, channels, levels, points) < 1:
        raise ValueError(
            f"{name}: M, D, L and P must be at least 1, got value {value.shape}, spatial_shapes "
            f"{spatial_shapes.shape} and sampling_locations {sampling_locations.shape}"
        )
    check.pixels(name, "value", pixels)
    per_query = (batch, queries, heads, levels, points)
    for tensor, spec, axes, shape in (
        ("sampling_locations", sampling_locations, "(N, Q, M, L, P, 2)", (*per_query, 2)),
        ("attention_weights", attention_weights, "(N, Q, M, L, P)", per_query),
    ):
        check.same_dtype(name, tensor, spec, value.dtype, like="value", or_float32=True)
        check.shape(name, tensor, spec, axes, shape)
    return Attention(
        name=name, batch=batch, pixels=pixels, queries=(queries, 1), groups=heads, group_channels=channels,
        levels=levels, points=points, softmax=softmax,
        output=Spec((batch, queries, heads * channels), value.dtype),
    )  # fmt: skip


OP = Op(
    ms_deform_attn,
    ms_deform_attn_backward,
    MSDeformAttnGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("sampling_locations", "attention_weights"),
    non_differentiable=("spatial_shapes", "level_start_index"),
)
