"""The operators on JAX arrays: differentiable once, under jit, grad and vmap, without copies or callbacks."""

from .. import ops
from .bind import bind

__all__ = ["deform_conv2d", "deform_conv2d_backward"]

deform_conv2d, deform_conv2d_backward = bind(ops.deform_conv2d.OP)
