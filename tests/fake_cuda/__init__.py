"""A CUDA device that is none: CuPy's own code runs on it, without a GPU. README.md says what is real.

`install()` comes before the process imports CuPy; then CuPy works as on a machine with two GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import build, launches
from .build import LIBRARY, RUNTIME, SUFFIX, Unavailable

__all__ = [
    "ALLOCATING",
    "STREAMED",
    "WAITING",
    "Call",
    "Unavailable",
    "install",
    "install_without_gpu",
    "installed",
    "noted_calls",
    "run_by_turns",
    "synchronize",
]

_library: ctypes.CDLL | None = None


def install() -> None:
    """Give this process its fake devices, building them if need be; Unavailable with the reason where that fails."""
    global _library
    if _library is not None:
        return
    if "cupy" in sys.modules:
        raise Unavailable("CuPy is imported already, with the real CUDA runtime")
    folder = build.build()
    _library = ctypes.CDLL(str(folder / LIBRARY))
    launches.run_on(_library)
    sys.meta_path.insert(0, _Finder(folder))


def installed() -> bool:
    return _library is not None


# Asked in a process of its own: a driver that is loaded stays, and ours could not take its place.
_ASK_THE_DRIVER = """
import ctypes
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
raise SystemExit(driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0)
"""


def install_without_gpu() -> None:
    """`install()`, unless the machine has a CUDA device that can be used."""
    asked = subprocess.run([sys.executable, "-S", "-c", _ASK_THE_DRIVER], capture_output=True, check=False)
    if asked.returncode != 0:
        install()


def synchronize() -> None:
    """Wait for all devices; RuntimeError if a kernel failed."""
    from cupy.cuda import runtime

    before = runtime.getDevice()
    for device in range(runtime.getDeviceCount()):
        runtime.setDevice(device)
        runtime.deviceSynchronize()
    runtime.setDevice(before)


def run_by_turns(streams: Sequence[Any]) -> None:
    """Run what CuPy's streams hold, one task of each in turn: as far apart as a device may run one stream's work."""
    library: Any = _library
    library.fake_run_by_turns(
        (ctypes.c_void_p * len(streams))(*(s.ptr for s in streams)), ctypes.c_size_t(len(streams))
    )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds our build of CuPy's module."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"runtime{SUFFIX}"

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != RUNTIME:
            return None
        return importlib.util.spec_from_file_location(name, self._file, loader=_Loader(name, str(self._file)))


class _Loader(importlib.machinery.ExtensionFileLoader):
    """Our library's functions come first, though torch may have loaded CUDA's for everybody."""

    def create_module(self, spec: Any) -> Any:
        flags = sys.getdlopenflags()
        sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
        try:
            return super().create_module(spec)
        finally:
            sys.setdlopenflags(flags)


# What goes to a stream, what makes the host wait, and what asks for memory or returns it.
STREAMED = {"cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync"}
WAITING = {
    "cudaDeviceSynchronize", "cudaEventQuery", "cudaEventSynchronize", "cudaFree", "cudaFreeHost", "cudaMemcpy",
    "cudaStreamQuery", "cudaStreamSynchronize",
}  # fmt: skip
ALLOCATING = {"cudaFree", "cudaFreeAsync", "cudaFreeHost", "cudaHostAlloc", "cudaMalloc", "cudaMallocAsync"}


class Call(NamedTuple):
    """A call of CUDA's runtime or driver, on the current `device`; `stream` is 0 where it names none."""

    name: str
    stream: int
    device: int


class _Call(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("stream", ctypes.c_size_t), ("device", ctypes.c_int))


@contextlib.contextmanager
def noted_calls() -> Iterator[list[Call]]:
    """All calls made in the `with` block, by any thread; the list is filled when it ends."""
    library: Any = _library
    calls: list[Call] = []
    library.fake_note_calls(1)
    try:
        yield calls
        call = _Call()
        while library.fake_call(ctypes.c_size_t(len(calls)), ctypes.byref(call)):
            calls.append(Call(call.name.decode(), call.stream, call.device))
    finally:
        library.fake_note_calls(0)
