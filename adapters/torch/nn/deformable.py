"""`deformable_`: a network's ordinary convolutions made deformable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

import torch

from .deform_conv2d_of_mmcv import ModulatedDeformConv2dPack


def deformable_(model: torch.nn.Module, stages: Iterable[str] = ("layer2", "layer3", "layer4")) -> list[str]:
    """Puts a ModulatedDeformConv2dPack into the place of every 3x3 convolution of these stages, in place.

    The default is a torchvision ResNet's conv3 to conv5, where DCNv2 has them. A stage is any module's name, such as
    "backbone.body.layer3". The weight and the bias stay, as the same parameters. As in DCNv2 the new module samples
    where the old one did, each tap at half weight: until it learns otherwise it computes half of what the old one did
    (which a batch norm behind it takes out again when it trains, and double weights would, too). Only a plain
    torch.nn.Conv2d that pads with zeros is replaced, no subclass, and none under a weight norm; hooks do not stay.

    Returns:
        the names of the modules that were replaced, such as "layer2.0.conv2".

    Raises:
        ValueError: the model has no such stage, or there is nothing to replace; the model is as it was.
        TypeError: `model` is no module.

    Paper: Deformable ConvNets v2: More Deformable, Better Results (Zhu et al., 2019), section 3.1.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"deformable_: model must be a torch.nn.Module, got {type(model).__name__}")
    stages = [stages] if isinstance(stages, str) else list(stages)
    modules = dict(model.named_modules())
    if unknown := [stage for stage in stages if not stage or stage not in modules]:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"deformable_: stages must be names of modules, got {unknown}, where there are {children}")
    found = {name: conv for stage in stages for name, conv in _convolutions(stage, modules[stage])}
    if not found:
        raise ValueError(f"deformable_: no 3x3 convolution in {', '.join(stages)} of {type(model).__name__}")
    swapped = {conv: _deformable(conv) for conv in found.values()}  # one for a convolution of two names
    for name, conv in found.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, swapped[conv])
    return list(found)


def _convolutions(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Conv2d]]:
    if _is_plain(module):
        yield name, module
    elif not isinstance(module, ModulatedDeformConv2dPack):  # whose own conv_offset stays as it is
        for child, inner in module.named_children():
            yield from _convolutions(f"{name}.{child}", inner)


def _is_plain(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    if type(module) is not torch.nn.Conv2d or module.kernel_size != (3, 3) or module.padding_mode != "zeros":
        return False
    return {name for name, _ in module.named_parameters()} <= {"weight", "bias"}  # not so under a weight norm


def _deformable(conv: torch.nn.Conv2d) -> ModulatedDeformConv2dPack:
    new = ModulatedDeformConv2dPack(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    for name, parameter in conv.named_parameters():
        setattr(new, name, parameter)
    return new.train(conv.training)
