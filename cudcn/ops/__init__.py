"""One module per operator: the public pair of functions, its checks, and `OP`."""

from . import (
    dcnv3,
    dcnv4,
    deform_conv2d,
    deform_psroi_pool,
    deform_roi_pool,
    ms_deform_attn,
    psroi_pool,
    roi_avg_pool,
)

# For the tests and `python -m cudcn kernels`; nothing else looks an operator up here.
OPS = (
    dcnv3.OP,
    dcnv4.OP,
    deform_conv2d.OP,
    deform_psroi_pool.OP,
    deform_roi_pool.OP,
    ms_deform_attn.OP,
    psroi_pool.OP,
    roi_avg_pool.OP,
)
