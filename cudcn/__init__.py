"""Deformable operators for every array framework: NumPy, CuPy, PyTorch and JAX."""

from .ops.dcnv3 import dcnv3 as dcnv3, dcnv3_backward as dcnv3_backward
from .ops.dcnv4 import dcnv4 as dcnv4, dcnv4_backward as dcnv4_backward
from .ops.deform_conv2d import deform_conv2d as deform_conv2d, deform_conv2d_backward as deform_conv2d_backward
from .ops.deform_psroi_pool import (
    deform_psroi_pool as deform_psroi_pool,
    deform_psroi_pool_backward as deform_psroi_pool_backward,
)
from .ops.deform_roi_pool import (
    deform_roi_pool as deform_roi_pool,
    deform_roi_pool_backward as deform_roi_pool_backward,
)
from .ops.ms_deform_attn import ms_deform_attn as ms_deform_attn, ms_deform_attn_backward as ms_deform_attn_backward
from .ops.psroi_pool import psroi_pool as psroi_pool, psroi_pool_backward as psroi_pool_backward
from .ops.roi_avg_pool import roi_avg_pool as roi_avg_pool, roi_avg_pool_backward as roi_avg_pool_backward

__version__ = "0.1.0"
