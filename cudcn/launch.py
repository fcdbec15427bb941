"""The only place that compiles and launches kernels: on a GPU through CuPy, or on the emulated one.

Either runs an operator's plans (plan.py), which know of neither.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import dispatch, dtypes, sources
from .plan import ALIGNMENT, Kernel, Launch, Layout, Plan, Run, Step, View, Zero, layout_of

WORKSPACE = 64 << 20  # bytes of scratch memory for one call, unless a single image needs more
LARGEST_GRID = 2**31 - 1

_REMEMBERED = 1024  # plans
_WORD = 8  # bytes of an address
_tf32: ContextVar[bool | None] = ContextVar("_tf32", default=None)
_STRIDES = sources.Struct("bilinear.cuh", "Strides")


@contextlib.contextmanager
def allow_tf32(allow: bool) -> Iterator[None]:
    """Whether matrix products of float32 may round their factors to TF32, for what this thread calls meanwhile."""
    token = _tf32.set(allow)
    try:
        yield
    finally:
        _tf32.reset(token)


def tf32() -> bool:
    """What `allow_tf32` says; else CuPy's own switch for its products."""
    allowed = _tf32.get()
    return _cupys_tf32() if allowed is None else allowed


@functools.cache  # as CuPy does, which reads it once
def _cupys_tf32() -> bool:
    return os.environ.get("CUPY_TF32") == "1"


def ctype(array: Any) -> str:
    return dtypes.of(array).ctype


