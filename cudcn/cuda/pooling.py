"""The RoI pooling operators on a GPU: one thread a bin and a few channels. See kernels_cu/pooling.cu."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from .. import launch, sources
from ..dtypes import DTYPES, arithmetic
from ..geometry import RoIPooling, ceil_div
from ..launch import Kernel, address, ctype, strides

_THREADS = sources.constant("pooling", "THREADS")
_BINS = sources.constant("pooling", "BINS")
_SLAB = sources.constant("pooling", "SLAB_BYTES")
_LANES = 8  # threads that share a bin's channels, where neighbouring ones are on neighbouring bins
_POOLING = sources.Struct("pooling", "Pooling")


def kernels() -> list[Kernel]:
    """Every instance that the four operators can launch."""
    kinds = ("Average", "DeformRoI", "DeformPSRoI")
    names = [("pool", kind) for kind in kinds] + [("pool_backward_offset", kind) for kind in kinds[1:]]
    return [
        *(_kernel("pool_backward_input", dtype.ctype, kind) for kind in kinds for dtype in DTYPES.values()),
        *(
            _kernel(name, dtype.ctype, kind, vector)
            for (name, kind), dtype in itertools.product(names, DTYPES.values())
            for vector in (1, 16 // dtype.size)
        ),
    ]


def forward(g: RoIPooling, out: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None) -> None:
    with launch.device(out) as device:
        positions = _positions(device, input, rois, offset, mask)
        channels_last, vector = _channels_last(g, input), _vector(g, input)
        # a slab before another thread joins in; but of channels that are read one by one, neighbours share a cache line
        alone = 1 if channels_last and vector == 1 else _slab(input)
        _launch(
            device, g, "pool", input, channels_last, _LANES, input, strides(input), *positions, out, strides(out),
            vector=vector, alone=alone,
        )  # fmt: skip


def backward(
    g: RoIPooling, grads: Any, grad_output: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None
) -> None:
    grad_input, _, grad_offset, grad_mask = (*grads, None, None)[:4]
    with launch.device(grad_output) as device:
        positions = _positions(device, input, rois, offset, mask)
        gradient = grad_output, strides(grad_output)
        if grad_input is not None:  # a bin's gradient / divisor * mask, times a sample's four weights, to its pixels
            sums = _input_sums(device, g, grad_input)
            sums[...] = 0
            channels_last = _channels_last(g, sums)
            _launch(
                device, g, "pool_backward_input", input, channels_last, 1, *gradient, *positions, sums, strides(sums)
            )
            if sums is not grad_input:
                grad_input[...] = sums
        if grad_offset is not None or grad_mask is not None:  # a bin's own, which parts of several bins add up
            bins = (g.rois, 2 * g.classes, *g.output_size)
            offset_sums = None if grad_offset is None else _sums(device, input, grad_offset, bins)
            mask_sums = None if grad_mask is None else _sums(device, input, grad_mask, grad_mask.shape)
            channels_last, vector = _channels_last(g, input), _vector(g, input)
            _launch(
                device, g, "pool_backward_offset", input, channels_last, _LANES,
                *gradient, input, strides(input), *positions, offset_sums, mask_sums, vector=vector, alone=vector,
            )  # fmt: skip
            if grad_offset is not offset_sums:
                grad_offset[...] = _by_part(device, g, offset_sums)
            if grad_mask is not mask_sums:
                grad_mask[...] = mask_sums


def _positions(device: Any, input: Any, *tensors: Any) -> list[Any]:
    """rois, offset and mask: contiguous, of the type of positions and sums. Those that are so are not copied."""
    dtype = arithmetic(input)
    return [None if t is None else device.xp.ascontiguousarray(t, dtype) for t in tensors]


def _channels_last(g: RoIPooling, image: Any) -> bool:
    """Whether neighbouring threads go to neighbouring channels; those of a bin are no neighbours if it has a group."""
    return g.group_size == (1, 1) and g.channels > 1 and image.strides[1] == image.itemsize


def _vector(g: RoIPooling, input: Any) -> int:
    """How many neighbouring channels a thread reads at once: 16 bytes, if all pixels and classes allow it, else one."""
    vector = 16 // input.itemsize
    channels = g.out_channels // g.classes
    aligned = _channels_last(g, input) and channels % vector == 0 and address(input) % 16 == 0
    return vector if aligned and all(stride % 16 == 0 for stride in input.strides[::2] + input.strides[3:]) else 1


def _slab(input: Any) -> int:
    """How many channels of a bin a thread sums at a time."""
    return _SLAB // np.dtype(arithmetic(input)).itemsize


def _input_sums(device: Any, g: RoIPooling, grad: Any) -> Any:
    """Where atomics sum the input's gradient, in float64: with the channels channels_last, unless bins have groups."""
    if grad.dtype == np.float64 and (_channels_last(g, grad) or g.group_size != (1, 1) or g.channels == 1):
        return grad
    if g.group_size != (1, 1):
        return device.empty(grad.shape, np.float64)
    n, c, h, w = grad.shape
    return device.empty((n, h, w, c), np.float64).transpose(0, 3, 1, 2)


