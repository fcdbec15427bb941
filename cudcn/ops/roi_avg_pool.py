"""Average pooling of regions of interest."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Pair
from ..cpu import pooling as cpu
from ..cuda import pooling as cuda
from ..geometry import RoIPooling
from ..op import Op
from . import pooling


def roi_avg_pool(input: Any, rois: Any, *, output_size: Pair, spatial_scale: float = 1.0) -> Any:
    """Average pooling over the quantised bins of regions of interest.

    Each roi is cut into PH x PW bins, which are widened to whole pixels; neighbours may share some::

        out[r, c, i, j] = mean of input[n, c, y, x] over
            floor(y1 + i * h / PH) <= y < ceil(y1 + (i + 1) * h / PH)    and 0 <= y < H
            floor(x1 + j * w / PW) <= x < ceil(x1 + (j + 1) * w / PW)    and 0 <= x < W

        y1 = round(rois[r, 2]) * spatial_scale
        h = max((round(rois[r, 4]) + 1) * spatial_scale - y1, 0.1)       (x1 and w alike)

    where halves are rounded away from zero. A bin without a pixel in the image is 0, and so is one whose
    coordinates are NaN or infinite; it has no gradient, whatever its output's gradient is. This is `psroi_pool` with
    one group.

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64, in any memory order;
            H and W are at most 2**23.
        rois: (R, 5) of (n, x1, y1, x2, y2): the image's index in the batch, and the first and last column and row,
            in pixels of 1 / spatial_scale.
        output_size: PH and PW, an int or (h, w).
        spatial_scale: the size of a pixel of the rois' coordinates in pixels of input.

    All tensors have one dtype, but beside half-precision data rois may be float32. Coordinates are float32 for half
    types (float64 for float64); sums keep their precision however many pixels a bin has.

    Returns:
        (R, C, PH, PW), of input's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        input: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; or, on the CPU, a roi's n is not
            a whole number in [0, N). On CUDA, where nobody looks at the values before the kernel runs, such a roi
            yields 0 and has no gradient. (Where JAX runs the call, its own `jax.errors.JaxRuntimeError` may carry
            this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Paper: the bins of R-FCN (Dai et al., 2016), section 2.

    >>> import numpy as np, cudcn
    >>> x, rois = np.ones((1, 3, 8, 8), np.float32), np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> cudcn.roi_avg_pool(x, rois, output_size=2).shape
    (1, 3, 2, 2)
    """
    return OP(input, rois, output_size=output_size, spatial_scale=spatial_scale)


class RoIAvgPoolGradients(NamedTuple):
    """The gradients of `roi_avg_pool`, each of its tensor's shape and dtype; None for rois, which have none."""

    input: Any
    rois: Any


def roi_avg_pool_backward(
    grad_output: Any, input: Any, rois: Any, *, output_size: Pair, spatial_scale: float = 1.0
) -> RoIAvgPoolGradients:
    """The gradients of `sum(grad_output * roi_avg_pool(...))`.

    `grad_output` has the output's shape and dtype; the rest is as in `roi_avg_pool`. The result is
    deterministic, on CUDA too.
    """
    return OP.backward_of(grad_output, input, rois, output_size=output_size, spatial_scale=spatial_scale)


def _canonical(*, output_size: Any, spatial_scale: Any) -> dict[str, Any]:
    name = "roi_avg_pool"
    return {
        "output_size": check.pair(name, "output_size", output_size),
        "spatial_scale": check.finite(name, "spatial_scale", spatial_scale),
    }


def _geometry(specs: tuple[Any, ...], *, output_size: tuple[int, int], spatial_scale: float) -> RoIPooling:
    return pooling.geometry("roi_avg_pool", "Average", *specs, output_size=output_size, spatial_scale=spatial_scale)


OP = Op(
    roi_avg_pool,
    roi_avg_pool_backward,
    RoIAvgPoolGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("rois",),
    non_differentiable=("rois",),
)
