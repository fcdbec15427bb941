"""A call's work on a GPU as data: launches and copies, over views of its tensors and of scratch memory.

An operator's CUDA path plans a call from its geometry and its tensors' layouts. It sees no element, so that a plan can
be remembered, and the next call of its kind is left with filling in addresses: a model makes the same few calls again
and again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 16  # bytes, the most that a thread reads at once
_STEP = 512  # bytes, of scratch arrays' beginnings


class Kernel(NamedTuple):
    """A template instance: `expression` in `kernels_cu/<source>.cu`."""

    source: str
    expression: str


class Layout(NamedTuple):
    """All that a plan knows of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: np.dtype
    residue: int  # of its address, modulo ALIGNMENT


def layout_of(array: Any, address: int) -> tuple[Any, ...]:
    """A NumPy or CuPy array's Layout as a plain tuple, which is quicker to make, and as good a key."""
    return array.shape, array.strides, array.dtype, address % ALIGNMENT


@dataclass(frozen=True, eq=False)
class View:
    """Some elements of a buffer: a plan has one for each tensor, and then one for each scratch array."""

    buffer: int
    offset: int  # bytes, from the buffer's first element to this view's
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.layout.strides

    @property
    def dtype(self) -> np.dtype:
        return self.layout.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def alignment(self) -> int:
        """Of its address, in bytes, as far as anyone asks."""
        return math.gcd(ALIGNMENT, self.layout.residue)

    @property
    def is_contiguous(self) -> bool:
        return self._model().flags.c_contiguous

    @property
    def T(self) -> View:
        return self.transpose(range(len(self.shape))[::-1])

    def transpose(self, order: Sequence[int]) -> View:
        model = self._model()
        return self._like(model, model.transpose(order))

    def swapaxes(self, axis: int, other: int) -> View:
        model = self._model()
        return self._like(model, model.swapaxes(axis, other))

    def __getitem__(self, key: Any) -> View:
        """By integers, slices, None and Ellipsis."""
        model = self._model()
        return self._like(model, model[key])

    def as_bytes(self) -> View:
        """With one more axis."""
        shape, strides = (*self.shape, self.itemsize), (*self.strides, 1)
        return View(self.buffer, self.offset, Layout(shape, strides, np.dtype(np.uint8), self.layout.residue))

    def _model(self) -> np.ndarray:
        """An array of the same shape, from which NumPy works out what a view of it is; it has no elements to read."""
        return np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)

    def _like(self, model: np.ndarray, part: np.ndarray) -> View:
        step = part.__array_interface__["data"][0] - model.__array_interface__["data"][0]
        residue = (self.layout.residue + step) % ALIGNMENT
        return View(self.buffer, self.offset + step, Layout(part.shape, part.strides, part.dtype, residue))


class Launch(NamedTuple):
    kernel: Kernel
    grid: int
    block: tuple[int, int]
    arguments: tuple[Any, ...]  # a View or None for a pointer; a NumPy scalar, or a struct of no dimensions

    @property
    def views(self) -> Sequence[View]:
        return [argument for argument in self.arguments if isinstance(argument, View)]


class Zero(NamedTuple):
    """Fills a contiguous view with zeros."""

    view: View

    @property
    def views(self) -> Sequence[View]:
        return (self.view,)


class Run(NamedTuple):
    """Calls a function with NumPy or CuPy arrays: what is too rare for a kernel of its own."""

    function: Callable[..., None]
    views: Sequence[View]


Step = Launch | Zero | Run


class Scratch(NamedTuple):
    """A scratch array, and where in the memory that all of them share it begins."""

    layout: Layout
    offset: int


class Plan:
    """The steps of a call on tensors of these layouts, None for one that is not given; `tensors` are their views."""

    def __init__(self, layouts: Sequence[Layout | None]) -> None:
        self.tensors = [None if layout is None else View(i, 0, layout) for i, layout in enumerate(layouts)]
        self.steps: list[Step] = []
        self.scratch: list[Scratch] = []
        self.scratch_bytes = 0
        self._top = 0
        self._freed: set[int] = set()

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """The memory of scratch arrays that are made meanwhile goes to others afterwards."""
        top, first = self._top, len(self.tensors) + len(self.scratch)
        yield
        self._top = top
        self._freed.update(range(first, len(self.tensors) + len(self.scratch)))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> View:
        dtype = np.dtype(dtype)
        strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        view = View(len(self.tensors) + len(self.scratch), 0, Layout(shape, strides, dtype, 0))
        self.scratch.append(Scratch(view.layout, self._top))
        self._top += -(-view.nbytes // _STEP) * _STEP
        self.scratch_bytes = max(self.scratch_bytes, self._top)
        return view

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> View:
        view = self.empty(shape, dtype)
        self._add(Zero(view))
        return view

    def contiguous(self, view: View, dtype: Any = None) -> View:
        """The view, or a copy if it is not contiguous or of another dtype."""
        dtype = view.dtype if dtype is None else np.dtype(dtype)
        if view.is_contiguous and view.dtype == dtype:
            return view
        copy = self.empty(view.shape, dtype)
        self.copy(copy, view)
        return copy

    def addressable(self, view: View | None) -> View | None:
        """The view; a copy if its elements do not lie at whole steps of their size, in which kernels count."""
        if view is None or not any(step % view.itemsize for step in (view.layout.residue, *view.strides)):
            return view
        copy = self.empty(view.shape, view.dtype)
        self.copy(copy.as_bytes(), view.as_bytes())  # CuPy's kernels count in whole elements, too
        return copy

    def copy(self, target: View, source: View) -> None:
        self.run(_copy, target, source)

    def clear(self, target: View) -> None:
        self._add(Zero(target) if target.is_contiguous else Run(_clear, (target,)))

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *arguments: Any) -> None:
        self._add(Launch(kernel, grid, block, arguments))

    def run(self, function: Callable[..., None], *views: View) -> None:
        self._add(Run(function, views))

    def _add(self, step: Step) -> None:
        if any(view.buffer in self._freed for view in step.views):
            raise LookupError("the memory of this scratch array is already another's")
        self.steps.append(step)


def _copy(target: Any, source: Any) -> None:
    target[...] = source


def _clear(target: Any) -> None:
    target[...] = 0
