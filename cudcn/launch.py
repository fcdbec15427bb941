"""The only place that compiles and launches kernels: on a GPU through CuPy, or on the emulated one.

Both devices offer the same few things, so that an operator's CUDA path is one piece of Python for either:
`xp` (CuPy or NumPy), `empty` and `launch`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from . import dtypes, sources

WORKSPACE = 64 << 20  # bytes of scratch memory for one call, unless a single image needs more
LARGEST_GRID = 2**31 - 1


_tf32: ContextVar[bool] = ContextVar("_tf32")

_STRIDES = sources.Struct("bilinear.cuh", "Strides")


class Kernel(NamedTuple):
    """A template instance: `expression` in `kernels_cu/<source>.cu`."""

    source: str
    expression: str


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
    return _tf32.get(os.environ.get("CUPY_TF32") == "1")


def ctype(array: Any) -> str:
    return dtypes.of(array).ctype


def address(array: Any) -> int:
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def addressable(array: Any) -> Any:
    """The array; a copy if its elements do not lie at whole steps of their size, in which kernels count."""
    if array is not None:
        size = array.itemsize
        for step in (address(array), *array.strides):
            if step % size:
                return array.copy()
    return array


def strides(array: Any) -> np.ndarray:
    """`Strides` of bilinear.cuh: element strides of an (N, C, H, W) view, or zeros for None."""
    return _strides((0, 0, 0, 0), 1) if array is None else _strides(array.strides, array.itemsize)


@functools.lru_cache(maxsize=1024)
def _strides(strides: tuple[int, ...], itemsize: int) -> np.ndarray:
    n, c, y, x = (stride // itemsize for stride in strides)
    return _STRIDES(n=n, c=c, y=y, x=x)


def compile_options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{sources.FOLDER}", f"-DCUDCN_SOURCES={sources.digest()}")


class _Cuda:
    """The current CUDA device, on the caller's current stream."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.empty = cupy.empty

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        # CuPy would read a struct's fields, which takes 15 us
        args = tuple([a.view(_bytes(a.itemsize)) if type(a) is np.ndarray else a for a in args])
        compiled(kernel, self.xp.cuda.runtime.getDevice())((grid,), block, args)


@functools.cache
def _bytes(count: int) -> np.dtype:
    return np.dtype(("V", count))


@functools.cache
def compiled(kernel: Kernel, device: int) -> Any:
    import cupy

    code = sources.text(kernel.source)
    module = cupy.RawModule(code=code, options=compile_options(), name_expressions=[kernel.expression])
    return module.get_function(kernel.expression)


class _Emulated:
    """NumPy arrays, and kernels built with g++."""

    xp = np

    def __init__(self) -> None:
        from . import emulator

        self._emulator = emulator
        self.empty = emulator.empty

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        compiled = self._emulator.kernel(sources.path(kernel.source), kernel.expression)
        compiled((grid,), block, args)


@contextlib.contextmanager
def device(array: Any) -> Iterator[Any]:
    """The device that `array` lies on, made current."""
    if isinstance(array, np.ndarray):
        with np.errstate(all="ignore"):  # NaN and infinity pass through, as on a GPU
            yield _emulated()
    else:
        if dtypes.of(array) is dtypes.DTYPES["bfloat16"] and np.lib.NumpyVersion(np.__version__) < "2.1.2":
            raise ImportError(f"bfloat16 CuPy arrays need NumPy 2.1.2 or later, this is {np.__version__}")
        with array.device:
            yield _cuda()


_cuda, _emulated = functools.cache(_Cuda), functools.cache(_Emulated)
