"""Position-sensitive average pooling of regions of interest."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Pair
from ..cpu import pooling as cpu
from ..cuda import pooling as cuda
from ..geometry import RoIPooling
from ..op import Op
from . import pooling


def psroi_pool(
    input: Any, rois: Any, *, output_size: Pair, group_size: Pair | None = None, spatial_scale: float = 1.0
) -> Any:
    """Position-sensitive average pooling: each bin of a region of interest reads channels of its own.

    The bins are those of `roi_avg_pool`; bin (i, j) of output channel c is the mean of input channel
    (c * Gh + gh) * Gw + gw, with gh = floor(i * Gh / PH) and gw = floor(j * Gw / PW)::

        out[r, c, i, j] = mean of input[n, (c * Gh + gh) * Gw + gw, y, x] over
            floor(y1 + i * h / PH) <= y < ceil(y1 + (i + 1) * h / PH)    and 0 <= y < H
            floor(x1 + j * w / PW) <= x < ceil(x1 + (j + 1) * w / PW)    and 0 <= x < W

        y1 = round(rois[r, 2]) * spatial_scale
        h = max((round(rois[r, 4]) + 1) * spatial_scale - y1, 0.1)       (x1 and w alike)

    where halves are rounded away from zero. A bin without a pixel in the image is 0, and so is one whose
    coordinates are NaN or infinite; it has no gradient, whatever its output's gradient is. These are the numbers of
    R-FCN, of MXNet's PSROIPooling and of OpenVINO's "average" mode; torchvision's ps_roi_pool rounds otherwise and
    never reads the last row and column.

    Args:
        input: (N, C, H, W), C = D * Gh * Gw; float16, bfloat16, float32 or float64, in any memory order;
            H and W are at most 2**23.
        rois: (R, 5) of (n, x1, y1, x2, y2): the image's index in the batch, and the first and last column and row,
            in pixels of 1 / spatial_scale.
        output_size: PH and PW, an int or (h, w).
        group_size: Gh and Gw, an int or (h, w); None for the output size.
        spatial_scale: the size of a pixel of the rois' coordinates in pixels of input.

    All tensors have one dtype, but beside half-precision data rois may be float32. Coordinates are float32 for half
    types (float64 for float64); sums keep their precision however many pixels a bin has.

    Returns:
        (R, D, PH, PW), of input's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        input: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; or, on the CPU, a roi's n is not
            a whole number in [0, N). On CUDA, where nobody looks at the values before the kernel runs, such a roi
            yields 0 and has no gradient. (Where JAX runs the call, its own `jax.errors.JaxRuntimeError` may carry
            this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Paper: R-FCN: Object Detection via Region-based Fully Convolutional Networks (Dai et al., 2016), section 2.

    >>> import numpy as np, cudcn
    >>> x, rois = np.ones((1, 12, 8, 8), np.float32), np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> cudcn.psroi_pool(x, rois, output_size=2).shape
    (1, 3, 2, 2)
    """
    return OP(input, rois, output_size=output_size, group_size=group_size, spatial_scale=spatial_scale)


class PSRoIPoolGradients(NamedTuple):
    """The gradients of `psroi_pool`, each of its tensor's shape and dtype; None for rois, which have none."""

    input: Any
    rois: Any


def psroi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    *,
    output_size: Pair,
    group_size: Pair | None = None,
    spatial_scale: float = 1.0,
) -> PSRoIPoolGradients:
    """The gradients of `sum(grad_output * psroi_pool(...))`.

    `grad_output` has the output's shape and dtype; the rest is as in `psroi_pool`. The result is
    deterministic, on CUDA too.
    """
    return OP.backward_of(
        grad_output, input, rois, output_size=output_size, group_size=group_size, spatial_scale=spatial_scale
    )


def _canonical(*, output_size: Any, group_size: Any, spatial_scale: Any) -> dict[str, Any]:
    name = "psroi_pool"
    output_size = check.pair(name, "output_size", output_size)
    return {
        "output_size": output_size,
        "group_size": output_size if group_size is None else check.pair(name, "group_size", group_size),
        "spatial_scale": check.finite(name, "spatial_scale", spatial_scale),
    }


def _geometry(
    specs: tuple[Any, ...], *, output_size: tuple[int, int], group_size: tuple[int, int], spatial_scale: float
) -> RoIPooling:
    return pooling.geometry(
        "psroi_pool", "Average", *specs,
        output_size=output_size, group_size=group_size, spatial_scale=spatial_scale,
    )  # fmt: skip


OP = Op(
    psroi_pool,
    psroi_pool_backward,
    PSRoIPoolGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("rois",),
    non_differentiable=("rois",),
)