def _sums(device: Any, input: Any, grad: Any, shape: tuple[int, ...]) -> Any:
    """`grad` itself, if the kernel can write to it."""
    dtype = arithmetic(input)
    if grad.dtype == dtype and grad.shape == shape and grad.flags.c_contiguous:
        return grad
    return device.empty(shape, dtype)


def _by_part(device: Any, g: RoIPooling, bins: Any) -> Any:
    """The sums over each part's bins, in float64 and always in one order."""
    if g.part_size == g.output_size:
        return bins
    rows = device.xp.zeros((*bins.shape[:2], g.part_size[0], g.output_size[1]), np.float64)
    parts = device.xp.zeros((*bins.shape[:2], *g.part_size), np.float64)
    for row in range(g.output_size[0]):
        rows[:, :, row * g.part_size[0] // g.output_size[0]] += bins[:, :, row]
    for column in range(g.output_size[1]):
        parts[..., column * g.part_size[1] // g.output_size[1]] += rows[..., column]
    return parts


def _launch(
    device: Any, g: RoIPooling, name: str, input: Any, channels_last: bool, lanes: int, *args: Any,
    vector: int | None = None, alone: int = 1,
) -> None:  # fmt: skip
    """`lanes`: how many threads at most take turns at a bin's channels if they are planar.

    `vector`: how many channels they read at once; None for a kernel without vectors, whose threads share no bins.
    `alone`: how many channels a bin may have before another thread joins in.
    """
    channels = g.out_channels // g.classes
    slab = channels if name == "pool_backward_offset" else _slab(input)
    lanes = min(32 if channels_last else lanes, 1 << (ceil_div(channels, alone) - 1).bit_length())
    bins = min(_THREADS // lanes, _THREADS if vector is None else _BINS)
    slabs = ceil_div(channels, lanes * slab)
    tiles = ceil_div(g.rois * math.prod(g.output_size), bins)
    grid = tiles * slabs * g.classes
    if grid > launch.LARGEST_GRID:
        raise ValueError(f"{g.name}: {g.rois} rois need {grid} blocks of threads, CUDA takes {launch.LARGEST_GRID}")
    pooling = _POOLING(
        spatial_scale=g.spatial_scale, offset_unit=g.offset_unit,
        images=g.batch, height=g.height, width=g.width, rois=g.rois,
        rows=g.output_size[0], columns=g.output_size[1], group_rows=g.group_size[0], group_columns=g.group_size[1],
        part_rows=g.part_size[0], part_columns=g.part_size[1], classes=g.classes, class_channels=channels,
        samples=g.samples, channels_last=channels_last, tiles=tiles, slabs=slabs,
    )  # fmt: skip
    block = (lanes, bins) if channels_last else (bins, lanes)
    kernel = _kernel(name, ctype(input), g.kind, vector)
    device.launch(kernel, grid, block, *args, pooling)


def _kernel(name: str, dtype: str, kind: str, vector: int | None = None) -> Kernel:
    return Kernel("pooling", f"{name}<{dtype}, {kind}{'' if vector is None else f', {vector}'}>")
