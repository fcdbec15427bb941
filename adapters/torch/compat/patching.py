"""`patch`: a model of another library on this package's operators."""

from __future__ import annotations

import warnings

import torch

from . import dcnv4, deformable_detr, internimage, mmcv, torchvision, transformers
from .replacement import Replacement, swap

REPLACEMENTS: tuple[type[Replacement], ...] = (
    *transformers.REPLACEMENTS, *deformable_detr.REPLACEMENTS, *torchvision.REPLACEMENTS, *mmcv.REPLACEMENTS,
    *internimage.REPLACEMENTS, *dcnv4.REPLACEMENTS,
)  # fmt: skip


def patch(model: torch.nn.Module) -> dict[str, str]:
    """Puts this package's operators into the modules of a model that it knows, in place.

    A module is known by the name of the class that defines its forward, by the names of that forward's parameters and
    by the module's attributes; no library is imported. Its parameters, buffers, names, hooks, mode and class name stay,
    `isinstance` holds, checkpoints load as before, and copies and pickles are patched too.

    Returns:
        the name of each module that was replaced, and what it was, such as
        {"encoder.layers.0.self_attn": "deformable_detr.MSDeformAttn"}. A module that has been replaced before is left
        alone, and not named again.

    Warns:
        UserWarning: a module bears a known name, but differs in a way that may matter; it is left as it is.

    Raises:
        ValueError: there is nothing to replace, and nothing was replaced before.
        TypeError: `model` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    replaced = {}
    for name, module in modules.items():
        if not isinstance(module, Replacement) and (replacement := _replacement(name, module)):
            swap(module, replacement)
            replaced[name] = replacement.kind
    if not any(isinstance(module, Replacement) for module in modules.values()):
        kinds = ", ".join(sorted({replacement.kind for replacement in REPLACEMENTS}))
        raise ValueError(
            f"patch: nothing to replace in {type(model).__name__}, whose modules are {len(modules)}; known are {kinds}"
        )
    return replaced


def _replacement(name: str, module: torch.nn.Module) -> type[Replacement] | None:
    """What replaces the module; None, with a warning if it looks like one of those, but is not."""
    misfits = {}
    for replacement in REPLACEMENTS:
        if replacement.claims(module):
            # an instance's own would hide that of its class
            own = "it has been given a forward of its own" if "forward" in vars(module) else None
            misfit = own or replacement.misfit(module)
            if misfit is None:
                return replacement
            misfits[replacement.kind] = misfit
    if misfits:
        why = "; ".join(f"it might be {kind}, but {misfit}" for kind, misfit in misfits.items())
        warnings.warn(f"patch: {name or 'the model'} is left as it is: {why}", stacklevel=3)
    return None
