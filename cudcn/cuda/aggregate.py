"""dcnv3, dcnv4 and ms_deform_attn on a GPU: one kernel makes the output, one all the gradients.

Both read contiguous tensors, so that a thread can take 16 bytes at a time; others are copied first.
See kernels_cu/aggregate.cu.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from .. import dtypes, launch, sources
from ..check import LARGEST
from ..dtypes import arithmetic
from ..geometry import Aggregation, Attention, ceil_div
from ..launch import Kernel, address, ctype

_THREADS = sources.constant("aggregate", "THREADS")
_AGGREGATE = sources.Struct("aggregate", "Aggregate")
_WINDOWS: dict[type, sources.Struct] = {
    dtype: sources.Struct("aggregate", "Windows", A=dtype) for dtype in (np.float32, np.float64)
}
_ATTENTION = sources.Struct("aggregate", "Attention")


def kernels() -> list[Kernel]:
    """Every instance that these operators can launch."""
    return [
        _kernel(name, data.ctype, places.ctype, source, vector)
        for name, source in itertools.product(("forward", "backward"), ("Windows", "Attention"))
        for data, places in dtypes.together(1)
        for vector in _vectors(data.size)
    ]


def forward(g: Aggregation, out: Any, *tensors: Any) -> None:
    with launch.device(out) as device:
        call = _Call(g, device, tensors)
        target = call.target(out, out.dtype)
        call.launch("forward", [], [target])
        if target is not out:
            out[...] = target


def backward(g: Aggregation, grads: Any, grad_output: Any, *tensors: Any) -> None:
    with launch.device(grad_output) as device:
        call = _Call(g, device, tensors)
        wanted = [grads[0], *grads[-1 if g.packed else -2 :]]
        sums = [arithmetic(tensors[0]), call.places.dtype, call.places.dtype]
        targets = [call.target(grad, dtype) for grad, dtype in zip(wanted, sums, strict=False)]
        if targets[0] is not None:
            targets[0].fill(0)
        if (unused := g.unused(*targets)) is not None:
            unused[...] = 0
        call.launch("backward", [device.xp.ascontiguousarray(grad_output)], [*targets, None][:3])
        for grad, target in zip(wanted, targets, strict=True):
            if target is not grad:
                grad[...] = target


class _Call:
    """The tensors of one call as the kernels take them."""

    def __init__(self, g: Aggregation, device: Any, tensors: Any) -> None:
        xp = device.xp
        self.g, self.device = g, device
        image, *levels, places, weights = (*tensors, tensors[-1]) if g.packed else tensors
        # the kernels have one type for both, so that where one of two is half, it becomes float32
        fine = np.float32 if places.dtype != weights.dtype else places.dtype
        self.image = xp.ascontiguousarray(image)
        self.places = xp.ascontiguousarray(places, fine)
        self.weights = self.places if g.packed else xp.ascontiguousarray(weights, fine)
        self.levels = [xp.ascontiguousarray(t, np.int64) for t in levels] or [None, None]

    def target(self, array: Any, dtype: Any) -> Any:
        """Where a kernel writes `array`'s elements: there, if they are contiguous, aligned and of `dtype`."""
        if array is None or (array.dtype == dtype and array.flags.c_contiguous and address(array) % 16 == 0):
            return array
        return self.device.empty(array.shape, dtype)

    def launch(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        g, image = self.g, self.image
        queries = g.batch * math.prod(g.queries)
        vector = self._vector([image, *inputs])
        # A row of threads shares a query and group: a thread a vector of channels, and the rows of a block fill it.
        lanes = min(32, 1 << (ceil_div(g.group_channels, vector) - 1).bit_length())
        rows = _THREADS // lanes
        grid = ceil_div(queries, rows) * g.groups
        image_vectors = g.pixels * g.groups * g.group_channels // vector
        if queries > LARGEST or grid > launch.LARGEST_GRID or image_vectors > LARGEST:
            raise ValueError(
                f"{g.name}: on CUDA all images together must have fewer than 2**31 queries and take fewer than 2**31 "
                f"blocks of threads, and one image must have fewer than 2**31 vectors of {vector} channels, "
                f"got {queries}, {grid} and {image_vectors}"
            )
        kernel = _kernel(name, ctype(image), ctype(self.places), type(g).__name__, vector)
        self.device.launch(
            kernel, grid, (lanes, rows), *inputs, image, self.places, self.weights, *self.levels, *outputs,
            _source(g, arithmetic(image)), self._aggregate(),
        )  # fmt: skip

    def _vector(self, arrays: list[Any]) -> int:
        """How many channels a thread carries."""
        size = self.image.itemsize
        return next(
            v
            for v in _vectors(size)
            if self.g.group_channels % v == 0 and all(address(a) % (v * size) == 0 for a in arrays)
        )

    def _aggregate(self) -> np.ndarray:
        g = self.g
        samples = g.levels * g.points
        if g.packed:
            per_query, per_group = self.places.shape[-1], 3 * samples
            steps = {
                "places_query": per_query, "places_group": per_group,
                "weights_query": per_query, "weights_group": per_group, "weights_first": 2 * samples,
            }  # fmt: skip
        else:
            steps = {
                "places_query": 2 * samples * g.groups, "places_group": 2 * samples,
                "weights_query": samples * g.groups, "weights_group": samples, "weights_first": 0,
            }  # fmt: skip
        return _AGGREGATE(
            **steps, images=g.batch, height=g.queries[0], width=g.queries[1], pixels=g.pixels, groups=g.groups,
            channels=g.group_channels, samples=samples, softmax=g.softmax, packed=g.packed,
        )  # fmt: skip


def _vectors(itemsize: int) -> list[int]:
    """16 bytes, 4 bytes or one element."""
    return sorted({16 // itemsize, max(1, 4 // itemsize), 1}, reverse=True)


def _source(g: Aggregation, dtype: type) -> np.ndarray:
    """What turns places into positions."""
    if isinstance(g, Attention):
        return _ATTENTION(points=g.points, pixels=g.pixels)
    return _WINDOWS[dtype](
        scale=g.offset_scale, height=g.height, width=g.width, kernel_h=g.kernel[0],
        left_out=g.points // 2 if g.remove_center else g.points,
        stride_h=g.stride[0], stride_w=g.stride[1], top=g.padding[0], left=g.padding[1],
        dilation_h=g.dilation[0], dilation_w=g.dilation[1], center_h=g.center[0], center_w=g.center[1],
    )  # fmt: skip


def _kernel(name: str, data: str, places: str, source: str, vector: int) -> Kernel:
    return Kernel("aggregate", f"aggregate_{name}<{data}, {places}, {source}, {vector}>")