def strides(view: View | None) -> np.ndarray:
    """`Strides` of bilinear.cuh: element strides of an (N, C, H, W) view, or zeros for None."""
    n, c, y, x = (0, 0, 0, 0) if view is None else (stride // view.itemsize for stride in view.strides)
    return _STRIDES(n=n, c=c, y=y, x=x)


def compile_options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{sources.FOLDER}", f"-DCUDCN_SOURCES={sources.digest()}")


def run(
    make: Callable[..., None], geometry: Any, outs: Sequence[Any], tensors: Sequence[Any], layouts: Any = None
) -> None:
    """Do what `make(plan, geometry, outs, *tensors)` plans, on NumPy arrays, or CuPy's on the current device.

    Each may be None. `layouts` are the CuPy tensors', if they are known.
    """
    first, arrays = tensors[0], [*outs, *tensors]
    on_cpu = isinstance(first, np.ndarray)
    if on_cpu or layouts is None:
        layouts = _layouts(tensors)
    call = make, geometry, _layouts(outs), layouts, first.dtype == np.float32 and tf32()
    if on_cpu:
        with np.errstate(all="ignore"):  # NaN and infinity pass through, as on a GPU
            _emulated().run(_planned(*call), arrays)
    else:
        import cupy

        addresses = [0 if array is None else array.data.ptr for array in arrays]
        stream = cupy.cuda.get_current_stream().ptr
        run_at(call, addresses, first.data.device_id, stream, partial(_cupys_memory, stream=stream))


def run_at(
    call: tuple[Any, ...], addresses: Sequence[int], device: int, stream: int, allocate: Callable[[int], Memory]
) -> None:
    """`run` for any memory of the device, which is the current one.

    `call` is all that a plan follows from: `make`, `geometry`, layouts of the outs and of the tensors, as tuples of a
    `Layout`'s fields, and whether TF32 is allowed. `allocate` makes memory for what is launched into `stream`.
    """
    _prepared(device, *call).run(addresses, stream, allocate)


class Memory(NamedTuple):
    address: int
    owner: Any


def _cupys_memory(size: int, stream: int) -> Memory:
    import cupy

    if cupy.cuda.runtime.streamIsCapturing(stream):
        graphs = _GraphMemory(size, stream)
        return Memory(graphs.address, graphs)
    memory = cupy.cuda.alloc(size)
    return Memory(memory.ptr, memory)


class _GraphMemory:
    """Memory of the CUDA graph that is being captured: CuPy's pool would give it to others while the graph uses it."""

    def __init__(self, size: int, stream: int) -> None:
        import cupy

        self._runtime, self._stream = cupy.cuda.runtime, stream
        self.address = self._runtime.mallocAsync(size, stream)

    def __del__(self) -> None:
        self._runtime.freeAsync(self.address, self._stream)


def _layouts(arrays: Sequence[Any]) -> Any:
    return tuple([None if array is None else layout_of(array, _address(array)) for array in arrays])


def _address(array: Any) -> int:
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


@functools.lru_cache(maxsize=_REMEMBERED)
def _planned(make: Callable[..., None], geometry: Any, outs: Any, tensors: Any, tf32: bool) -> Plan:
    plan = Plan([None if layout is None else Layout(*layout) for layout in (*outs, *tensors)])
    with allow_tf32(tf32):
        make(plan, geometry, plan.tensors[: len(outs)], *map(plan.addressable, plan.tensors[len(outs) :]))
    return plan


def forget() -> None:
    """All plans, and what they follow from and does not change in a process."""
    _cupys_tf32.cache_clear()
    _planned.cache_clear()
    _prepared.cache_clear()


# ---- the emulated device


class _Emulated:
    """NumPy arrays, and kernels built with g++."""

    def __init__(self) -> None:
        from . import emulator

        self._emulator = emulator

    def run(self, plan: Plan, arrays: Sequence[Any]) -> None:
        buffers = [*arrays, *(self._emulator.empty(s.layout.shape, s.layout.dtype) for s in plan.scratch)]
        for step in plan.steps:
            self.do(step, buffers)

    def do(self, step: Step, buffers: Sequence[Any]) -> None:
        if isinstance(step, Launch):
            arguments = [array_of(buffers, a) if isinstance(a, View) else a for a in step.arguments]
            self.launch(step.kernel, step.grid, step.block, *arguments)
        elif isinstance(step, Zero):
            array_of(buffers, step.view)[...] = 0
        else:
            step.function(*[array_of(buffers, view) for view in step.views])

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        self._emulator.kernel(sources.path(kernel.source), kernel.expression)((grid,), block, args)


_emulated = functools.cache(_Emulated)


def array_of(buffers: Sequence[Any], view: View) -> np.ndarray:
    """A view of NumPy arrays, one for each of a plan's buffers."""
    array = buffers[view.buffer]
    if (array.dtype, array.shape, array.strides, 0) == (view.dtype, view.shape, view.strides, view.offset):
        return array
    address, read_only = array.__array_interface__["data"]
    return dispatch.numpy_at(address + view.offset, view.shape, view.strides, view.dtype, array, read_only)


# ---- a CUDA device


@functools.lru_cache(maxsize=_REMEMBERED)
def _prepared(device: int, *call: Any) -> _Prepared:
    return _Prepared(_planned(*call), device)


class _Prepared:
    """A plan for one device, with all done ahead that needs no address.

    The driver reads a launch's parameters from memory, by a table of where each of them is. CuPy's own launch writes
    both anew, which takes about a microsecond a parameter.
    """

    def __init__(self, plan: Plan, device: int) -> None:
        import cupy

        if np.lib.NumpyVersion(np.__version__) < "2.1.2" and any(v and v.dtype == "bfloat16" for v in plan.tensors):
            raise ImportError(f"bfloat16 CuPy arrays need NumPy 2.1.2 or later, this is {np.__version__}")
        self._cupy, self._device = cupy, device
        self._scratch, self._scratch_bytes = [scratch.offset for scratch in plan.scratch], plan.scratch_bytes
        self._numbers: dict[tuple[int, int], int] = {}  # of each address: a buffer, and an offset in it
        for view in (view for step in plan.steps for view in step.views):
            self._numbers.setdefault((view.buffer, view.offset), len(self._numbers))
        self._pack = struct.Struct(f"{len(self._numbers)}q").pack_into
        self._values = bytearray(_WORD * len(self._numbers))  # of all parameters: the addresses, then those that stay
        self._places: list[int] = []  # in `_values`, of each launch's parameters
        self._steps = [self._step(step) for step in plan.steps]
        self._idle: list[tuple[np.ndarray, np.ndarray, int]] = []  # values and table that no thread launches with

    def run(self, addresses: Sequence[int], stream: int, allocate: Callable[[int], Memory]) -> None:
        bases = [*addresses]
        if self._scratch:
            memory = allocate(self._scratch_bytes)  # goes back when this returns: its next user's work comes after ours
            bases += [memory.address + offset for offset in self._scratch]
        places = [bases[buffer] + offset for buffer, offset in self._numbers]
        try:
            own = self._idle.pop()
        except IndexError:
            own = self._written()
        values, _, table = own
        self._pack(values.data, 0, *places)
        for step in self._steps:
            step(stream, table, places)
        self._idle.append(own)

    def _written(self) -> tuple[np.ndarray, np.ndarray, int]:
        values = np.frombuffer(self._values, np.uint8).copy()
        table = values.ctypes.data + np.array(self._places, np.int64)
        return values, table, table.ctypes.data

    def _step(self, step: Step) -> Callable[..., Any]:
        """A function of a call's stream, the address of its table, and the places that the plan's views begin at."""
        cuda = self._cupy.cuda
        if isinstance(step, Run):
            return partial(self._run, step)
        if isinstance(step, Zero):
            number, size = self._number(step.view), step.view.nbytes
            return lambda stream, table, places: cuda.runtime.memsetAsync(places[number], 0, size, stream)
        kernel, grid, (x, y), arguments = step
        loaded = compiled(kernel, self._device).kernel
        launch, first = cuda.driver.launchKernel, _WORD * len(self._places)
        self._places += map(self._place, arguments)
        return lambda stream, table, places: launch(loaded.ptr, grid, 1, 1, x, y, 1, 0, stream, table + first, 0)

    def _run(self, step: Run, stream: int, table: int, places: Sequence[int]) -> None:
        cupy, arrays = self._cupy, []
        for view in step.views:
            memory = cupy.cuda.UnownedMemory(places[self._number(view)], view.nbytes, None, self._device)
            pointer = cupy.cuda.MemoryPointer(memory, 0)
            arrays.append(cupy.ndarray(view.shape, view.dtype, pointer, view.strides))
        with on_stream(stream):
            step.function(*arrays)

    def _number(self, view: View) -> int:
        return self._numbers[view.buffer, view.offset]

    def _place(self, argument: Any) -> int:
        if isinstance(argument, View):
            return _WORD * self._number(argument)
        self._values.extend(bytes(-len(self._values) % ALIGNMENT))
        place = len(self._values)
        self._values.extend(bytes(_WORD) if argument is None else argument.tobytes())
        return place


def on_stream(stream: int) -> Any:
    """A context in which CuPy works on a stream of another library, of the current device."""
    import cupy

    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, stream)))


@functools.cache
def compiled(kernel: Kernel, device: int) -> Any:
    import cupy

    code = sources.text(kernel.source)
    module = cupy.RawModule(code=code, options=compile_options(), name_expressions=[kernel.expression])
    return module.get_function(kernel.expression)
