"""What `torch.onnx.export(..., dynamo=True)` writes for an operator: nodes of ONNX's own, which any runtime has.

deform_conv2d is ONNX's DeformConv, of opset 19 on; the others are their formulas.
"""

from __future__ import annotations

from typing import Any

import torch

from cudcn.op import Op

from . import formulas


def compute(op: Op, *arguments: Any) -> torch.Tensor:
    """The output for the arguments of the operator in `torch.ops.cudcn`."""
    if op.name == "deform_conv2d":
        return _deform_conv(op, *arguments)
    if op.name == "deform_roi_pool" and formulas.geometry(op, *arguments).samples == 0:
        raise ValueError("deform_roi_pool: sampling_ratio must be above 0 for torch.onnx.export, got 0")
    return formulas.compute(op, *arguments)


def _deform_conv(
    op: Op, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, stride: Any, padding: Any, dilation: Any,
    layout: str,
) -> torch.Tensor:  # fmt: skip
    g = formulas.geometry(op, input, offset, weight, bias, mask, stride, padding, dilation, layout)
    # ONNX has one type for all; its DeformConv is that of channels first
    images = [None if t is None else t.to(input.dtype) for t in (input, offset, mask)]
    if layout == "NHWC":
        images = [None if t is None else t.permute(0, 3, 1, 2) for t in images]
    input, offset, mask = images
    top, bottom, left, right = padding
    attributes = {
        "dilations": list(dilation), "group": g.groups, "kernel_shape": list(g.kernel),
        "offset_group": g.offset_groups, "pads": [top, left, bottom, right], "strides": list(stride),
    }  # fmt: skip
    output = torch.onnx.ops.symbolic(
        "DeformConv", (input, weight, offset, bias, mask), attributes, dtype=input.dtype,
        shape=(g.batch, g.out_channels, g.out_height, g.out_width), version=19,
    )  # fmt: skip
    return output if layout == "NCHW" else output.permute(0, 2, 3, 1)
