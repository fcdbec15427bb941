"""Deformable convolution v4."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Padding, Pair
from ..cpu import aggregate as cpu
from ..cuda import aggregate as cuda
from ..geometry import Windows, ceil_div
from ..op import Op
from .aggregate import canonical, windows

_MULTIPLE = 8  # of the packed tensor's channels


def dcnv4(
    input: Any,
    offset_mask: Any,
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
    """Deformable convolution v4: `dcnv3` with offsets and weights in one tensor, and weights of any size.

    The formula, the order of the taps, the borders, what NaN does and the attributes are those of `dcnv3`.

    Args:
        input: (N, H, W, C); float16, bfloat16, float32 or float64.
        offset_mask: (N, H_out, W_out, K). Group g's part begins at channel g * 3 * P, with
            P = kh * kw - remove_center taps: dx and dy of each tap in turn, then P weights. K is
            group * 3 * P rounded up to a multiple of 8; what is left at the end is not read, and its gradient is 0.
        kernel_size: an int or (h, w).
        stride: an int or (h, w).
        padding: an int, or (h, w), each of them an int or a pair: ((top, bottom), (left, right)).
        dilation: an int or (h, w).
        group: into how many groups the channels are split, each with its own offsets and weights.
        offset_scale: stretches the window, offsets included, about its middle.
        remove_center: leaves out the middle tap; for square kernels of odd size above 1.
        softmax: take the weights as logits, and normalise them over the taps. (DCNv4 has none.)

    Both tensors have one dtype, but beside half-precision data `offset_mask` may be float32. Positions, weights
    and sums are float32 for half types (float64 for float64).

    Returns:
        (N, H_out, W_out, C), of input's kind and dtype, with
        H_out = (H + top + bottom - dilation_h * (kh - 1) - 1) // stride_h + 1. Torch tensors and JAX arrays are
        differentiable with respect to both tensors: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above.
        TypeError: a dtype does, or the tensors are of different frameworks.

    Paper: Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications (Xiong et
    al., 2024).

    >>> import numpy as np, cudcn
    >>> cudcn.dcnv4(np.ones((1, 8, 8, 16), np.float32), np.zeros((1, 8, 8, 112), np.float32)).shape
    (1, 8, 8, 16)
    """
    return OP(
        input, offset_mask,
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, group=group,
        offset_scale=offset_scale, remove_center=remove_center, softmax=softmax,
    )  # fmt: skip


class DCNv4Gradients(NamedTuple):
    """One gradient per tensor of `dcnv4`, each of its tensor's shape and dtype."""

    input: Any
    offset_mask: Any


def dcnv4_backward(
    grad_output: Any,
    input: Any,
    offset_mask: Any,
    *,
    kernel_size: Pair = 3,
    stride: Pair = 1,
    padding: Padding = 1,
    dilation: Pair = 1,
    group: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> DCNv4Gradients:
    """The gradients of `sum(grad_output * dcnv4(...))`; of the logits with `softmax=True`.

    `grad_output` has the output's shape and dtype; the rest is as in `dcnv4`. The result is deterministic, on
    CUDA too.
    """
    return OP.backward_of(
        grad_output, input, offset_mask,
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, group=group,
        offset_scale=offset_scale, remove_center=remove_center, softmax=softmax,
    )  # fmt: skip


def _canonical(**attributes: Any) -> dict[str, Any]:
    return canonical("dcnv4", **attributes)


def _geometry(specs: tuple[Any, ...], **attributes: Any) -> Windows:
    name = "dcnv4"
    input, offset_mask = specs
    geometry = windows(name, input, **attributes, packed=True)
    check.same_dtype(name, "offset_mask", offset_mask, input.dtype, or_float32=True)
    channels = ceil_div(geometry.groups * geometry.samples * 3, _MULTIPLE) * _MULTIPLE
    axes = "(N, H_out, W_out, group * P * 3 rounded up to a multiple of 8)"
    check.shape(name, "offset_mask", offset_mask, axes, (geometry.batch, *geometry.queries, channels))
    return geometry


OP = Op(dcnv4, dcnv4_backward, DCNv4Gradients, _canonical, _geometry, cpu, cuda, may_be_float32=("offset_mask",))
