"""Deformable convolution, v1 and v2."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import check
from ..check import Padding, Pair
from ..cpu import deform_conv2d as cpu
from ..cuda import deform_conv2d as cuda
from ..geometry import Convolution, Spec
from ..op import Op


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    layout: str = "NCHW",
) -> Any:
    """2-D deformable convolution: v1 without `mask`, v2 (modulated) with it.

    Each tap of the kernel reads the input at its own displaced, fractional place::

        out[n, o, y, x] = bias[o] + sum over c, i, j of
            weight[o, c, i, j] * mask[n, g, i, j, y, x] * bilinear(input[n, c], py, px)

        py = y * stride_h - top  + i * dilation_h + dy[n, g, i, j, y, x]
        px = x * stride_w - left + j * dilation_w + dx[n, g, i, j, y, x]

    where g is the offset group of channel c. Outside the image the input counts as 0, so a sample fades out
    over one pixel beyond the border. Where py <= -1 or py >= H (px alike), or the offset is NaN or infinite, it is
    left out: it adds nothing and gets no gradient, even if its mask or grad_output is NaN. (But products with the
    weights, and the weight's gradient, are matrix products, and 0 times NaN is NaN there.) Any other sample takes
    all four pixels around it, so that a NaN counts at weight 0 too. The gradient of a position is the slope of the
    cell [floor(p), floor(p) + 1], at whole numbers too, and at exactly -1, where there is no other
    gradient.

    Args:
        input: (N, C_in, H, W); float16, bfloat16, float32 or float64.
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out), in pixels. Channel
            ((g * kh + i) * kw + j) * 2 holds dy, the next one dx.
        weight: (C_out, C_in // groups, kh, kw).
        bias: (C_out,), or None.
        mask: (N, offset_groups * kh * kw, H_out, W_out), or None for all ones.
        stride: an int or (h, w).
        padding: an int, or (h, w), each of them an int or a pair: ((top, bottom), (left, right)).
        dilation: an int or (h, w).
        layout: "NCHW", or "NHWC" for channels last in input, offset, mask and output; weight stays as it is.

    `groups` and `offset_groups` follow from the shapes. All tensors have one dtype, but beside half-precision
    data offset and mask may be float32. Positions and sums are float32 for half types (float64 for float64). On CUDA
    the factors of their matrix products are rounded to the data's type, too, among them samples times their mask
    (which float16 must hold), for some 1.4 times the error of rounding the results alone. Those of float32 are rounded
    to TF32 where the caller has chosen so: with torch's `set_float32_matmul_precision`, or CuPy's CUPY_TF32=1.

    Returns:
        (N, C_out, H_out, W_out), of input's kind and dtype, with
        H_out = (H + top + bottom - dilation_h * (kh - 1) - 1) // stride_h + 1. Torch tensors and JAX arrays are
        differentiable with respect to every tensor: torch's as often as wanted, JAX's once.

    Raises:
        ValueError: a shape, an attribute or a device breaks one of the rules above.
        TypeError: a dtype does, or the tensors are of different frameworks.

    Papers: Deformable Convolutional Networks (Dai et al., 2017); Deformable ConvNets v2 (Zhu et al., 2019).

    >>> import numpy as np, cudcn
    >>> x, w = np.ones((1, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    >>> cudcn.deform_conv2d(x, np.zeros((1, 18, 6, 6), np.float32), w).shape
    (1, 4, 6, 6)
    """
    return OP(input, offset, weight, bias, mask, stride=stride, padding=padding, dilation=dilation, layout=layout)


class DeformConv2dGradients(NamedTuple):
    """One gradient per tensor of `deform_conv2d`, each of its tensor's shape and dtype."""

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def deform_conv2d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    layout: str = "NCHW",
) -> DeformConv2dGradients:
    """The gradients of `sum(grad_output * deform_conv2d(...))`; None for a bias or mask that is None.

    `grad_output` has the output's shape and dtype; the rest is as in `deform_conv2d`. The result is deterministic, on
    CUDA too: the input's gradient there is a product of the weights with sums of `grad_output` over the samples that
    touch a pixel. In half types these sums are a factor that is rounded, as above.
    """
    return OP.backward_of(
        grad_output, input, offset, weight, bias, mask,
        stride=stride, padding=padding, dilation=dilation, layout=layout,
    )  # fmt: skip


def _canonical(*, stride: Any, padding: Any, dilation: Any, layout: Any) -> dict[str, Any]:
    name = "deform_conv2d"
    return {
        "stride": check.pair(name, "stride", stride),
        "padding": check.padding(name, padding),
        "dilation": check.pair(name, "dilation", dilation),
        "layout": check.choice(name, "layout", layout, ("NCHW", "NHWC")),
    }


def _geometry(
    specs: tuple[Any, ...],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    layout: str,
) -> Convolution:
    name = "deform_conv2d"
    input, offset, weight, bias, mask = specs
    axes = "(N, C, H, W)" if layout == "NCHW" else "(N, H, W, C)"
    check.rank(name, "input", input, axes)
    check.rank(name, "offset", offset, axes)
    check.rank(name, "weight", weight, "(C_out, C_in // groups, kh, kw)")
    check.floating(name, "input", input)
    check.same_dtype(name, "weight", weight, input.dtype)
    check.same_dtype(name, "offset", offset, input.dtype, or_float32=True)

    batch, channels, height, width = _nchw(input.shape, layout)
    out_channels, group_channels, kh, kw = weight.shape
    if min(channels, group_channels, kh, kw) < 1:
        raise ValueError(
            f"{name}: input's channels and weight's axes after the first must not be empty, "
            f"got input {input.shape}, weight {weight.shape}"
        )
    if channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f"{name}: weight (C_out, C_in // groups, kh, kw) must split input's {channels} channels into groups "
            f"that divide C_out, got {weight.shape}"
        )
    top, bottom, left, right = padding
    out_height = check.window(name, "height", height, top + bottom, kh, stride[0], dilation[0])
    out_width = check.window(name, "width", width, left + right, kw, stride[1], dilation[1])

    if out_height * out_width >= 2**30:
        raise ValueError(f"{name}: an output image must have fewer than 2**30 pixels, got {out_height} x {out_width}")

    offset_channels = _nchw(offset.shape, layout)[1]
    offset_groups = offset_channels // (2 * kh * kw)
    if offset_groups < 1 or offset_channels % (2 * kh * kw) or channels % offset_groups:
        raise ValueError(
            f"{name}: offset must have 2 * offset_groups * kh * kw channels, a multiple of {2 * kh * kw} whose "
            f"offset_groups divide input's {channels} channels, got {offset_channels} in {offset.shape}"
        )

    def image(channels: int) -> tuple[int, ...]:
        by_axis = {"N": batch, "C": channels, "H": out_height, "W": out_width}
        return tuple(by_axis[axis] for axis in layout)

    places = axes.replace("H", "H_out").replace("W", "W_out")
    check.shape(name, "offset", offset, places.replace("C", str(offset_channels)), image(offset_channels))
    if bias is not None:
        check.same_dtype(name, "bias", bias, input.dtype)
        check.shape(name, "bias", bias, "(C_out,)", (out_channels,))
    if mask is not None:
        mask_channels = offset_channels // 2
        check.same_dtype(name, "mask", mask, input.dtype, or_float32=True)
        if len(mask.shape) == 4 and _nchw(mask.shape, layout)[1] != mask_channels:
            raise ValueError(
                f"{name}: mask must have offset's {offset_groups} offset_groups, and so {mask_channels} channels, "
                f"got {_nchw(mask.shape, layout)[1]} in {mask.shape}"
            )
        check.shape(name, "mask", mask, places.replace("C", str(mask_channels)), image(mask_channels))
    return Convolution(
        batch=batch, channels=channels, height=height, width=width, out_channels=out_channels, out_height=out_height,
        out_width=out_width, kernel=(kh, kw), stride=stride, padding=(top, left), dilation=dilation,
        groups=channels // group_channels, offset_groups=offset_groups, layout=layout,
        output=Spec(image(out_channels), input.dtype),
    )  # fmt: skip


def _nchw(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return tuple(shape[layout.index(axis)] for axis in "NCHW")


OP = Op(
    deform_conv2d,
    deform_conv2d_backward,
    DeformConv2dGradients,
    _canonical,
    _geometry,
    cpu,
    cuda,
    may_be_float32=("offset", "mask"),
)
