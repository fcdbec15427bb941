"""Deformable operators for every array framework: NumPy, CuPy, PyTorch and JAX."""

from .ops.deform_conv2d import deform_conv2d, deform_conv2d_backward

__all__ = ["deform_conv2d", "deform_conv2d_backward"]
__version__ = "0.1.0"
