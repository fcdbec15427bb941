"""What a launch does: the package's kernels run on its emulator, CuPy's own few in NumPy.

A launch arrives as CUDA's driver would get it: the kernel's mangled name, and each parameter's bytes, as many as the
cubin's own table says.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cudcn import emulator, sources
from cudcn.emulator.launch import POINTER, VALUE

FOLDERS = (sources.FOLDER, Path(__file__).resolve().parent.parent / "emulator" / "kernels")


class _Launch(ctypes.Structure):
    """driver.cpp's."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("count", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
    )


class _Block(ctypes.Structure):
    """device.h's: memory from one call of cudaMalloc."""

    _fields_ = (
        ("begin", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("device", ctypes.c_int),
        ("released", ctypes.c_bool),
    )


_Callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Launch))
_library: Any = None


def run_on(library: ctypes.CDLL) -> None:
    """From now on this module runs what is launched on the library's devices."""
    global _library
    _library = library
    library.fake_run_launches_by(_run)


@contextlib.contextmanager
def without_running() -> Iterator[None]:
    """Launches are noted and dropped: for the host's time alone."""
    _library.fake_run_launches_by(None)
    try:
        yield
    finally:
        _library.fake_run_launches_by(_run)


@_Callback
def _run(pointer: Any) -> None:
    launch = pointer.contents
    name = launch.kernel.decode()
    values = [ctypes.string_at(launch.values[i], launch.sizes[i]) for i in range(launch.count)]
    try:
        if name.startswith("cupy_"):
            _run_cupy(name, launch.device, values)
        else:
            _run_emulated(name, launch, values)
    except Exception as error:  # the next call that waits for the device raises it
        _library.fake_fail(f"{name}: {type(error).__name__}: {error}".encode())


# ---- the package's kernels


def _run_emulated(name: str, launch: _Launch, values: list[bytes]) -> None:
    source, expression = _definition(name)
    kernel = emulator.kernel(source, expression, include=FOLDERS)
    sizes = [size if kind == VALUE else 8 for kind, size in zip(kernel._kinds, kernel._sizes, strict=True)]
    if sizes != [len(value) for value in values]:
        raise TypeError(f"g++ has parameters of {sizes} bytes, NVRTC of {[len(value) for value in values]}")
    pointers = {i: int.from_bytes(values[i], "little") for i, kind in enumerate(kernel._kinds) if kind != VALUE}
    written = [address for i, address in pointers.items() if kernel._kinds[i] == POINTER]
    spans = _spans({address for address in pointers.values() if address}, written, launch.device)
    arguments = [
        np.void(value) if kind == VALUE else spans.get(pointers[i])
        for i, (kind, value) in enumerate(zip(kernel._kinds, values, strict=True))
    ]
    kernel(tuple(launch.grid), tuple(launch.block), tuple(arguments), launch.shared)


@functools.cache
def _definition(name: str) -> tuple[Path, str]:
    """The file that defines a kernel, and the expression that C++ has for it."""
    demangled = _demangle(name)
    expression = re.sub(r"^void |\(.*\)$", "", demangled)
    function = expression.partition("<")[0]
    for folder in FOLDERS:
        for path in sorted(folder.glob("*.cu")):
            if re.search(rf"__global__[^;{{}}]*\b{function}\(", path.read_text()):
                return path, expression
    raise LookupError(f"no .cu file defines {function}")


def _demangle(name: str) -> str:
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    address = demangle(name.encode(), None, None, None)
    if address is None:
        return name  # it is extern "C"
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text


def _spans(addresses: set[int], written: list[int], device: int) -> dict[int, np.ndarray]:
    """For each address the memory that a kernel may go to from there, as an array.

    That is its whole block. But CuPy's pool hands out parts of one, and the emulator takes no arguments that overlap
    if one is written: then they share the block out, each up to the next.
    """
    spans = {}
    blocks = {address: _block(address, device) for address in addresses}
    for address, (begin, end) in blocks.items():
        neighbours = [other for other in addresses if blocks[other] == (begin, end)]
        if any(other in written for other in neighbours):
            end = min([other for other in neighbours if other > address], default=end)
            begin = address if address > min(neighbours) else begin
        spans[address] = _memory_around(address, begin, end)
    return spans


def _block(address: int, device: int) -> tuple[int, int]:
    """From where to where the memory goes that an address is in."""
    block = _Block()
    _library.fake_block(ctypes.c_void_p(address), ctypes.byref(block))
    if not block.begin:
        raise ValueError(f"{address:#x} is no address of device memory")
    if block.released:
        raise ValueError(f"{address:#x} is memory that has been freed")
    if block.device != device:
        raise ValueError(f"{address:#x} is memory of device {block.device}, the kernel runs on device {device}")
    return block.begin, block.begin + block.size


def _memory_around(address: int, begin: int, end: int) -> np.ndarray:
    """An array over [begin, end) whose first element is at `address`: rows go up from there, columns down."""
    memory = (ctypes.c_char * (end - begin)).from_address(begin)
    return np.ndarray((address - begin + 1, end - address), np.uint8, memory, address - begin, (-1, 1))


# ---- CuPy's


def _run_cupy(name: str, device: int, values: list[bytes]) -> None:
    """An elementwise kernel, such as cupy_add__float32_float32_float32; the last parameter is the index's shape."""
    operation, _, types = name.removeprefix("cupy_").partition("__")
    if operation == "fill":  # a value and an array, of one type that is not named
        value, target = values[:2]
        _array(target, np.dtype(f"V{len(value)}"), device)[...] = np.void(value)
        return
    *inputs, out = (_operand(v, t, device) for v, t in zip(values, types.split("_"), strict=False))
    function = np.positive if operation == "copy" else getattr(np, operation)
    out[...] = function(*inputs)


def _operand(value: bytes, name: str, device: int) -> Any:
    if len(value) <= 8:  # a number, of Python's `float` in whatever size CuPy chose
        return np.frombuffer(value, f"f{len(value)}" if name == "float" else name)[0]
    return _array(value, np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name), device)


def _array(value: bytes, dtype: np.dtype, device: int) -> np.ndarray:
    """CuPy's CArray: address, size, shape and strides."""
    address, size, *rest = np.frombuffer(value, np.int64).tolist()
    shape, strides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    if size == 0:
        return np.empty(shape, dtype)
    steps = [step * (length - 1) for step, length in zip(strides, shape, strict=True)]
    low = address + sum(step for step in steps if step < 0)
    high = address + sum(step for step in steps if step > 0) + dtype.itemsize
    begin, end = _block(address, device)
    if low < begin or high > end:
        raise ValueError(f"an array from {low:#x} to {high:#x} is not within its memory, {begin:#x} to {end:#x}")
    return np.ndarray(shape, dtype, (ctypes.c_char * (high - low)).from_address(low), address - low, strides)
