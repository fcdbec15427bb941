"""The operators on PyTorch tensors: differentiable, seen by torch.compile and torch.func, without copies.

`torch.func.vmap` makes one call, and second derivatives are computed by formulas.py, slowly and with all samples in
memory. `torch.onnx.export(..., dynamo=True)` writes ONNX's own nodes. There is no forward mode (`torch.func.jvp`).
Tensors that say
where to look and have no gradient (rois, spatial_shapes, level_start_index) may be NumPy arrays, which are copied.
"""

from cudcn import ops

from .bind import bind, run as run, run_backward as run_backward
from .compat import patch as patch
from .nn import (
    DCNv3 as DCNv3,
    DCNv4 as DCNv4,
    DeformConv2d as DeformConv2d,
    DeformConv2dPack as DeformConv2dPack,
    DeformPSRoIPool as DeformPSRoIPool,
    DeformRoIPool as DeformRoIPool,
    DeformRoIPoolPack as DeformRoIPoolPack,
    FlashDeformAttn as FlashDeformAttn,
    ModulatedDeformConv2d as ModulatedDeformConv2d,
    ModulatedDeformConv2dPack as ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack as ModulatedDeformRoIPoolPack,
    MSDeformAttn as MSDeformAttn,
    deformable_ as deformable_,
)

dcnv3, dcnv3_backward = bind(ops.dcnv3.OP)
dcnv4, dcnv4_backward = bind(ops.dcnv4.OP)
deform_conv2d, deform_conv2d_backward = bind(ops.deform_conv2d.OP)
deform_psroi_pool, deform_psroi_pool_backward = bind(ops.deform_psroi_pool.OP)
deform_roi_pool, deform_roi_pool_backward = bind(ops.deform_roi_pool.OP)
ms_deform_attn, ms_deform_attn_backward = bind(ops.ms_deform_attn.OP)
psroi_pool, psroi_pool_backward = bind(ops.psroi_pool.OP)
roi_avg_pool, roi_avg_pool_backward = bind(ops.roi_avg_pool.OP)
