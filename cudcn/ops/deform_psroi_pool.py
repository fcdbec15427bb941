"""Deformable position-sensitive pooling of regions of interest, v1 and v2."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Pair
from ..cpu import pooling as cpu
from ..cuda import pooling as cuda
from ..geometry import RoIPooling
from ..op import Op
from . import pooling


def deform_psroi_pool(
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: Pair,
    group_size: Pair,
    part_size: Pair | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    spatial_scale: float = 1.0,
) -> Any:
    """Deformable position-sensitive RoI pooling; v2 (modulated) with `mask`.

    Each roi is cut into PH x PW bins. A bin is moved by the offset of the part that it lies in, and is the mean of
    the bilinear samples on a grid that starts at its edge, of those that lie in the image::

        out[r, c, i, j] = mask[r, k, i, j] * mean over s, t < S of bilinear(input[n, m], y(s), x(t))

        y(s) = y1 + i * h / PH + s * h / PH / S + trans_std * h * offset[r, 2 * k + 1, ph, pw],
            kept if -0.5 <= y(s) <= H - 0.5, then clamped to [0, H - 1]
        y1 = round(rois[r, 2]) * spatial_scale - 0.5
        h = max((round(rois[r, 4]) + 1) * spatial_scale - 0.5 - y1, 0.1)
        x(t) alike, with offset[r, 2 * k, ph, pw]

        m = (c * Gh + gh) * Gw + gw                         the bin's channel of input
        gh = floor(i * Gh / PH), gw = floor(j * Gw / PW)    its group
        ph = floor(i * Ph / PH), pw = floor(j * Pw / PW)    its part
        k = floor(c / (D / classes))                        its class

    where S = sample_per_part, and halves are rounded away from zero. A bin without a sample in the image is 0, and so
    is one whose coordinates or offset are NaN or infinite; it has no gradient, whatever its mask and its output's
    gradient are. A sample reads the four pixels around it, beyond the border the outermost ones again, and also those
    of weight 0: if one of them is NaN, so is the bin. `group_size=1` is the deformable RoI pooling of the paper,
    without position-sensitive channels.

    Args:
        input: (N, C, H, W), C = D * Gh * Gw; float16, bfloat16, float32 or float64, in any memory order;
            H and W are at most 2**23.
        rois: (R, 5) of (n, x1, y1, x2, y2): the image's index in the batch, and the first and last column and row,
            in pixels of 1 / spatial_scale.
        offset: (R, 2 * classes, Ph, Pw), x before y, in units of trans_std times the roi's size; classes divide D.
            None for zeros.
        mask: (R, classes, PH, PW), or None for ones.
        output_size: PH and PW, an int or (h, w).
        group_size: Gh and Gw, an int or (h, w).
        part_size: Ph and Pw, an int or (h, w); None for the output size.
        sample_per_part: samples along each axis of a bin, at most 2**23.
        trans_std: the unit of offset.
        spatial_scale: the size of a pixel of the rois' coordinates in pixels of input.

    All tensors have one dtype, but beside half-precision data rois, offset and mask may be float32. Positions are
    float32 for half types (float64 for float64); sums keep their precision however many samples a bin has.

    Returns:
        (R, D, PH, PW), of input's kind and dtype. Torch tensors and JAX arrays are differentiable with respect to
        input, offset and mask: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above; or, on the CPU, a roi's n is not
            a whole number in [0, N). On CUDA, where nobody looks at the values before the kernel runs, such a roi
            yields 0 and has no gradient. (Where JAX runs the call, its own `jax.errors.JaxRuntimeError` may carry
            this message.)
        TypeError: a dtype does, or the tensors are of different frameworks.

    Papers: Deformable Convolutional Networks (Dai et al., 2017), section 2.2; Deformable ConvNets v2 (Zhu et al.,
    2019), section 3.2. The samples are those of MXNet's DeformablePSROIPooling.

    >>> import numpy as np, cudcn
    >>> x, rois = np.ones((1, 12, 8, 8), np.float32), np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> cudcn.deform_psroi_pool(x, rois, np.zeros((1, 2, 2, 2), np.float32), output_size=2, group_size=2).shape
    (1, 3, 2, 2)
    """
    return OP(
        input, rois, offset, mask,
        output_size=output_size, group_size=group_size, part_size=part_size, sample_per_part=sample_per_part,
        trans_std=trans_std, spatial_scale=spatial_scale,
    )  # fmt: skip


class DeformPSRoIPoolGradients(NamedTuple):
    """The gradients of `deform_psroi_pool`, each of its tensor's shape and dtype; None for rois, which have none."""

    input: Any
    rois: Any
    offset: Any
    mask: Any


