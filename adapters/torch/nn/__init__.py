"""torch.nn modules over the operators."""

from .dcn import DCNv3, DCNv4
from .deform_conv2d import DeformConv2d, ModulatedDeformConv2d
from .ms_deform_attn import MSDeformAttn

__all__ = ["DCNv3", "DCNv4", "DeformConv2d", "MSDeformAttn", "ModulatedDeformConv2d"]
