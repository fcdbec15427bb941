"""Multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import check, dispatch
from ..cpu import aggregate as cpu
from ..cuda import aggregate as cuda
from ..geometry import MOST_LEVELS, Attention, Spec
from ..op import Op


def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any | None,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    softmax: bool = False,
    points: Sequence[int] | None = None,
    method: str = "bilinear",
    layout: str = "NSMD",
) -> Any:
    """Multi-scale deformable attention: each query samples a few points in the feature maps of all levels.

    ::

        out[n, q, m] = sum over levels l and points p of
            attention_weights[n, q, m, l, p] * sample(value[n, level l, m], sampling_locations[n, q, m, l, p])

    with level l = pixels level_start_index[l] and following, H_l * W_l of them, row by row; m stands for head m's D
    channels. A location (x, y) lies at the position (y * H_l - 0.5, x * W_l - 0.5), where pixels have whole numbers.

    With `method="bilinear"` a sample is interpolated there. Outside a level its value counts as 0, so a sample fades
    out over one pixel beyond the border. Where a position p, in pixels, is <= -1 or >= the level's size, NaN or
    infinite, it is left out: it adds nothing and gets no gradient, even if its weight or grad_output is NaN. Any other
    sample takes all four pixels around it, so that a NaN counts at weight 0 too. The gradient of a position is the
    slope of the cell [floor(p), floor(p) + 1], at whole numbers too, and at exactly -1, where there is no other
    gradient.

    With `method="discrete"`, as in RT-DETRv2, a sample is the pixel (floor(y * H_l + 0.5), floor(x * W_l + 0.5)), each
    clamped into the level: a pixel begins half a pixel before the place that it has above, and beyond a border there is
    the outermost one. A sample is left out where this number is NaN or infinite. The gradient of the locations is 0.

    Args:
        value: (N, S, M, D), the pixels of all levels, for M heads, or (N, M, D, S) with `layout="NMDS"`; float16,
            bfloat16, float32 or float64.
        spatial_shapes: (L, 2), the height and width of each level; int32 or int64. A list or tuple of pairs too, which
            costs a copy to the device in each call on CUDA.
        level_start_index: (L,), where each level begins in value's S pixels; int32 or int64. None: each begins where
            the one before it ends, the first at 0. Levels may lie apart or overlap.
        sampling_locations: (N, Q, M, L, P, 2), (x, y) in parts of the level's width and height: (0, 0) is the
            upper left edge of its first pixel, (1, 1) the lower right edge of its last.
        attention_weights: (N, Q, M, L, P).
        softmax: take `attention_weights` as logits, and normalise them over all levels and points, of samples that
            are left out too. A NaN makes its head of the query NaN, unless all samples are left out.
        points: how many points each level has, if not all have P. sampling_locations are then (N, Q, M, sum(points),
            2) and attention_weights (N, Q, M, sum(points)), a level's points after those of the level before it.
        method: "bilinear", which RT-DETRv2 and its descendants call "default", or "discrete".
        layout: "NSMD" or "NMDS", of value. CUDA copies the latter once, as a caller's transposition would.

    The floating tensors have one dtype, but beside half-precision data sampling_locations and attention_weights may
    be float32. Positions, weights and sums are float32 for half types (float64 for float64).

    Returns:
        (N, Q, M * D), of value's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        the floating tensors: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; there are more than 16 levels with
            `points` or `method="discrete"`; on the CPU also where a level is empty or does not lie inside value. (On
            CUDA, where nobody looks at the numbers beforehand, such a level adds 0. Where JAX runs the call, its own
            `jax.errors.JaxRuntimeError` may carry this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Papers: Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021). `points` and
    `method`: RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer (Lv et al., 2024).

    >>> import numpy as np, cudcn
    >>> value, where = np.ones((1, 80, 2, 4), np.float32), np.full((1, 5, 2, 2, 3, 2), 0.5, np.float32)
    >>> shapes, starts = np.array([[8, 8], [4, 4]]), np.array([0, 64])
    >>> cudcn.ms_deform_attn(value, shapes, starts, where, where[..., 0], softmax=True).shape
    (1, 5, 8)

    Four points in the first level, two in the second:

    >>> where = np.full((1, 5, 2, 6, 2), 0.5, np.float32)
    >>> cudcn.ms_deform_attn(
    ...     value, [(8, 8), (4, 4)], None, where, where[..., 0], points=(4, 2), method="discrete"
    ... ).shape
    (1, 5, 8)
    """
    return OP(
        value, _as_array(spatial_shapes, value), level_start_index, sampling_locations, attention_weights,
        softmax=softmax, points=points, method=method, layout=layout,
    )  # fmt: skip


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
    level_start_index: Any | None,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    softmax: bool = False,
    points: Sequence[int] | None = None,
    method: str = "bilinear",
    layout: str = "NSMD",
) -> MSDeformAttnGradients:
    """The gradients of `sum(grad_output * ms_deform_attn(...))`; of the logits with `softmax=True`.

    `grad_output` has the output's shape and dtype; the rest is as in `ms_deform_attn`. The result is
    deterministic, on CUDA too.
    """
    return OP.backward_of(
        grad_output, value, _as_array(spatial_shapes, value), level_start_index, sampling_locations, attention_weights,
        softmax=softmax, points=points, method=method, layout=layout,
    )  # fmt: skip


def _as_array(spatial_shapes: Any, value: Any) -> Any:
    """A sequence of pairs as an array beside `value`; anything else as it is."""
    if not isinstance(spatial_shapes, list | tuple):
        return spatial_shapes
    name = "ms_deform_attn"
    pairs = [check.integers(name, f"spatial_shapes[{i}]", pair, least=1) for i, pair in enumerate(spatial_shapes)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{name}: each of spatial_shapes must be (H, W), got {spatial_shapes}")
    return dispatch.constant(np.array(pairs, np.int64).reshape(-1, 2), like=value)


def _canonical(*, softmax: Any, points: Any, method: Any, layout: Any) -> dict[str, Any]:
    name = "ms_deform_attn"
    return {
        "softmax": check.flag(name, "softmax", softmax),
        "points": None if points is None else _points(name, points),
        "method": check.choice(name, "method", method, ("bilinear", "discrete")),
        "layout": check.choice(name, "layout", layout, ("NSMD", "NMDS")),
    }


def _points(name: str, value: Any) -> tuple[int, ...]:
    points = check.integers(name, "points", value, least=1)
    if len(points) > MOST_LEVELS or sum(points) > check.LARGEST:
        raise ValueError(
            f"{name}: points must be of at most {MOST_LEVELS} levels, and fewer than 2**31 together, "
            f"got {len(points)} and {sum(points)}"
        )
    return points


def _geometry(
    specs: tuple[Any, ...], *, softmax: bool, points: tuple[int, ...] | None, method: str, layout: str
) -> Attention:
    name = "ms_deform_attn"
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights = specs
    samples = "L, P" if points is None else "sum(points)"
    check.rank(name, "value", value, f"({', '.join(layout)})")
    check.rank(name, "spatial_shapes", spatial_shapes, "(L, 2)")
    check.rank(name, "sampling_locations", sampling_locations, f"(N, Q, M, {samples}, 2)")
    check.floating(name, "value", value)
    check.indices(name, "spatial_shapes", spatial_shapes)
    batch, pixels, heads, channels = (value.shape[layout.index(axis)] for axis in "NSMD")
    levels, queries = spatial_shapes.shape[0], sampling_locations.shape[1]
    check.shape(name, "spatial_shapes", spatial_shapes, "(L, 2)", (levels, 2))
    if level_start_index is not None:
        check.indices(name, "level_start_index", level_start_index)
        check.shape(name, "level_start_index", level_start_index, "(L,)", (levels,))
    if points is not None and len(points) != levels:
        raise ValueError(f"{name}: points must have one number for each of {levels} levels, got {points}")
    if points is None:
        per_level = (sampling_locations.shape[4],) * levels
        sample_axes: tuple[int, ...] = levels, sampling_locations.shape[4]
    else:
        per_level, sample_axes = points, (sum(points),)
    per_query = (batch, queries, heads, *sample_axes)
    if min(heads, channels, levels, *per_level) < 1:
        raise ValueError(
            f"{name}: M, D, L and P must be at least 1, got value {value.shape}, spatial_shapes "
            f"{spatial_shapes.shape} and sampling_locations {sampling_locations.shape}"
        )
    if levels > MOST_LEVELS and method == "discrete":
        raise ValueError(f"{name}: method 'discrete' takes at most {MOST_LEVELS} levels, got {levels}")
    check.pixels(name, "value", pixels)
    for tensor, spec, axes, shape in (
        ("sampling_locations", sampling_locations, f"(N, Q, M, {samples}, 2)", (*per_query, 2)),
        ("attention_weights", attention_weights, f"(N, Q, M, {samples})", per_query),
    ):
        check.same_dtype(name, tensor, spec, value.dtype, like="value", or_float32=True)
        check.shape(name, tensor, spec, axes, shape)
    return Attention(
        name=name, batch=batch, pixels=pixels, queries=(queries, 1), groups=heads, group_channels=channels,
        points=per_level, softmax=softmax, discrete=method == "discrete", layout=layout,
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
