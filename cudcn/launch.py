"""The only place that compiles and launches kernels: on a GPU through CuPy, or on the emulated one.

Both devices offer the same few things, so that an operator's CUDA path is one piece of Python for either:
`xp` (CuPy or NumPy), `empty`, `matmul` and `launch`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import dtypes, sources

WORKSPACE = 64 << 20  # bytes of scratch memory for one call, unless a single image needs more
LARGEST_GRID = 2**31 - 1


_STRIDES = sources.Struct("bilinear.cuh", "Strides")


class Kernel(NamedTuple):
    """A template instance: `expression` in `kernels_cu/<source>.cu`."""

    source: str
    expression: str


def ctype(array: Any) -> str:
    return dtypes.of(array).ctype


def address(array: Any) -> int:
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def addressable(array: Any) -> Any:
    """The array; a copy if its elements do not lie at whole steps of their size, in which kernels count."""
    if array is None or not any(at % array.itemsize for at in (address(array), *array.strides)):
        return array
    return array.copy()


def strides(array: Any) -> np.ndarray:
    """`Strides` of bilinear.cuh: element strides of an (N, C, H, W) view, or zeros for None."""
    n, c, y, x = (0, 0, 0, 0) if array is None else (s // array.itemsize for s in array.strides)
    return _STRIDES(n=n, c=c, y=y, x=x)


def compile_options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{sources.FOLDER}", f"-DCUDCN_SOURCES={sources.digest()}")


class _Cuda:
    """The current CUDA device, on the caller's current stream."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.empty = cupy.empty

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        """out = a @ b, of matrices; `out` is C-contiguous, of the type of sums, so that nothing is summed in half.

        By cuBLAS itself, as CuPy's matmul has results of half types, and copies what lies between other elements.
        """
        from cupy_backends.cuda.libs import cublas

        runtime = self.xp.cuda.runtime
        types = {
            "float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF,
            "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
        }  # fmt: skip
        compute = cublas.CUBLAS_COMPUTE_64F if out.dtype == np.float64 else cublas.CUBLAS_COMPUTE_32F
        one, zero = np.ones(1, out.dtype), np.zeros(1, out.dtype)
        (a, order_a, step_a), (b, order_b, step_b) = self._operand(a), self._operand(b)
        # cuBLAS has its matrices column by column, so to it these are their transposes: out' = b' @ a'
        cublas.gemmEx(
            self.xp.cuda.device.get_cublas_handle(), order_b, order_a, out.shape[1], out.shape[0], a.shape[1],
            one.ctypes.data, b.data.ptr, types[b.dtype.name], step_b, a.data.ptr, types[a.dtype.name], step_a,
            zero.ctypes.data, out.data.ptr, types[out.dtype.name], out.shape[1], compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def _operand(self, matrix: Any) -> tuple[Any, int, int]:
        """The matrix, cuBLAS's word for how its transpose is stored, and the elements from one line to the next."""
        from cupy_backends.cuda.libs import cublas

        for order, line, along in (cublas.CUBLAS_OP_N, 0, 1), (cublas.CUBLAS_OP_T, 1, 0):
            step, length = matrix.strides[line] // matrix.itemsize, matrix.shape[along]
            one_line = matrix.shape[line] == 1
            if matrix.strides[along] == matrix.itemsize and (one_line or step >= length):
                return matrix, order, length if one_line else step
        return self.xp.ascontiguousarray(matrix), cublas.CUBLAS_OP_N, matrix.shape[1]

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        _compiled(kernel, self.xp.cuda.runtime.getDevice())((grid,), block, args)


@functools.cache
def _compiled(kernel: Kernel, device: int) -> Any:
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

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        np.matmul(a.astype(out.dtype), b.astype(out.dtype), out=out)

    def launch(self, kernel: Kernel, grid: int, block: tuple[int, int], *args: Any) -> None:
        compiled = self._emulator.kernel(sources.path(kernel.source), kernel.expression)
        compiled((grid,), block, args)


@contextlib.contextmanager
def device(array: Any) -> Iterator[Any]:
    """The device that `array` lies on, made current."""
    if isinstance(array, np.ndarray):
        with np.errstate(all="ignore"):  # NaN and infinity pass through, as on a GPU
            yield _Emulated()
    else:
        if str(array.dtype) == "bfloat16" and np.lib.NumpyVersion(np.__version__) < "2.1.2":
            raise ImportError(f"bfloat16 CuPy arrays need NumPy 2.1.2 or later, this is {np.__version__}")
        with array.device:
            yield _Cuda()
