"""The only place that compiles and launches kernels: on a GPU through CuPy, or on the emulated one.

Both devices offer the same few things, so that an operator's CUDA path is one piece of Python for either:
`xp` (CuPy or NumPy), `empty`, `matmul` and `launch`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .check import arithmetic

SOURCES = Path(__file__).resolve().parent / "kernels_cu"
if not SOURCES.is_dir():  # an editable install, or a checkout
    SOURCES = Path(__file__).resolve().parent.parent / "kernels_cu"

CTYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
WORKSPACE = 64 << 20  # bytes of scratch memory for one call, unless a single image needs more
LARGEST_GRID = 2**31 - 1


def layout(*parts: tuple[str, type]) -> np.dtype:
    """Of a C++ struct: names of fields, in one string, and their type."""
    return np.dtype([(name, dtype) for names, dtype in parts for name in names.split()], align=True)


_STRIDES = layout(("n c y x", np.int64))


class Kernel(NamedTuple):
    """A template instance: `expression` in `kernels_cu/<source>.cu`."""

    source: str
    expression: str


def ctype(array: Any) -> str:
    return CTYPES[str(array.dtype)]


def strides(array: Any) -> np.ndarray:
    """`Strides` of bilinear.cuh: element strides of an (N, C, H, W) view, or zeros for None."""
    steps = (0, 0, 0, 0) if array is None else tuple(s // array.itemsize for s in array.strides)
    return np.array(steps, _STRIDES)


@functools.cache
def sources_hash() -> str:
    """Of every file in kernels_cu/: CuPy's own cache key does not cover the headers that a source includes."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{SOURCES}", f"-DCUDCN_SOURCES={sources_hash()}")


class _Cuda:
    """The current CUDA device, on the caller's current stream."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.empty = cupy.empty

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        return self.xp.matmul(a, b, out=out)  # two axes: cuBLAS, float32 sums for half types

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        _compiled(kernel, self.xp.cuda.runtime.getDevice())((grid,), block, args)


@functools.cache
def _compiled(kernel: Kernel, device: int) -> Any:
    import cupy

    code = (SOURCES / f"{kernel.source}.cu").read_text()
    module = cupy.RawModule(code=code, options=compile_options(), name_expressions=[kernel.expression])
    return module.get_function(kernel.expression)


class _Emulated:
    """NumPy arrays, and kernels built with g++."""

    xp = np

    def __init__(self) -> None:
        from . import emulator

        self._emulator = emulator
        self.empty = emulator.empty

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        """As cuBLAS does it: half types multiplied and summed in float32, then rounded once."""
        wide = np.matmul(a.astype(arithmetic(a)), b.astype(arithmetic(b)))
        if out is None:
            return wide.astype(a.dtype)
        out[...] = wide
        return out

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        compiled = self._emulator.kernel(SOURCES / f"{kernel.source}.cu", kernel.expression)
        compiled((grid,), block, args)


@contextlib.contextmanager
def device(array: Any) -> Iterator[Any]:
    """The device that `array` lies on, made current."""
    if isinstance(array, np.ndarray):
        yield _Emulated()
    else:
        with array.device:
            yield _Cuda()
