"""The operators on PyTorch tensors: differentiable once, seen by torch.compile and torch.func, without copies.

There is no forward mode (`torch.func.jvp`), and `torch.func.vmap` calls one item after the other. Tensors that say
where to look and have no gradient (rois, spatial_shapes, level_start_index) may be NumPy arrays, which are copied.
"""

from .. import ops
from .bind import bind
from .nn import DCNv3, DCNv4, DeformConv2d, ModulatedDeformConv2d, MSDeformAttn

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "MSDeformAttn",
    "ModulatedDeformConv2d",
    "dcnv3",
    "dcnv3_backward",
    "dcnv4",
    "dcnv4_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_psroi_pool",
    "deform_psroi_pool_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "psroi_pool",
    "psroi_pool_backward",
    "roi_avg_pool",
    "roi_avg_pool_backward",
]

dcnv3, dcnv3_backward = bind(ops.dcnv3.OP)
dcnv4, dcnv4_backward = bind(ops.dcnv4.OP)
deform_conv2d, deform_conv2d_backward = bind(ops.deform_conv2d.OP)
deform_psroi_pool, deform_psroi_pool_backward = bind(ops.deform_psroi_pool.OP)
deform_roi_pool, deform_roi_pool_backward = bind(ops.deform_roi_pool.OP)
ms_deform_attn, ms_deform_attn_backward = bind(ops.ms_deform_attn.OP)
psroi_pool, psroi_pool_backward = bind(ops.psroi_pool.OP)
roi_avg_pool, roi_avg_pool_backward = bind(ops.roi_avg_pool.OP)
