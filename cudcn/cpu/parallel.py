"""Work spread over threads: NumPy's and SciPy's inner loops release the interpreter lock."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import ctypes
import functools
import itertools
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

SCRATCH = 40 << 20  # bytes that all pieces worked on at a time may need
HELD = 16 << 20  # bytes that images held at a time may take, if they are more than one
_STRIP = 1 << 20  # bytes copied at a time
_WORTH_A_THREAD = 512 << 10  # bytes; starting a thread takes as long as some 100 KB of columns
Item = TypeVar("Item")
Result = TypeVar("Result")

_limit: contextvars.ContextVar[int] = contextvars.ContextVar("limit")


@contextlib.contextmanager
def limit(count: int) -> Iterator[None]:
    """At most `count` threads for what this thread calls meanwhile, unless CUDCN_NUM_THREADS is set."""
    token = _limit.set(count)
    try:
        yield
    finally:
        _limit.reset(token)


def threads() -> int:
    """CUDCN_NUM_THREADS; else the cores that this process may use, or OMP_NUM_THREADS or a `limit` below that."""
    if wanted := os.environ.get("CUDCN_NUM_THREADS"):
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ValueError(f"CUDCN_NUM_THREADS must be a positive number, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    openmp = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))  # of a list, the outermost level's
    return int(min(cores, _quota(), int(openmp[1]) if openmp else cores, _limit.get(cores)))


@functools.cache
def _quota(root: str = "/") -> float:
    """The cores' worth of time that this process's control groups leave it, rounded up."""
    quotas = [math.inf]
    for line in _read(pathlib.Path(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = pathlib.Path(root, "sys/fs/cgroup", "cpu" if controllers else "")
        group = mount / path.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(mount.parts)]):
            if controllers:  # version 1
                limits = [_read(place / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                limits = _read(place / "cpu.max").split()
            if len(limits) == 2 and all(limit.strip().isdecimal() for limit in limits):  # else "max", -1, or no file
                quotas.append(max(1, math.ceil(int(limits[0]) / int(limits[1]))))
    return min(quotas)


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Team:
    """Threads that work on one piece after another."""

    def __init__(self, workers: int, executor: ThreadPoolExecutor | None) -> None:
        self._workers, self._executor = workers, executor

    def ordered(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of `work`, in the items' order, so that what is summed from them is always the same."""

        @np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
        def quietly(item: Item) -> Result:
            return work(item)

        if self._executor is None:
            yield from map(quietly, items)
            return
        pending: collections.deque[Future[Result]] = collections.deque()
        for item in items:
            if len(pending) == 2 * self._workers:  # results that wait take memory too
                yield pending.popleft().result()
            pending.append(self._executor.submit(quietly, item))
        while pending:
            yield pending.popleft().result()

    def each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """`work` on all items, before this returns."""
        collections.deque(self.ordered(work, items), maxlen=0)

    def copy(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Each pair's second array into its first, some rows at a time."""
        strips = []
        for target, source in pairs:
            step = max(1, _STRIP * len(source) // max(1, source.nbytes))
            rows = (slice(row, row + step) for row in range(0, len(source), step))
            strips += [(target[row], source[row]) for row in rows]
        self.each(lambda strip: np.copyto(*strip, casting="unsafe"), strips)


@contextlib.contextmanager
def team(size: int, scratch: int = 0) -> Iterator[Team]:
    """For pieces that are worked on in `scratch` bytes each, and in `size` bytes all together.

    It lives for one call, so no thread is left behind for a fork to break.
    """
    _keep_freed_memory()
    workers = min(threads(), 1 + size // _WORTH_A_THREAD, max(1, SCRATCH // max(1, scratch)))
    with single_threaded_blas():
        if workers == 1:
            yield Team(1, None)
        else:
            with ThreadPoolExecutor(workers) as executor:
                yield Team(workers, executor)


@functools.cache
def _keep_freed_memory() -> None:
    """Once: glibc returns memory beyond twice the largest array that was ever freed, to fetch it again page by page.

    Blocks are of a few MiB, and would pay that each time.
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)  # untouched, so it costs nothing; glibc heeds no larger ones


def batches(images: int, size: int) -> Iterator[range]:
    """The images to hold at a time, of `size` bytes each."""
    step = max(1, HELD // max(1, size))
    return (range(n, min(n + step, images)) for n in range(0, images, step))


def tiles(height: int, width: int, size: int) -> list[tuple[slice, slice]]:
    """Rows and columns of tiles that have about `size` places: some rows, or part of one row."""
    down, across = max(1, min(height, round(size / width))), max(1, min(width, size))
    return [
        (slice(y, min(y + down, height)), slice(x, min(x + across, width)))
        for y, x in itertools.product(range(0, height, down), range(0, width, across))
    ]


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


def _in_child() -> None:
    """After a fork nobody but this thread is left, to use BLAS or to hold the lock."""
    global _users
    blas = _openblas()
    if blas is not None and _users:
        _users = 0
        blas[1](_restored)
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)
