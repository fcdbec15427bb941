"""The operators on PyTorch tensors: differentiable once, seen by torch.compile, without copies."""

from .. import ops
from .bind import bind
from .nn import DeformConv2d, ModulatedDeformConv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d", "deform_conv2d", "deform_conv2d_backward"]

deform_conv2d, deform_conv2d_backward = bind(ops.deform_conv2d.OP)
