"""dcnv3, dcnv4 and ms_deform_attn on a GPU: one kernel makes the output, one all the gradients.

Both read contiguous tensors, so that a thread can take 16 bytes at a time; others are copied first.
See kernels_cu/aggregate.cuh.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import dtypes, launch, sources
from ..check import LARGEST
from ..dtypes import arithmetic
from ..geometry import Aggregation, Attention, ceil_div
from ..launch import Kernel, address, ctype

_THREADS = sources.constant("aggregate.cuh", "THREADS")
_STRIP = sources.constant("aggregate.cuh", "STRIP")
_HELD = sources.constant("aggregate.cuh", "HELD")
_DIVISOR = sources.Struct("aggregate.cuh", "Divisor").dtype
_AGGREGATE = sources.Struct("aggregate.cuh", "Aggregate", Divisor=_DIVISOR)
_WINDOWS: dict[type, sources.Struct] = {
    dtype: sources.Struct("aggregate.cuh", "Windows", A=dtype, Divisor=_DIVISOR) for dtype in (np.float32, np.float64)
}
_ATTENTION = sources.Struct("aggregate.cuh", "Attention")
_BACKWARD = sources.Struct("aggregate_backward", "Aggregate")
_BACKWARD_WINDOWS: dict[type, sources.Struct] = {
    dtype: sources.Struct("aggregate_backward", "Windows", A=dtype) for dtype in (np.float32, np.float64)
}
_MOST_ROWS = 32  # of a warp
_RUN = 32  # samples that are summed in one run, if there are more than a warp holds at a time


def kernels() -> list[Kernel]:
    """Every instance that these operators can launch."""
    types = [
        (data.ctype, places.ctype, source, vector)
        for data, places in dtypes.together(1)
        for source in ("Windows", "Attention")
        for vector in _vectors(data.size)
    ]
    return [
        *(_kernel("aggregate", "forward", *each, simple) for each in types for simple in ("true", "false")),
        *(_kernel("aggregate_backward", "backward", *each) for each in types),
    ]


def forward(g: Aggregation, out: Any, *tensors: Any) -> None:
    with launch.device(out) as device:
        if not g.pixels:
            out[...] = 0
            return
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
        call.launch_backward([device.xp.ascontiguousarray(grad_output)], [*targets, None][:3])
        for grad, target in zip(wanted, targets, strict=True):
            if target is not grad:
                grad[...] = target


class _Call:
    """The tensors of one call as the kernels take them."""

    def __init__(self, g: Aggregation, device: Any, tensors: Any) -> None:
        xp = device.xp
        self.g, self.device = g, device
        self.samples = g.levels * g.points  # of a row
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
        vector = self._vector([self.image, *inputs, *outputs])
        lanes = self._lanes(vector)
        rows, held = self._rows(32 // lanes)
        grid = self._grid(rows * _THREADS // 32, vector)
        simple = "true" if held == self.samples and not self.g.softmax else "false"
        kernel = _kernel("aggregate", name, *self._types(vector), simple)
        source = _source(self.g, arithmetic(self.image))
        self._launch(kernel, grid, (_THREADS, 1), inputs, outputs, source, self._aggregate(lanes, rows, held))

    def launch_backward(self, inputs: list[Any], outputs: list[Any]) -> None:
        vector = self._vector([self.image, *inputs])
        lanes = self._lanes(vector)
        grid = self._grid(_THREADS // lanes, vector)
        kernel = _kernel("aggregate_backward", "backward", *self._types(vector))
        g = self.g
        plan = _BACKWARD(
            **self._steps(), images=g.batch, height=g.queries[0], width=g.queries[1], pixels=g.pixels, groups=g.groups,
            channels=g.group_channels, samples=self.samples, softmax=g.softmax, packed=g.packed,
        )  # fmt: skip
        source = _backward_source(g, arithmetic(self.image))
        self._launch(kernel, grid, (lanes, _THREADS // lanes), inputs, outputs, source, plan)

    def _launch(
        self, kernel: Kernel, grid: int, block: tuple[int, int], inputs: Any, outputs: Any, *structs: np.ndarray
    ) -> None:
        self.device.launch(
            kernel, grid, block, *inputs, self.image, self.places, self.weights, *self.levels, *outputs, *structs
        )

    def _types(self, vector: int) -> tuple[str, str, str, int]:
        return ctype(self.image), ctype(self.places), type(self.g).__name__, vector

    def _lanes(self, vector: int) -> int:
        """Threads of a row: one a vector of channels, as far as a warp goes; a power of two."""
        return min(32, 1 << (ceil_div(self.g.group_channels, vector) - 1).bit_length())

    def _rows(self, slots: int) -> tuple[int, int]:
        """How many rows a warp has, which goes over `slots` at a time, and how many samples of each it holds.

        As many rows as it can hold all samples of, to share what is done once a row or once a sample.
        """
        capacity = _HELD * 4 // np.dtype(arithmetic(self.image)).itemsize
        step = self.samples | 1  # of the rows in shared memory: an odd number, so that they lie in different banks
        rows = slots
        while rows < _MOST_ROWS and 2 * rows * step <= capacity:
            rows *= 2
        return rows, self.samples if rows * step <= capacity else min(_RUN, (capacity // rows - 1) | 1)

    def _grid(self, rows: int, vector: int) -> int:
        """The number of blocks of so many rows."""
        g = self.g
        queries = g.batch * math.prod(g.queries)
        grid = ceil_div(queries, rows) * g.groups
        image_vectors = g.pixels * g.groups * g.group_channels // vector
        if queries > LARGEST or grid > launch.LARGEST_GRID or image_vectors > LARGEST:
            raise ValueError(
                f"{g.name}: on CUDA all images together must have fewer than 2**31 queries and take fewer than 2**31 "
                f"blocks of threads, and one image must have fewer than 2**31 vectors of {vector} channels, "
                f"got {queries}, {grid} and {image_vectors}"
            )
        return grid

    def _vector(self, arrays: list[Any]) -> int:
        """How many channels a thread carries."""
        size = self.image.itemsize
        return next(
            v
            for v in _vectors(size)
            if self.g.group_channels % v == 0 and all(address(a) % (v * size) == 0 for a in arrays)
        )

    def _aggregate(self, lanes: int, rows: int, held: int) -> np.ndarray:
        g = self.g
        height, width = g.queries
        return _AGGREGATE(
            **self._steps(), groups_of=_divisor(g.groups), queries_of=_divisor(height * width),
            strips_of=_divisor(min(_STRIP, height) * width), last_strip_of=_divisor(height % _STRIP or _STRIP),
            images=g.batch, height=height, width=width, pixels=g.pixels, groups=g.groups, channels=g.group_channels,
            samples=self.samples, softmax=g.softmax, packed=g.packed,
            pixel_bytes=g.groups * g.group_channels * self.image.itemsize, log_lanes=lanes.bit_length() - 1, rows=rows,
            slots=32 // lanes, held=held, reciprocal=2**16 // held + 1,
        )  # fmt: skip

    def _steps(self) -> dict[str, int]:
        """Where the places and weights of a row are, in elements."""
        samples, groups = self.samples, self.g.groups
        if self.g.packed:
            per_query, per_group = self.places.shape[-1], 3 * samples
            return {
                "places_query": per_query, "places_group": per_group,
                "weights_query": per_query, "weights_group": per_group, "weights_first": 2 * samples,
            }  # fmt: skip
        return {
            "places_query": 2 * samples * groups, "places_group": 2 * samples,
            "weights_query": samples * groups, "weights_group": samples, "weights_first": 0,
        }  # fmt: skip


def _divisor(number: int) -> tuple[int, int]:
    """`Divisor` of aggregate.cuh."""
    shift = (number - 1).bit_length()
    return ceil_div(2 ** (31 + shift), number), shift


def _vectors(itemsize: int) -> list[int]:
    """16 bytes, 4 bytes or one element."""
    return sorted({16 // itemsize, max(1, 4 // itemsize), 1}, reverse=True)


def _source(g: Aggregation, dtype: type) -> np.ndarray:
    """What turns places into positions."""
    if isinstance(g, Attention):
        return _ATTENTION(points=g.points, pixels=g.pixels)
    return _WINDOWS[dtype](
        scale=g.offset_scale, end_y=_not_below(g.height, dtype), end_x=_not_below(g.width, dtype),
        kernel_h_of=_divisor(g.kernel[0]), columns=g.width, last_row=g.height - 1, last_column=g.width - 1,
        kernel_h=g.kernel[0], left_out=g.points // 2 if g.remove_center else g.points,
        stride_h=g.stride[0], stride_w=g.stride[1], top=g.padding[0], left=g.padding[1],
        dilation_h=g.dilation[0], dilation_w=g.dilation[1], center_h=g.center[0], center_w=g.center[1],
    )  # fmt: skip


def _backward_source(g: Aggregation, dtype: type) -> np.ndarray:
    if isinstance(g, Attention):
        return _source(g, dtype)
    return _BACKWARD_WINDOWS[dtype](
        scale=g.offset_scale, height=g.height, width=g.width, kernel_h=g.kernel[0],
        left_out=g.points // 2 if g.remove_center else g.points,
        stride_h=g.stride[0], stride_w=g.stride[1], top=g.padding[0], left=g.padding[1],
        dilation_h=g.dilation[0], dilation_w=g.dilation[1], center_h=g.center[0], center_w=g.center[1],
    )  # fmt: skip


def _not_below(number: int, dtype: Any) -> Any:
    """The least of the type's numbers that is not below an integer."""
    nearest = dtype(number)
    return nearest if float(nearest) >= number else np.nextafter(nearest, dtype(np.inf))


def _kernel(source: str, name: str, *template: str | int) -> Kernel:
    return Kernel(source, f"aggregate_{name}<{', '.join(map(str, template))}>")