def deform_psroi_pool_backward(
    grad_output: Any,
    input: Any,
    rois: Any,
    offset: Any = None,
    mask: Any = None,
    *,
    output_size: Pair,
    group_size: Pair,
    part_size: Pair | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    spatial_scale: float = 1.0,
) -> DeformPSRoIPoolGradients:
    """The gradients of `sum(grad_output * deform_psroi_pool(...))`; None for rois, and for what is None.

    `grad_output` has the output's shape and dtype; the rest is as in `deform_psroi_pool`. The offset's gradient is the
    true derivative: a sample whose position is clamped has none along that axis (NaN if it reads an infinite pixel); at
    whole numbers the slope is that of the cell [p, p + 1]. The result is deterministic, on CUDA too.
    """
    return OP.backward_of(
        grad_output, input, rois, offset, mask,
        output_size=output_size, group_size=group_size, part_size=part_size, sample_per_part=sample_per_part,
        trans_std=trans_std, spatial_scale=spatial_scale,
    )  # fmt: skip


def _canonical(
    *,
    output_size: Any,
    group_size: Any,
    part_size: Any,
    sample_per_part: Any,
    trans_std: Any,
    spatial_scale: Any,
) -> dict[str, Any]:
    name = "deform_psroi_pool"
    output_size = check.pair(name, "output_size", output_size)
    return {
        "output_size": output_size,
        "group_size": check.pair(name, "group_size", group_size),
        "part_size": output_size if part_size is None else check.pair(name, "part_size", part_size),
        "sample_per_part": pooling.sample_count(name, "sample_per_part", sample_per_part, least=1),
        "trans_std": check.finite(name, "trans_std", trans_std),
        "spatial_scale": check.finite(name, "spatial_scale", spatial_scale),
    }


def _geometry(
    specs: tuple[Any, ...],
    *,
    output_size: tuple[int, int],
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
    spatial_scale: float,
) -> RoIPooling:
    name = "deform_psroi_pool"
    input, rois, offset, mask = specs
    classes = 1
    if offset is not None:
        check.rank(name, "offset", offset, "(R, 2 * classes, Ph, Pw)")
        classes = offset.shape[1] // 2
    elif mask is not None:
        check.rank(name, "mask", mask, "(R, classes, PH, PW)")
        classes = mask.shape[1]
    g = pooling.geometry(
        name, "DeformPSRoI", input, rois,
        output_size=output_size, group_size=group_size, part_size=part_size, classes=classes,
        samples=sample_per_part, spatial_scale=spatial_scale, offset_unit=trans_std,
    )  # fmt: skip
    parts, bins = (g.rois, 2 * classes, *part_size), (g.rois, classes, *output_size)
    pooling.check_fine(name, "offset", offset, input.dtype, "(R, 2 * classes, Ph, Pw)", parts)
    pooling.check_fine(name, "mask", mask, input.dtype, "(R, classes, PH, PW)", bins)
    return g


OP = Op(
    deform_psroi_pool,
    deform_psroi_pool_backward,
    DeformPSRoIPoolGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("rois", "offset", "mask"),
    non_differentiable=("rois",),
)
