"""torch.nn modules over the operators, after those who made them, and `deformable_` for a network that has none.

torch.fx cannot look into an operator, nor decide about a shape: with `torch.fx.wrap` its graph has the call itself.
"""

from .dcn import DCNv3 as DCNv3, DCNv4 as DCNv4
from .deform_conv2d import DeformConv2d as DeformConv2d
from .deform_conv2d_of_mmcv import (
    DeformConv2dPack as DeformConv2dPack,
    ModulatedDeformConv2d as ModulatedDeformConv2d,
    ModulatedDeformConv2dPack as ModulatedDeformConv2dPack,
)
from .deformable import deformable_ as deformable_
from .ms_deform_attn import FlashDeformAttn as FlashDeformAttn, MSDeformAttn as MSDeformAttn
from .psroi_pool import DeformPSRoIPool as DeformPSRoIPool
from .roi_pool import (
    DeformRoIPool as DeformRoIPool,
    DeformRoIPoolPack as DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack as ModulatedDeformRoIPoolPack,
)
