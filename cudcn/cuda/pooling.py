"""The RoI pooling operators on a GPU: one thread a bin and a few channels. See kernels_cu/pooling.cu.

The input's gradient has one thread a pixel and a few channels. See kernels_cu/pooling_backward_input.cu.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import launch, sources
from ..dtypes import DTYPES, arithmetic
from ..geometry import RoIPooling, ceil_div
from ..launch import ctype, strides
from ..plan import Kernel, Plan, View
from . import sort
from .sort import Segments

_THREADS = sources.constant("pooling", "THREADS")
_BINS = sources.constant("pooling", "BINS")
_SLAB = sources.constant("pooling.cuh", "SLAB_BYTES")
_LANES = 8  # threads that share a bin's channels at most, where neighbouring ones are on neighbouring bins
_TILE = sources.constant("pooling_backward_input", "TILE")
_SLICES = sources.constant("pooling_backward_input", "SLICES")
_POOLING = sources.Struct("pooling.cuh", "Pooling")
_PLANES = sources.Struct("pooling_backward_input", "Planes")
_LISTED: dict[type, sources.Struct] = {
    dtype: sources.Struct("pooling_backward_input", "Listed", A=dtype) for dtype in (np.float32, np.float64)
}


def kernels() -> list[Kernel]:
    """Every instance that the four operators can launch."""
    kinds = ("Average", "DeformRoI", "DeformPSRoI")
    names = [("pool", kind) for kind in kinds] + [("pool_backward_offset", kind) for kind in kinds[1:]]
    of_input = itertools.product(("pool_count", "pool_records", "pool_backward_input"), kinds)
    return [
        *(
            _kernel(name, dtype.ctype, kind, vector)
            for (name, kind), dtype in itertools.product(names, DTYPES.values())
            for vector in (1, 16 // dtype.size)
        ),
        *(_kernel(name, dtype.ctype, kind) for (name, kind), dtype in itertools.product(of_input, DTYPES.values())),
        *sort.kernels(),
    ]


def forward(
    plan: Plan, g: RoIPooling, outs: Sequence[View], input: View, rois: View, offset: Any = None, mask: Any = None
) -> None:
    (out,) = outs
    positions = _positions(plan, input, rois, offset, mask)
    _launch(plan, g, "pool", input, input, strides(input), *positions, out, strides(out))


def backward(
    plan: Plan,
    g: RoIPooling,
    grads: Sequence[Any],
    grad_output: View,
    input: View,
    rois: View,
    offset: Any = None,
    mask: Any = None,
) -> None:
    grad_input, _, grad_offset, grad_mask = (*grads, None, None)[:4]
    positions = _positions(plan, input, rois, offset, mask)
    gradient = grad_output, strides(grad_output)
    if grad_input is not None and grad_input.size > 0:
        # a bin's gradient / divisor * mask, times its samples' weights, to their pixels
        _backward_input(plan, g, grad_input, *gradient, *positions)
    if grad_offset is not None or grad_mask is not None:  # a bin's own, which parts of several bins add up
        bins = (g.rois, 2 * g.classes, *g.output_size)
        offset_sums = None if grad_offset is None else _sums(plan, input, grad_offset, bins)
        mask_sums = None if grad_mask is None else _sums(plan, input, grad_mask, grad_mask.shape)
        _launch(
            plan, g, "pool_backward_offset", input,
            *gradient, input, strides(input), *positions, offset_sums, mask_sums,
        )  # fmt: skip
        if offset_sums is not None and grad_offset is not offset_sums:
            _add_parts(plan, g, grad_offset, offset_sums)
        if mask_sums is not None and grad_mask is not mask_sums:
            plan.copy(grad_mask, mask_sums)


def _positions(plan: Plan, input: View, *tensors: Any) -> list[Any]:
    """rois, offset and mask: contiguous, of the type of positions and sums. Those that are so are not copied."""
    dtype = arithmetic(input)
    return [None if t is None else plan.contiguous(t, dtype) for t in tensors]


def _channels_last(g: RoIPooling, image: View) -> bool:
    """Whether neighbouring threads go to neighbouring channels; those of a bin are no neighbours if it has a group."""
    return g.group_size == (1, 1) and g.channels > 1 and image.strides[1] == image.itemsize


def _backward_input(plan: Plan, g: RoIPooling, grad_input: View, *args: Any) -> None:
    """Sorts the bins of some classes at a time, and gathers from them. `args`: grad_output, its strides, positions."""
    dtype = arithmetic(grad_input)
    grad_output, grad_output_strides, *positions = args
    planes, cells = g.batch * math.prod(g.group_size), _grid_cells(g.height, g.width)
    a_class = Segments(1, planes * cells, g.rois * math.prod(g.output_size))
    slabs = ceil_div(g.out_channels // g.classes, _SLICES * _SLAB // np.dtype(dtype).itemsize)
    blocks = planes * slabs * ceil_div(g.height, _TILE) * ceil_div(g.width, _TILE)
    if blocks > launch.LARGEST_GRID:
        raise ValueError(f"{g.name}: the input's gradient needs {blocks} blocks, CUDA takes {launch.LARGEST_GRID}")
    record = int(_LISTED[dtype].dtype.itemsize)
    step = min(a_class.at_a_time(g.name, record), launch.LARGEST_GRID // blocks)
    pooling = _pooling(g, channels_last=False, tiles=0, slabs=0)
    kernels = [_kernel(name, ctype(grad_input), g.kind) for name in ("pool_count", "pool_records")]
    for first in range(0, g.classes, step):
        classes = min(step, g.classes - first)
        some = _PLANES(cells=cells, first_class=first, classes=classes)
        arguments = *positions, grad_output_strides, pooling, some
        with plan.reused():
            lists = sort.sort(plan, a_class.times(classes), record, *kernels, *arguments)
            plan.launch(
                _kernel("pool_backward_input", ctype(grad_input), g.kind), classes * blocks,
                (_TILE * _TILE * _SLICES, 1), grad_output, grad_output_strides, *lists, grad_input, strides(grad_input),
                pooling, some,
            )  # fmt: skip


def _grid_cells(height: int, width: int) -> int:
    """Of all grids of a plane, from cells of a tile to one that is no smaller than the image: `Grid` in the kernel."""
    cells, size = 0, _TILE
    while True:
        cells += (ceil_div(height, size) + 1) * (ceil_div(width, size) + 1)
        if size >= max(height, width):
            return cells
        size *= 2


def _vector(g: RoIPooling, input: View) -> int:
    """How many neighbouring channels a thread reads at once: 16 bytes, if all pixels and classes allow it, else one."""
    vector = 16 // input.itemsize
    channels = g.out_channels // g.classes
    aligned = _channels_last(g, input) and channels % vector == 0 and input.alignment == 16
    return vector if aligned and all(stride % 16 == 0 for stride in input.strides[::2] + input.strides[3:]) else 1


def _sums(plan: Plan, input: View, grad: View, shape: tuple[int, ...]) -> View:
    """`grad` itself, if the kernel can write to it."""
    dtype = arithmetic(input)
    return grad if grad.dtype == dtype and grad.shape == shape and grad.is_contiguous else plan.empty(shape, dtype)


def _add_parts(plan: Plan, g: RoIPooling, grad: View, bins: View) -> None:
    """grad = the sums over each part's bins, in float64 and always in one order."""
    if g.part_size == g.output_size:
        plan.copy(grad, bins)
        return
    # along one axis, and then along the other
    rows = plan.zeros((*bins.shape[:2], g.part_size[0], g.output_size[1]), np.float64)
    parts = plan.zeros((*bins.shape[:2], *g.part_size), np.float64)

    def add(grad: Any, bins: Any, rows: Any, parts: Any) -> None:
        for row in range(g.output_size[0]):
            rows[:, :, row * g.part_size[0] // g.output_size[0]] += bins[:, :, row]
        for column in range(g.output_size[1]):
            parts[..., column * g.part_size[1] // g.output_size[1]] += rows[..., column]
        grad[...] = parts

    plan.run(add, grad, bins, rows, parts)


def _launch(plan: Plan, g: RoIPooling, name: str, input: View, *args: Any) -> None:
    channels, channels_last, vector = g.out_channels // g.classes, _channels_last(g, input), _vector(g, input)
    # `slab`: how many channels of a bin a thread sums in all; `alone`: how many before another thread joins in
    if name == "pool":
        slab = _SLAB // np.dtype(arithmetic(input)).itemsize
        # of channels that are read one by one, neighbours share a cache line
        alone = 1 if channels_last and vector == 1 else slab
    else:
        slab, alone = channels, vector
    lanes = min(32 if channels_last else _LANES, 1 << (ceil_div(channels, alone) - 1).bit_length())
    bins = min(_THREADS // lanes, _BINS)
    slabs = ceil_div(channels, lanes * slab)
    tiles = ceil_div(g.rois * math.prod(g.output_size), bins)
    grid = tiles * slabs * g.classes
    if grid > launch.LARGEST_GRID:
        raise ValueError(f"{g.name}: {g.rois} rois need {grid} blocks of threads, CUDA takes {launch.LARGEST_GRID}")
    pooling = _pooling(g, channels_last=channels_last, tiles=tiles, slabs=slabs)
    block = (lanes, bins) if channels_last else (bins, lanes)
    kernel = _kernel(name, ctype(input), g.kind, vector)
    plan.launch(kernel, grid, block, *args, pooling)


def _pooling(g: RoIPooling, **launched: Any) -> np.ndarray:
    return _POOLING(
        spatial_scale=g.spatial_scale, offset_unit=g.offset_unit,
        images=g.batch, height=g.height, width=g.width, rois=g.rois,
        rows=g.output_size[0], columns=g.output_size[1], group_rows=g.group_size[0], group_columns=g.group_size[1],
        part_rows=g.part_size[0], part_columns=g.part_size[1], classes=g.classes,
        class_channels=g.out_channels // g.classes, samples=g.samples, **launched,
    )  # fmt: skip


@functools.cache
def _kernel(name: str, dtype: str, kind: str, *vector: int) -> Kernel:
    """Those of the input's gradient, in a file of their own, read no vectors of the input."""
    template = ", ".join([dtype, kind, *map(str, vector)])
    return Kernel("pooling" if vector else "pooling_backward_input", f"{name}<{template}>")
