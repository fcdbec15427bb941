"""torch.nn modules over the operators."""

from .dcn import DCNv3 as DCNv3, DCNv4 as DCNv4
from .deform_conv2d import DeformConv2d as DeformConv2d, ModulatedDeformConv2d as ModulatedDeformConv2d
from .ms_deform_attn import MSDeformAttn as MSDeformAttn
