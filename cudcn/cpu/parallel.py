"""Work spread over threads: NumPy's and SciPy's inner loops release the interpreter lock."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_WORTH_A_THREAD = 512 << 10  # bytes; starting a thread takes as long as some 100 KB of columns
Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """CUDCN_NUM_THREADS, or the cores that this process may use."""
    if wanted := os.environ.get("CUDCN_NUM_THREADS"):
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ValueError(f"CUDCN_NUM_THREADS must be a positive number, got {wanted!r}")
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered(work: Callable[[Item], Result], items: Sequence[Item], size: int) -> Iterable[Result]:
    """The results of `work`, in the items' order, so that what is summed from them is always the same.

    `size` is the bytes of all the work. The pool lives for one call, so none is left behind for a fork to break.
    """
    workers = min(threads(), len(items), 1 + size // _WORTH_A_THREAD)
    if workers == 1:
        yield from map(work, items)
        return
    with single_threaded_blas(), ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, items)


@functools.cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Reader and setter of the thread count of the OpenBLAS inside NumPy's wheels, if it is that."""
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        with contextlib.suppress(AttributeError):
            get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}")
            return get, getattr(library, f"{prefix}openblas_set_num_threads{suffix}")
    return None


_lock = threading.Lock()
_users = 0
_restored = 1


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Matrix products run on the thread that asks for them, or our threads and OpenBLAS's get in each other's way.

    The count is OpenBLAS's own, for the whole process, so the last of several callers puts it back.
    """
    global _users, _restored
    blas = _openblas()
    if blas is None:
        yield
        return
    get, set_ = blas
    with _lock:
        if _users == 0:
            _restored = get()
            set_(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                set_(_restored)


def blocks(pixels: int, images: int, bytes_per_pixel: int, most: int = 8 << 20) -> list[tuple[int, slice]]:
    """(image, slice of its pixels) of each piece of work, `most` bytes or less; enough for all threads if worth it."""
    size = pixels * bytes_per_pixel
    per_image = max(min(-(-threads() // images), 1 + size // _WORTH_A_THREAD), -(-size // most))
    step = max(1, -(-pixels // per_image))
    return [(n, slice(p, min(p + step, pixels))) for n in range(images) for p in range(0, pixels, step)]
