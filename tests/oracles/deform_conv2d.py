"""A slow, obvious loop of deform_conv2d in float64. Written from the papers' formulas, not from the fast code."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bilinear import bilinear


def deform_conv2d(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any, stride: Any, padding: Any, dilation: Any
) -> np.ndarray:
    """NCHW; stride and dilation are pairs, padding is ((top, bottom), (left, right))."""
    input, offset, weight = (np.asarray(a, np.float64) for a in (input, offset, weight))
    batch, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    (top, bottom), (left, right) = padding
    out_height = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = np.zeros((batch, out_channels, out_height, out_width))
    for n, o, oy, ox in np.ndindex(out.shape):
        total = 0.0 if bias is None else float(bias[o])
        for cg, i, j in np.ndindex(group_channels, kh, kw):
            c = o // (out_channels // groups) * group_channels + cg
            sample = (c // (channels // offset_groups) * kh + i) * kw + j
            y = oy * stride[0] - top + i * dilation[0] + offset[n, 2 * sample, oy, ox]
            x = ox * stride[1] - left + j * dilation[1] + offset[n, 2 * sample + 1, oy, ox]
            modulation = 1.0 if mask is None else float(mask[n, sample, oy, ox])
            total += weight[o, cg, i, j] * modulation * bilinear(input[n, c], y, x)
        out[n, o, oy, ox] = total
    return out
