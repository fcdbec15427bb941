"""dcnv3, dcnv4 and ms_deform_attn on a GPU: a kernel for the output, one for the gradients of places and weights, and
the image's gradient, gathered from samples that are sorted.

All read contiguous tensors, so that a thread can take 16 bytes at a time; others are copied first.
See kernels_cu/aggregate.cuh and kernels_cu/aggregate_backward_input.cu.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import dtypes, launch, sources
from ..check import LARGEST
from ..dtypes import arithmetic
from ..geometry import MOST_LEVELS, Aggregation, Attention, ceil_div
from ..launch import ctype
from ..plan import Kernel, Plan, View
from . import sort
from .divisor import DIVISOR, divisor
from .sort import Segments

_THREADS = sources.constant("aggregate.cuh", "THREADS")
_WARPS = _THREADS // 32
_STRIP = sources.constant("aggregate.cuh", "STRIP")
_HELD = sources.constant("aggregate.cuh", "HELD")
_AGGREGATE = sources.Struct("aggregate.cuh", "Aggregate", Divisor=DIVISOR)
_WINDOWS: dict[type, sources.Struct] = {
    dtype: sources.Struct("aggregate.cuh", "Windows", A=dtype, Divisor=DIVISOR) for dtype in (np.float32, np.float64)
}
_ATTENTION = sources.Struct("aggregate.cuh", "Attention")
_ATTENTION_V2 = sources.Struct("aggregate.cuh", "AttentionV2")
_PAIRS = sources.Struct("aggregate_backward_input", "Pairs")
_SOURCES = ("Windows", "Attention", "AttentionV2")
_CHUNK = 32  # samples of a row that come at a time, at most, where not all are held; their sums are one run
_PIXEL_BYTES = 2**32 - 1  # at most


def kernels() -> list[Kernel]:
    """Every instance that these operators can launch."""
    types = [(data, (data.ctype, places.ctype, source)) for data, places in dtypes.together(1) for source in _SOURCES]
    return [
        *(_kernel("forward", *names, v, s) for d, names in types for v in _vectors(d.size) for s in (0, 1)),
        *(_kernel("backward_places", *names, v) for d, names in types for v in _places_vectors(d.size)),
        *(_kernel("clear_unused", dtype.ctype) for dtype in dtypes.DTYPES.values()),
        *(_kernel(name, *names) for _, names in types for name in ("count", "records")),
        *(_kernel("softmax", data.ctype, places.ctype) for data, places in dtypes.together(1)),
        *(
            _kernel("backward_input", data.ctype, source, v)
            for data in dtypes.DTYPES.values()
            for source in _SOURCES
            for v in _vectors(data.size)
        ),
        Kernel("aggregate", "aggregate_starts"),
        *sort.kernels(),
    ]


def forward(plan: Plan, g: Aggregation, outs: Sequence[View], *tensors: Any) -> None:
    (out,) = outs
    if not g.pixels:
        plan.clear(out)
        return
    call = _Call(plan, g, tensors)
    target = call.target(out, out.dtype)
    call.launch_forward(target)
    if target is not out:
        plan.copy(out, target)


def backward(plan: Plan, g: Aggregation, grads: Sequence[Any], grad_output: View, *tensors: Any) -> None:
    if not g.pixels:
        for grad in grads:
            if grad is not None:
                plan.clear(grad)
        return
    call = _Call(plan, g, tensors)
    gradient = plan.contiguous(grad_output)
    if grads[0] is not None:
        _backward_input(call, grads[0], gradient)
    grad_places = list(grads[-1 if g.packed else -2 :])
    if g.discrete and grad_places[0] is not None:
        plan.clear(grad_places[0])
        grad_places[0] = None
    if any(grad is not None for grad in grad_places):
        _backward_places(call, grad_places, gradient)


def _backward_input(call: _Call, grad: View, grad_output: View) -> None:
    if not grad.size:
        return
    grad = call.image_of(grad)
    target = call.target(grad, grad.dtype)
    call.launch_backward_input(grad_output, target)
    if target is not grad:
        call.plan.copy(grad, target)


def _backward_places(call: _Call, grads: Sequence[Any], grad_output: View) -> None:
    """Gradients of places and weights, or of the tensor that holds both."""
    targets = [call.target(grad, call.places.dtype) for grad in grads]
    if call.g.packed:
        call.clear_unused(targets[0])
    call.launch_backward_places(grad_output, [*targets, None][:2])
    for grad, target in zip(grads, targets, strict=True):
        if target is not grad:
            call.plan.copy(grad, target)


class _Split(NamedTuple):
    """How a kernel's work is shared out."""

    vector: int  # channels of a thread
    lanes: int  # threads of a row
    rows: int  # of a warp
    held: int  # samples of a row that a warp holds at a time


