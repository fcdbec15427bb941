"""torch.func.vmap's rule: one call for all items along the mapped axis, which is folded into another.

That is the batch; or the groups, where each item of a deform_conv2d has weights of its own, or a gradient of them.
Levels of its own for each item (`spatial_shapes`, `level_start_index`) are the one thing that no call has an axis for:
there the items are computed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cudcn.op import Op

_WEIGHTS = ("weight", "bias")
_LEVELS = ("spatial_shapes", "level_start_index")

Results = tuple[list[torch.Tensor], list[int]]  # and the axis of each that is mapped


def forward(op: Op, call: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """The operator of `size` items: its output, and the axis of it that is mapped."""
    (output,), (dim,) = _results(op, list(op.tensors), lambda *a: [call(*a)], size, in_dims, arguments, wanted=())
    return output, dim


def backward(op: Op, call: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Results:
    """Its backward's gradients alike. The last argument says which are wanted, also of what is not mapped itself."""
    wanted = [name for name, need in zip(op.tensors, arguments[-1], strict=True) if need]
    return _results(op, list(op.backward_tensors), call, size, in_dims, arguments, wanted)


def _results(
    op: Op, names: list[str], call: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any],
    wanted: Sequence[str],
) -> Results:  # fmt: skip
    if size == 0:
        raise NotImplementedError(f"{op.name}: vmap over an axis of length 0 is not implemented")
    tensors, attributes = dict(zip(names, arguments, strict=False)), arguments[len(names) :]
    dims = {name: dim for name, dim in zip(names, in_dims, strict=False) if tensors[name] is not None}
    of_each_item = {name for name in dims if dims[name] is not None or name in wanted}
    if not of_each_item.isdisjoint(_LEVELS):
        return _one_by_one(call, size, dims, tensors, attributes)

    axis = 0
    shared = {*_WEIGHTS, *_LEVELS}
    if not of_each_item.isdisjoint(_WEIGHTS):
        axis = attributes[list(op.attributes).index("layout")].index("C")
        shared = set()
    elif "rois" in names and "input" not in of_each_item:
        shared = {"input"}
    folded = {
        name: _fold(tensors[name], dim, 0 if name in _WEIGHTS else axis, size) if name not in shared else tensors[name]
        for name, dim in dims.items()
    }
    if "rois" in names and "input" not in shared:
        folded["rois"] = _of_images(folded["rois"], size, folded["input"].shape[0] // size)
    results = call(*({**tensors, **folded}[name] for name in names), *attributes)
    axes = [0 if name in _WEIGHTS else axis for name in wanted or ["output"]]
    return [r.unflatten(a, (size, r.shape[a] // size)) for r, a in zip(results, axes, strict=True)], axes


def _fold(tensor: torch.Tensor, dim: int | None, axis: int, size: int) -> torch.Tensor:
    """Each item's part of `axis` after that of the item before."""
    if dim is None:
        apart = tensor.unsqueeze(axis)
        apart = apart.expand(*apart.shape[:axis], size, *apart.shape[axis + 1 :])
    else:
        apart = tensor.movedim(dim, axis)
    return apart.flatten(axis, axis + 1)


def _of_images(rois: torch.Tensor, size: int, batch: int) -> torch.Tensor:
    """Rois of images in a batch that has been folded; those of no image of their item stay so."""
    if rois.dtype in (torch.float16, torch.bfloat16):  # which do not hold all numbers of images
        rois = rois.float()
    image, corners = rois[:, :1], rois[:, 1:]
    first = batch * torch.arange(size, dtype=rois.dtype, device=rois.device)
    moved = image + first.repeat_interleave(image.shape[0] // size)[:, None]
    return torch.cat([torch.where((image >= 0) & (image < batch), moved, -1), corners], 1)


def _one_by_one(
    call: Callable[..., Any], size: int, dims: dict[str, Any], tensors: dict[str, Any], attributes: Sequence[Any]
) -> Results:
    items = [
        call(*(t if dims.get(n) is None else t.select(dims[n], i) for n, t in tensors.items()), *attributes)
        for i in range(size)
    ]
    stacked = [torch.stack(results) for results in zip(*items, strict=True)]
    return stacked, [0] * len(stacked)
