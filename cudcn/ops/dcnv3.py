"""Deformable convolution v3."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Padding, Pair
from ..cpu import aggregate as cpu
from ..cuda import aggregate as cuda
from ..geometry import Windows
from ..op import Op
from .aggregate import canonical, windows


def dcnv3(
    input: Any,
    offset: Any,
    mask: Any,
    *,
    kernel_size: Pair = 3,
    stride: Pair = 1,
    padding: Padding = 1,
    dilation: Pair = 1,
    group: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Any:
    """Deformable convolution v3, the core operator of InternImage.

    Each group of channels is a sum of samples, weighted by the mask alone (the convolution's weights are the
    pointwise layers around the operator)::

        out[n, y, x, g] = sum over taps (i, j) of
            mask[n, y, x, g, i, j] * bilinear(input[n, :, :, g], py, px)

        py = y * stride_h - top  + cy + (j * dilation_h - cy + dy[n, y, x, g, i, j]) * offset_scale
        px = x * stride_w - left + cx + (i * dilation_w - cx + dx[n, y, x, g, i, j]) * offset_scale

    where (cy, cx) = dilation * (kernel_size - 1) // 2 is the window's middle, and g stands for the group's
    C // group channels. Taps are numbered along the height first: tap i * kh + j is column i, row j.
    Outside the image the input counts as 0, so a sample fades out over one pixel beyond the border. Where py <= -1
    or py >= H (px alike), or the offset is NaN or infinite, it is left out: it adds nothing and gets no gradient,
    even if its mask or grad_output is NaN. Any other sample takes all four pixels around it, so that a NaN counts at
    weight 0 too. The gradient of a position is the slope of the cell [floor(p), floor(p) + 1], at whole numbers too,
    and at exactly -1, where there is no other gradient.

    Args:
        input: (N, H, W, C); float16, bfloat16, float32 or float64.
        offset: (N, H_out, W_out, group * P * 2), with P = kh * kw - remove_center taps, in pixels (times
            `offset_scale`). Channel (g * P + p) * 2 holds dx, the next one dy.
        mask: (N, H_out, W_out, group * P).
        kernel_size: an int or (h, w).
        stride: an int or (h, w).
        padding: an int, or (h, w), each of them an int or a pair: ((top, bottom), (left, right)).
        dilation: an int or (h, w).
        group: into how many groups the channels are split, each with its own offsets and mask.
        offset_scale: stretches the window, offsets included, about its middle.
        remove_center: leaves out the middle tap; for square kernels of odd size above 1.
        softmax: take `mask` as logits, and normalise them over the taps, of samples that are left out too. A NaN
            makes its group of the output pixel NaN, unless all samples are left out.

    All tensors have one dtype, but beside half-precision data offset and mask may be float32. Positions, weights
    and sums are float32 for half types (float64 for float64).

    Returns:
        (N, H_out, W_out, C), of input's kind and dtype, with
        H_out = (H + top + bottom - dilation_h * (kh - 1) - 1) // stride_h + 1. Torch tensors and JAX arrays are
        differentiable with respect to every tensor: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above.
        TypeError: a dtype does, or the tensors are of different frameworks.

    Paper: InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions (Wang et al.,
    2023).

    >>> import numpy as np, cudcn
    >>> x, mask = np.ones((1, 8, 8, 16), np.float32), np.zeros((1, 8, 8, 36), np.float32)
    >>> cudcn.dcnv3(x, np.zeros((1, 8, 8, 72), np.float32), mask, softmax=True).shape
    (1, 8, 8, 16)
    """
    return OP(
        input, offset, mask,
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, group=group,
        offset_scale=offset_scale, remove_center=remove_center, softmax=softmax,
    )  # fmt: skip


class DCNv3Gradients(NamedTuple):
    """One gradient per tensor of `dcnv3`, each of its tensor's shape and dtype."""

    input: Any
    offset: Any
    mask: Any


def dcnv3_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any,
    *,
    kernel_size: Pair = 3,
    stride: Pair = 1,
    padding: Padding = 1,
    dilation: Pair = 1,
    group: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> DCNv3Gradients:
    """The gradients of `sum(grad_output * dcnv3(...))`; of the logits with `softmax=True`.

    `grad_output` has the output's shape and dtype; the rest is as in `dcnv3`. The result is deterministic, on
    CUDA too.
    """
    return OP.backward_of(
        grad_output, input, offset, mask,
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, group=group,
        offset_scale=offset_scale, remove_center=remove_center, softmax=softmax,
    )  # fmt: skip


def _canonical(**attributes: Any) -> dict[str, Any]:
    return canonical("dcnv3", **attributes)


def _geometry(specs: tuple[Any, ...], **attributes: Any) -> Windows:
    name = "dcnv3"
    input, offset, mask = specs
    geometry = windows(name, input, **attributes, packed=False)
    for tensor, spec, per_sample in (("offset", offset, 2), ("mask", mask, 1)):
        check.same_dtype(name, tensor, spec, input.dtype, or_float32=True)
        channels = geometry.groups * geometry.samples * per_sample
        axes = "(N, H_out, W_out, group * P" + (" * 2)" if per_sample == 2 else ")")
        check.shape(name, tensor, spec, axes, (geometry.batch, *geometry.queries, channels))
    return geometry


OP = Op(dcnv3, dcnv3_backward, DCNv3Gradients, _canonical, _geometry, cpu, cuda, may_be_float32=("offset", "mask"))