class _Call:
    """The tensors of one call as the kernels take them."""

    def __init__(self, plan: Plan, g: Aggregation, tensors: Any) -> None:
        self.plan, self.g = plan, g
        image, *levels, places, weights = (*tensors, tensors[-1]) if g.packed else tensors
        # the kernels have one type for both, so that where one of two is half, it becomes float32
        fine = np.float32 if places.dtype != weights.dtype else places.dtype
        self.image = plan.contiguous(self.image_of(image))
        self.places = plan.contiguous(places, fine)
        self.weights = self.places if g.packed else plan.contiguous(weights, fine)
        self.levels = self._of_levels(*levels)

    def image_of(self, image: View) -> View:
        """The image, or its gradient, with a group's channels last."""
        return self.g.image(image) if isinstance(self.g, Attention) else image

    def _of_levels(self, shapes: View | None = None, starts: View | None = None) -> tuple[View | None, View | None]:
        """Both contiguous and in 64 bits; None for dcnv3 and dcnv4."""
        if shapes is None:
            return None, None
        shapes = self.plan.contiguous(shapes, np.int64)
        if starts is not None:
            return shapes, self.plan.contiguous(starts, np.int64)
        starts = self.plan.empty((self.g.levels,), np.int64)
        self.plan.launch(Kernel("aggregate", "aggregate_starts"), 1, (1, 1), shapes, starts, np.int32(self.g.levels))
        return shapes, starts

    def target(self, array: View | None, dtype: Any) -> Any:
        """Where a kernel writes `array`'s elements: there, if they are contiguous, aligned and of `dtype`."""
        if array is None or (array.dtype == dtype and array.is_contiguous and array.alignment == 16):
            return array
        return self.plan.empty(array.shape, dtype)

    def launch_forward(self, target: Any) -> None:
        split = self._split(_vectors, [self.image, target])
        simple = split.held == self.g.samples and not self.g.softmax
        self._launch("forward", split, [], [target], int(simple))

    def launch_backward_places(self, grad_output: Any, targets: list[Any]) -> None:
        split = self._split(_places_vectors, [self.image, grad_output])
        self._launch("backward_places", split, [grad_output], targets)

    def clear_unused(self, packed: View) -> None:
        """What dcnv4's tensor has behind the last group gets gradients of 0."""
        unused, row = self.g.unused(None, packed), packed.shape[-1]
        if unused.size:
            numbers = np.int64(unused.size), np.int32(row), np.int32(row - unused.shape[-1])
            kernel = _kernel("clear_unused", ctype(packed))
            self.plan.launch(kernel, ceil_div(unused.size, _THREADS), (_THREADS, 1), packed, *numbers)

    def launch_backward_input(self, grad_output: Any, grad_image: Any) -> None:
        """Sorts the samples of some pairs of an image and a group at a time, from which each pixel gathers."""
        g, plan, queries, dtype = self.g, self.plan, math.prod(self.g.queries), arithmetic(self.image)
        # ms_deform_attn's level of h x w pixels has (h + 1) * (w + 1) <= 2 * (h * w + 1) cells
        cells = 2 * (g.pixels + 1) if isinstance(g, Attention) else (g.height + 1) * (g.width + 1)
        pair, record = Segments(g.levels, cells, queries * max(g.points)), sort.record_bytes(dtype)
        split = self._split(_vectors, [grad_output, grad_image])
        self._grid(split.rows * _WARPS, split.vector)  # raises
        rows = _THREADS // split.lanes
        source, aggregate = _source(g, dtype), self._aggregate(split)
        kernels = [_kernel(name, *self._types()) for name in ("count", "records")]
        gather = _kernel("backward_input", ctype(self.image), _source_name(g), split.vector)
        softmax_bytes = 2 * np.dtype(dtype).itemsize * queries if g.softmax else 0
        step = pair.at_a_time(g.name, record, softmax_bytes)
        for first in range(0, g.batch * g.groups, step):
            count = min(step, g.batch * g.groups - first)
            pairs = _PAIRS(
                first=first, count=count, levels=g.levels, points=max(g.points), cells=cells,
                samples=pair.segment_samples,
            )  # fmt: skip
            with plan.reused():
                softmax = None
                if g.softmax:
                    softmax = plan.empty((count * queries, 2), dtype)
                    self._launch_softmax(softmax, aggregate, pairs)
                arguments = self.places, self.weights, *self.levels, softmax, source, aggregate, pairs
                lists = sort.sort(plan, pair.times(count), record, *kernels, *arguments)
                plan.launch(
                    gather, ceil_div(count * g.pixels, rows), (split.lanes, rows), grad_output, *self.levels, *lists,
                    grad_image, source, aggregate, pairs,
                )  # fmt: skip

    def _launch_softmax(self, softmax: Any, aggregate: Any, pairs: Any) -> None:
        """Of each query: lanes that take up to four samples each."""
        lanes = min(32, 1 << (ceil_div(self.g.samples, 4) - 1).bit_length())
        rows = _THREADS // lanes
        self.plan.launch(
            _kernel("softmax", ctype(self.image), ctype(self.places)), ceil_div(softmax.shape[0], rows), (lanes, rows),
            self.weights, softmax, aggregate, pairs,
        )  # fmt: skip

    def _launch(self, name: str, split: _Split, inputs: list[Any], outputs: list[Any], *template: int) -> None:
        self.plan.launch(
            _kernel(name, *self._types(), split.vector, *template), self._grid(split.rows * _WARPS, split.vector),
            (_THREADS, 1), *inputs, self.image, self.places, self.weights, *self.levels, *outputs,
            _source(self.g, arithmetic(self.image)), self._aggregate(split),
        )  # fmt: skip

    def _types(self) -> tuple[str, str, str]:
        return ctype(self.image), ctype(self.places), _source_name(self.g)

    def _split(self, vectors: Callable[[int], dict[int, int]], arrays: list[Any]) -> _Split:
        return _split(self.g, vectors, self.image.itemsize, math.gcd(*(array.alignment for array in arrays)))

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
        if self._pixel_bytes > _PIXEL_BYTES:
            raise ValueError(f"{g.name}: on CUDA a pixel must take fewer than 2**32 bytes, got {self._pixel_bytes}")
        return grid

    def _aggregate(self, split: _Split) -> np.ndarray:
        return _aggregate(self.g, split, self.places.shape[-1], self._pixel_bytes)

    @property
    def _pixel_bytes(self) -> int:
        return self.g.groups * self.g.group_channels * self.image.itemsize


