"""Stand-ins for the compiled modules that other libraries import."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from . import dcnv4, deformable_detr, internimage

_ATTENTION = (deformable_detr.ms_deform_attn_forward, deformable_detr.ms_deform_attn_backward)
_MODULES = {
    "MultiScaleDeformableAttention": _ATTENTION,
    "groundingdino._C": _ATTENTION,
    "DCNv3": (internimage.dcnv3_forward, internimage.dcnv3_backward),
    "DCNv4": (dcnv4.DCNv4, dcnv4.DCNv4Function, dcnv4.FlashDeformAttn, dcnv4.FlashDeformAttnFunction),
    "DCNv4.ext": (
        dcnv4.dcnv4_forward, dcnv4.dcnv4_backward, dcnv4.flash_deform_attn_forward, dcnv4.flash_deform_attn_backward
    ),
}  # fmt: skip


def install() -> list[str]:
    """Puts stand-ins into `sys.modules` for these compiled modules, each unless there is a real one.

    `MultiScaleDeformableAttention` (Deformable DETR, DINO, Mask2Former, MaskDINO), `groundingdino._C`, `DCNv3`
    (InternImage), `DCNv4` and `DCNv4.ext`. To be called before the library's own import. No library is imported.

    Returns:
        the names of those that it put there; of none if called once more.
    """
    lacking = [name for name in _MODULES if not _is_there(name)]
    for name in lacking:
        module = ModuleType(name, f"Stands in for the compiled module {name}: cudcn.torch.compat.install().")
        module.__spec__ = ModuleSpec(name, None)
        for member in _MODULES[name]:
            setattr(module, member.__name__, member)
        sys.modules[name] = module
        package, _, last = name.rpartition(".")
        if package in sys.modules:
            setattr(sys.modules[package], last, module)
    return lacking


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return True
    package, _, _ = name.rpartition(".")
    if not package:
        return importlib.util.find_spec(name) is not None
    # find_spec would import the package
    spec = importlib.util.find_spec(package) if package not in sys.modules else sys.modules[package].__spec__
    locations = spec.submodule_search_locations if spec else None
    return locations is not None and PathFinder.find_spec(name, locations) is not None
