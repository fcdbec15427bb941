"""dcnv3, dcnv4 and ms_deform_attn on a GPU: a kernel for the output, one for the gradients of places and weights, and
the image's gradient, gathered from samples that are sorted.

All read contiguous tensors, so that a thread can take 16 bytes at a time; others are copied first.
See kernels_cu/aggregate.cu and kernels_cu/aggregate_backward_input.cu.
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
from . import sort
from .sort import Segments

_THREADS = sources.constant("aggregate", "THREADS")
_AGGREGATE = sources.Struct("aggregate_places.cuh", "Aggregate")
_WINDOWS: dict[type, sources.Struct] = {
    dtype: sources.Struct("aggregate_places.cuh", "Windows", A=dtype) for dtype in (np.float32, np.float64)
}
_ATTENTION = sources.Struct("aggregate_places.cuh", "Attention")
_PAIRS = sources.Struct("aggregate_backward_input", "Pairs")
_SOURCES = ("Windows", "Attention")


def kernels() -> list[Kernel]:
    """Every instance that these operators can launch."""
    found = [
        _kernel(name, data.ctype, places.ctype, source, vector)
        for name, source in itertools.product(("forward", "backward"), _SOURCES)
        for data, places in dtypes.together(1)
        for vector in _vectors(data.size)
    ]
    for data, source in itertools.product(dtypes.DTYPES.values(), _SOURCES):
        found += [_kernel_of_input("backward_input", data.ctype, source, vector) for vector in _vectors(data.size)]
        found += [_kernel_of_input(name, data.ctype, source) for name in ("count", "records")]
    found += [_kernel_of_input("softmax", data.ctype) for data in dtypes.DTYPES.values()]
    return found + sort.kernels()


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
        grad_output = device.xp.ascontiguousarray(grad_output)
        wanted = [grads[0], *grads[-1 if g.packed else -2 :]]
        dtypes_written = [call.image.dtype, call.places.dtype, call.places.dtype]
        targets = [call.target(grad, dtype) for grad, dtype in zip(wanted, dtypes_written, strict=False)]
        image, *of_samples = targets
        if (unused := g.unused(*targets)) is not None:
            unused[...] = 0
        if any(grad is not None for grad in of_samples):
            call.launch("backward", [grad_output], [*of_samples, None][:2])
        if image is not None and image.size > 0:
            call.backward_input(grad_output, image)
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
        vector = self._vector([image, *inputs])
        lanes, rows, grid = self._rows(vector)
        kernel = _kernel(name, ctype(image), ctype(self.places), type(g).__name__, vector)
        self.device.launch(
            kernel, grid, (lanes, rows), *inputs, image, self.places, self.weights, *self.levels, *outputs,
            _source(g, arithmetic(image)), self._aggregate(),
        )  # fmt: skip

    def backward_input(self, grad_output: Any, grad_image: Any) -> None:
        """The gradient of the image: sorts the samples of some pairs of an image and a group at a time."""
        g, device, queries, dtype = self.g, self.device, math.prod(self.g.queries), arithmetic(self.image)
        # ms_deform_attn's level of h x w pixels has (h + 1) * (w + 1) <= 2 * (h * w + 1) cells
        cells = 2 * (g.pixels + 1) if isinstance(g, Attention) else (g.height + 1) * (g.width + 1)
        pair = Segments(g.levels, cells, queries * g.points)
        softmax_bytes = 2 * np.dtype(dtype).itemsize * queries if g.softmax else 0
        vector = self._vector([grad_output, grad_image])
        lanes, rows, _ = self._rows(vector)
        source, aggregate = _source(g, dtype), self._aggregate()
        kernels = [_kernel_of_input(name, ctype(self.places), type(g).__name__) for name in ("count", "records")]
        record = sort.record_bytes(dtype)
        step = pair.at_a_time(g.name, record, softmax_bytes)
        for first in range(0, g.batch * g.groups, step):
            count = min(step, g.batch * g.groups - first)
            pairs = _PAIRS(first=first, count=count, levels=g.levels, cells=cells, samples=pair.segment_samples)
            softmax = None
            if g.softmax:
                softmax = device.empty((count * queries, 2), dtype)
                self._launch_softmax(softmax, aggregate, pairs)
            arguments = self.places, self.weights, *self.levels, softmax, source, aggregate, pairs
            lists = sort.sort(device, pair.times(count), record, *kernels, *arguments)
            device.launch(
                _kernel_of_input("backward_input", ctype(self.image), type(g).__name__, vector),
                ceil_div(count * g.pixels, rows), (lanes, rows), grad_output, *self.levels, *lists, grad_image, source,
                aggregate, pairs,
            )  # fmt: skip

    def _launch_softmax(self, softmax: Any, aggregate: Any, pairs: Any) -> None:
        """Of each query: lanes that take up to four samples each."""
        lanes = min(32, 1 << (ceil_div(self.g.levels * self.g.points, 4) - 1).bit_length())
        rows = _THREADS // lanes
        self.device.launch(
            _kernel_of_input("softmax", ctype(self.places)), ceil_div(softmax.shape[0], rows), (lanes, rows),
            self.weights, softmax, aggregate, pairs,
        )  # fmt: skip

    def _rows(self, vector: int) -> tuple[int, int, int]:
        """Threads of a row, which shares a query and group: one a vector of channels; rows of a block, and blocks."""
        g = self.g
        queries = g.batch * math.prod(g.queries)
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
        return lanes, rows, grid

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


def _kernel_of_input(name: str, *arguments: Any) -> Kernel:
    return Kernel("aggregate_backward_input", f"aggregate_{name}<{', '.join(map(str, arguments))}>")
