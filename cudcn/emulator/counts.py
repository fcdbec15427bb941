"""What the counting build has counted."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from .configuration import settings
from .lines import source_lines


class Event(NamedTuple):
    """The instructions of warps at one place of a kernel: the lanes' k-th time there is one instruction."""

    name: str  # "load", "store", "atomic", "copy" (cp.async: one event each for source and destination), or what waits
    shared: bool
    size: int  # bytes of a lane's access; 0 where nothing is accessed
    instructions: int
    lanes: int  # that took part, over all instructions
    lines: int  # of 128 bytes, in global memory
    sectors: int  # of 32 bytes, in global memory
    wavefronts: int  # in shared memory
    where: tuple[str, ...]  # "file:line" of the kernel's sources: the place, its caller, ...


class Counts(NamedTuple):
    """Of one launch."""

    expression: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    blocks: int  # that were run
    loaded_sectors: int  # of global memory: those that a block loads at all, each once a block
    events: list[Event]


_collected: list[Counts] | None = None


@contextmanager
def counts(sample: int = 0) -> Iterator[list[Counts]]:
    """Builds kernels so that they count, and yields a list that each launch inside adds to.

    With `sample`, a launch runs only so many of its blocks, spread over the grid.
    """
    global _collected
    before, _collected = _collected, []
    try:
        with settings(build="count", sample=sample):
            yield _collected
    finally:
        _collected = before


# ---- from the runtime, whose structures these are (runtime/counter.cpp)

_MAX_FRAMES = 32


class _Frame(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("at", ctypes.c_uint64)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_uint64) for name in Event._fields[1:-1]),
        ("addresses", ctypes.c_uint64),
        ("frame_count", ctypes.c_uint64),
        ("frames", _Frame * _MAX_FRAMES),
    ]


def collect(read: Any, library: Path, expression: str, grid: tuple, block: tuple, blocks: int) -> None:
    """Adds a launch to the list of the innermost `counts`; `read` is the runtime's cudcn_counts."""
    if _collected is None:
        return
    first, loaded_sectors = ctypes.POINTER(_Event)(), ctypes.c_uint64()
    read.restype = ctypes.c_size_t
    events = first[: read(ctypes.byref(first), ctypes.byref(loaded_sectors))]
    frames = [frame for event in events for frame in event.frames[: event.frame_count]]
    lines = source_lines({frame.at for frame in frames if frame.file is None}, library)

    def where(event: _Event) -> Iterator[str]:
        for frame in event.frames[: event.frame_count]:
            if frame.file is None:
                yield from lines[frame.at]
            else:
                yield f"{Path(frame.file.decode()).name}:{frame.at}"

    found: dict[Any, Event] = {}
    for event in events:
        numbers = {name: getattr(event, name) for name in Event._fields[2:-1]}
        counted = Event(
            name=event.name.decode(), shared=bool(event.shared), **numbers, where=_without_repeats(where(event))
        )
        # A line that names the same element twice loads it once.
        found[counted, event.addresses if counted.name == "load" else len(found)] = counted
    _collected.append(Counts(expression, grid, block, blocks, loaded_sectors.value, list(found.values())))


def _without_repeats(lines: Iterator[str]) -> tuple[str, ...]:
    """A place that the emulator's headers tell of is also where they were called."""
    return tuple(line for line, _ in groupby(lines))
