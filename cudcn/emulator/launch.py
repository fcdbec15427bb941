"""Launches of a compiled kernel: arguments checked against its C++ signature, then handed to the runtime."""

import ctypes
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

from .configuration import ORDERS, current_settings
from .counts import collect
from .errors import EmulatorError
from .lines import source_lines
from .memory import overlap, span_of

# The parameter kinds and the two structures are those of include/emulator_runtime.h.
VALUE, CONST_POINTER, POINTER = range(3)

MAX_THREADS = 1024
MAX_BLOCK_Z = 64
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_MEMORY = 227 * 1024

ERROR_SIZE = 4096


class _Argument(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("offset", ctypes.c_size_t),
        ("kind", ctypes.c_int),
    ]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("strict", ctypes.c_int),
        ("sample", ctypes.c_uint64),
        ("argument_count", ctypes.c_int),
        ("arguments", ctypes.POINTER(_Argument)),
        ("error", ctypes.c_void_p),
        ("error_size", ctypes.c_size_t),
    ]


# The runtime runs one launch at a time, and ctypes releases the interpreter lock.
_launch_lock = threading.Lock()


def _unlock() -> None:
    """In a forked process, whose parent may have been launching."""
    global _launch_lock
    _launch_lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)


class Compiled:
    """One compiled kernel, called as `kernel(grid, block, arguments, shared_mem)`."""

    def __init__(self, expression: str, library: Path):
        self.expression = expression
        self._library = library
        loaded = ctypes.CDLL(str(library), mode=ctypes.DEFAULT_MODE)
        self._launch = loaded.cudcn_launch
        loaded.cudcn_signature.restype = ctypes.POINTER(ctypes.c_int)
        signature = loaded.cudcn_signature()
        count = signature[0]
        self._kinds = signature[1 : 1 + count]
        self._sizes = signature[1 + count : 1 + 2 * count]
        self._counts = getattr(loaded, "cudcn_counts", None)  # in the counting build

    def __repr__(self) -> str:
        return f"<emulated kernel {self.expression}>"

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        """Run all blocks, and return when they are done. Arrays go to pointers; `None` is a null pointer."""
        grid = _three(grid)
        block = _three(block)
        _check_launch(self.expression, grid, block, shared_mem)
        values, arguments = self._arguments(args)
        active = current_settings()
        error = ctypes.create_string_buffer(ERROR_SIZE)
        config = _LaunchConfig(
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(*block),
            dynamic_shared=shared_mem,
            order=ORDERS.index(active.order),
            seed=active.seed,
            strict=active.strict,
            sample=active.sample,
            argument_count=len(arguments),
            arguments=(_Argument * len(arguments))(*arguments),
            error=ctypes.addressof(error),
            error_size=ERROR_SIZE,
        )
        with _launch_lock:
            failed = self._launch(ctypes.byref(config))
            if self._counts and not failed:
                blocks = min(active.sample or math.prod(grid), math.prod(grid))
                collect(self._counts, self._library, self.expression, grid, block, blocks)
        del values  # the launch read them through their addresses
        if failed:
            message = error.value.decode(errors="replace")
            raise EmulatorError(f"{self.expression}: {_with_source_lines(message, self._library)}")

    def _arguments(self, args: tuple) -> tuple[list[np.ndarray], list[_Argument]]:
        if len(args) != len(self._kinds):
            raise TypeError(f"{self.expression} takes {len(self._kinds)} arguments, got {len(args)}")
        values, arguments, spans = [], [], []
        for index, (arg, kind, size) in enumerate(zip(args, self._kinds, self._sizes, strict=True)):
            if kind == VALUE:
                value = self._value(index, arg, size)
                values.append(value)
                arguments.append(_Argument(value.ctypes.data, size, 0, kind))
            else:
                self._check_pointer(index, arg, kind)
                span = span_of(np.empty(0) if arg is None else arg)
                spans.append((index, kind, span))
                arguments.append(_Argument(span.address, span.size, span.offset, kind))
        self._check_overlaps(spans)
        return values, arguments

    def _value(self, index: int, arg: Any, size: int) -> np.ndarray:
        where = f"{self.expression}: argument {index}"
        is_value = isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.ndim == 0)
        if not is_value:
            raise TypeError(f"{where} is a value of {size} bytes: pass a NumPy scalar, not {_describe(arg)}")
        if arg.nbytes != size:
            raise TypeError(f"{where} is a value of {size} bytes, got {arg.nbytes} bytes of {arg.dtype}")
        return np.array(arg)  # aligned, whatever `arg` is a view of

    def _check_pointer(self, index: int, arg: Any, kind: int) -> None:
        where = f"{self.expression}: argument {index}"
        if arg is None:
            return
        if not isinstance(arg, np.ndarray) or arg.ndim == 0:
            raise TypeError(f"{where} is a pointer: pass an array or None, not {_describe(arg)}")
        if arg.dtype.hasobject:
            raise TypeError(f"{where} is an array of Python objects")
        if kind == POINTER and not arg.flags.writeable:
            raise ValueError(f"{where} may be written by the kernel, and the array is read-only")

    def _check_overlaps(self, spans: list) -> None:
        for position, (index, kind, span) in enumerate(spans):
            for other_index, other_kind, other_span in spans[:position]:
                if POINTER in (kind, other_kind) and overlap(span, other_span):
                    raise ValueError(
                        f"{self.expression}: arguments {other_index} and {index} overlap in memory, "
                        "and the kernel may write to one of them"
                    )


def _describe(arg: Any) -> str:
    if isinstance(arg, np.ndarray):
        return f"an array of shape {arg.shape}"
    return f"{arg!r} ({type(arg).__name__})"


def _three(dimensions: tuple) -> tuple[int, int, int]:
    x, y, z = (*(int(length) for length in dimensions), 1, 1, 1)[:3]
    return x, y, z


def _check_launch(expression: str, grid: tuple, block: tuple, shared_mem: int) -> None:
    def refuse(reason: str) -> None:
        raise EmulatorError(f"{expression}: invalid launch configuration: {reason}")

    if min(grid) < 1 or min(block) < 1:
        refuse(f"grid {grid} and block {block} must be at least 1 in each dimension")
    threads = block[0] * block[1] * block[2]
    if threads > MAX_THREADS:
        refuse(f"block {block} has {threads} threads, at most {MAX_THREADS}")
    if block[2] > MAX_BLOCK_Z:
        refuse(f"block {block} is {block[2]} deep in z, at most {MAX_BLOCK_Z}")
    if any(length > limit for length, limit in zip(grid, MAX_GRID, strict=True)):
        refuse(f"grid {grid}, at most {MAX_GRID}")
    if not 0 <= shared_mem <= MAX_SHARED_MEMORY:
        refuse(f"{shared_mem} bytes of dynamic shared memory, at most {MAX_SHARED_MEMORY}")


def _with_source_lines(message: str, library: Path) -> str:
    """Replaces each "@pc=..." by the source line, if addr2line (of binutils) is there to tell it."""
    return re.sub(r" @pc=([0-9a-f]+)", lambda match: _source_line(match[1], library), message)


def _source_line(offset: str, library: Path) -> str:
    (places,) = source_lines([int(offset, 16)], library).values()
    return f" ({' < '.join(places)})" if places else ""