def _split(g: Aggregation, vectors: Callable[[int], dict[int, int]], size: int, alignment: int) -> _Split:
    """`size`: of an element; `alignment`: of all that is read or written by vectors; bytes."""
    channels, samples = g.group_channels, g.samples
    vector, least = next(
        (vector, lanes)
        for vector, lanes in vectors(size).items()
        if channels % (vector * lanes) == 0 and alignment % (vector * size) == 0
    )
    # a thread a vector of channels, as far as a warp goes; where four are at least needed, they are at most
    lanes = least if least > 1 else min(32, 1 << (ceil_div(channels, vector) - 1).bit_length())
    capacity = _HELD * 4 // max(4, size)  # positions are float32 or float64
    step = samples | 1  # from row to row: see Held
    # as many rows as all samples can be held of, to share what is done once a row or once for 32 samples
    rows = 32 // lanes
    while rows < 32 and 2 * rows * step <= capacity:
        rows *= 2
    held = samples if rows * step <= capacity else min(_CHUNK, (capacity // rows - 1) | 1)
    return _Split(vector, lanes, rows, held)


def _aggregate(g: Aggregation, split: _Split, per_query: int, pixel_bytes: int) -> np.ndarray:
    """`per_query`: numbers of the tensor that has places and weights, where both are in one."""
    (_, lanes, rows, held), (height, width) = split, g.queries
    samples, groups = g.samples, g.groups
    steps = (  # where the places and weights of a row are, in elements
        {
            "places_query": per_query, "places_group": 3 * samples,
            "weights_query": per_query, "weights_group": 3 * samples, "weights_first": 2 * samples,
        }
        if g.packed
        else {
            "places_query": 2 * samples * groups, "places_group": 2 * samples,
            "weights_query": samples * groups, "weights_group": samples, "weights_first": 0,
        }
    )  # fmt: skip
    return _AGGREGATE(
        **steps, groups_of=divisor(groups), queries_of=divisor(height * width),
        strips_of=divisor(min(_STRIP, height) * width), last_strip_of=divisor(height % _STRIP or _STRIP),
        images=g.batch, height=height, width=width, pixels=g.pixels, groups=groups, channels=g.group_channels,
        samples=samples, softmax=g.softmax, packed=g.packed, pixel_bytes=pixel_bytes, lanes=lanes,
        log_lanes=lanes.bit_length() - 1, rows=rows, slots=32 // lanes, held=held, reciprocal=2**16 // held + 1,
    )  # fmt: skip


def _vectors(itemsize: int) -> dict[int, int]:
    """How many channels a thread may carry, 16 bytes, 4 bytes or one element, and how many threads a row then needs."""
    return dict.fromkeys(sorted({16 // itemsize, max(1, 4 // itemsize), 1}, reverse=True), 1)


def _places_vectors(itemsize: int) -> dict[int, int]:
    """Half types with 16 or 8 bytes go to the tensor cores, where a row has four threads."""
    return {8: 4, 4: 4, 2: 1, 1: 1} if itemsize == 2 else _vectors(itemsize)


def _source_name(g: Aggregation) -> str:
    """A struct of aggregate.cuh."""
    return "AttentionV2" if g.discrete or len(set(g.points)) > 1 else type(g).__name__


def _source(g: Aggregation, dtype: type) -> np.ndarray:
    """What turns places into positions."""
    if isinstance(g, Attention):
        if _source_name(g) == "Attention":
            return _ATTENTION(points=g.points[0], pixels=g.pixels)
        bounds = [sum(g.points[:level]) for level in range(MOST_LEVELS + 1)]
        return _ATTENTION_V2(bounds=bounds, pixels=g.pixels, discrete=g.discrete)
    return _WINDOWS[dtype](
        scale=g.offset_scale, end_y=_not_below(g.height, dtype), end_x=_not_below(g.width, dtype),
        kernel_h_of=divisor(g.kernel[0]), columns=g.width, last_row=g.height - 1, last_column=g.width - 1,
        kernel_h=g.kernel[0], left_out=g.samples // 2 if g.remove_center else g.samples,
        stride_h=g.stride[0], stride_w=g.stride[1], top=g.padding[0], left=g.padding[1],
        dilation_h=g.dilation[0], dilation_w=g.dilation[1], center_h=g.center[0], center_w=g.center[1],
    )  # fmt: skip


def _not_below(number: int, dtype: Any) -> Any:
    """The least of the type's numbers that is not below an integer."""
    nearest = dtype(number)
    return nearest if float(nearest) >= number else np.nextafter(nearest, dtype(np.inf))


@functools.cache
def _kernel(name: str, *template: str | int) -> Kernel:
    source = {
        "forward": "aggregate",
        "backward_places": "aggregate_backward_places",
        "clear_unused": "aggregate_backward_places",
    }
    expression = f"aggregate_{name}<{', '.join(map(str, template))}>"
    return Kernel(source.get(name, "aggregate_backward_input"), expression)
