"""Deformable pooling of regions of interest, v1 and v2."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Pair
from ..cpu import pooling as cpu
from ..cuda import pooling as cuda
from ..geometry import RoIPooling
from ..op import Op
from . import pooling


def deform_roi_pool(
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Any:
    """Deformable RoI pooling: RoIAlign (aligned) whose bins move; v2 (modulated) with `mask`.

    Each roi is cut into PH x PW bins, and each bin, moved by its offset, is the mean over a grid of samples at the
    centres of its S x T parts::

        out[r, c, i, j] = mask[r, i, j] / max(S * T, 1) * sum over s < S, t < T of bilinear(input[n, c], y(s), x(t))

        y(s) = y1 + i * h / PH + (s + 0.5) * h / PH / S + gamma * h * offset[r, 1, i, j]
        y1 = rois[r, 2] * spatial_scale - 0.5,  h = (rois[r, 4] - rois[r, 2]) * spatial_scale
        x(t) alike, with offset[r, 0, i, j]

    where S = T = sampling_ratio, or ceil(h / PH) and ceil(w / PW) if that is 0 or less. A sample is 0 where y < -1
    or y > H (x alike), but still counts; else its position is clamped into the image. A roi that ends before it
    starts has samples only if sampling_ratio says how many. A bin without a sample in the image is 0, and so is one
    whose coordinates or offset are NaN or infinite; it has no gradient, whatever its mask and its output's gradient
    are. A sample reads the four pixels around it, beyond the border the outermost ones again, and also those of
    weight 0: if one of them is NaN, so is the bin.

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64, in any memory order;
            H and W are at most 2**23.
        rois: (R, 5) of (n, x1, y1, x2, y2): the image's index in the batch, and the corners in pixels of
            1 / spatial_scale, 0 being the first pixel's edge.
        offset: (R, 2, PH, PW), x before y, in units of gamma times the roi's size; or None for zeros.
        mask: (R, PH, PW), or None for ones.
        output_size: PH and PW, an int or (h, w).
        spatial_scale: the size of a pixel of the rois' coordinates in pixels of input.
        sampling_ratio: samples along each axis of a bin, at most 2**23; 0 or less for about one a pixel.
        gamma: the unit of offset.

    All tensors have one dtype, but beside half-precision data rois, offset and mask may be float32. Positions are
    float32 for half types (float64 for float64); sums keep their precision however many samples a bin has.

    Returns:
        (R, C, PH, PW), of input's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        input, offset and mask: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; or, on the CPU, a roi's n is not
            a whole number in [0, N), or sampling_ratio is 0 and a bin of finite size would have more than 2**23
            samples along an axis. On CUDA, where nobody looks at the values before the kernel runs, such a roi
            yields 0 and has no gradient. (Where JAX runs the call, its own `jax.errors.JaxRuntimeError` may carry
            this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Papers: Deformable Convolutional Networks (Dai et al., 2017), section 2.2; Deformable ConvNets v2 (Zhu et al.,
    2019), section 3.2. The samples are mmcv's.

    >>> import numpy as np, cudcn
    >>> x, rois = np.ones((1, 3, 8, 8), np.float32), np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> cudcn.deform_roi_pool(x, rois, np.zeros((1, 2, 2, 2), np.float32), output_size=2).shape
    (1, 3, 2, 2)
    """
    return OP(
        input, rois, offset, mask,
        output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
    )  # fmt: skip


class DeformRoIPoolGradients(NamedTuple):
    """The gradients of `deform_roi_pool`, each of its tensor's shape and dtype; None for rois, which have none."""

    input: Any
    rois: Any
    offset: Any
    mask: Any


def deform_roi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> DeformRoIPoolGradients:
    """The gradients of `sum(grad_output * deform_roi_pool(...))`; None for rois, and for what is None.

    `grad_output` has the output's shape and dtype; the rest is as in `deform_roi_pool`. The offset's gradient is the
    true derivative: a sample whose position is clamped has none along that axis (NaN if it reads an infinite pixel); at
    whole numbers the slope is that of the cell [p, p + 1]. The result is deterministic, on CUDA too.
    """
    return OP.backward_of(
        grad_output, input, rois, offset, mask,
        output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
    )  # fmt: skip


def _canonical(*, output_size: Any, spatial_scale: Any, sampling_ratio: Any, gamma: Any) -> dict[str, Any]:
    name = "deform_roi_pool"
    return {
        "output_size": check.pair(name, "output_size", output_size),
        "spatial_scale": check.finite(name, "spatial_scale", spatial_scale),
        "sampling_ratio": max(pooling.sample_count(name, "sampling_ratio", sampling_ratio, -check.LARGEST), 0),
        "gamma": check.finite(name, "gamma", gamma),
    }


def _geometry(
    specs: tuple[Any, ...], *, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int, gamma: float
) -> RoIPooling:
    name = "deform_roi_pool"
    input, rois, offset, mask = specs
    g = pooling.geometry(
        name, "DeformRoI", input, rois,
        output_size=output_size, spatial_scale=spatial_scale, samples=sampling_ratio, offset_unit=gamma,
    )  # fmt: skip
    pooling.check_fine(name, "offset", offset, input.dtype, "(R, 2, PH, PW)", (g.rois, 2, *output_size))
    pooling.check_fine(name, "mask", mask, input.dtype, "(R, PH, PW)", (g.rois, *output_size))
    return g


OP = Op(
    deform_roi_pool,
    deform_roi_pool_backward,
    DeformRoIPoolGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("rois", "offset", "mask"),
    non_differentiable=("rois",),
)
