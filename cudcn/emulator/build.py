"""Compiles kernels with g++, once for each template instance, and keeps the libraries on disk."""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from .configuration import current_settings
from .errors import BuildError, EmulatorError
from .launch import Compiled

INCLUDE = Path(__file__).resolve().parent / "include"
RUNTIME = INCLUDE.with_name("runtime")

FLAGS = [
    "-std=c++17",
    "-g1",
    "-gdwarf-4",  # of version 5 the assembler of binutils 2.40 mixes up the first two files
    "-march=x86-64-v3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-ffp-contract=off",  # a kernel that wants a fused multiply-add says so
    "-fno-strict-aliasing",  # CUDA code reads floats as float4
    "-fno-gnu-unique",  # else a static in a template is one object for all libraries
    "-U_FORTIFY_SOURCE",  # a checked longjmp refuses to leave a fiber's stack
    "-Wno-unknown-pragmas",
]
KERNEL_FLAGS = {
    "fast": ["-O2"],
    # Without optimisation, so that no access is optimised away before it is checked.
    "check": [
        "-O0",
        "-DEMULATOR_CHECK",
        "-fsanitize=thread,undefined,float-cast-overflow",
        "-fno-sanitize=vptr,return,unreachable,null,nonnull-attribute,object-size",
    ],
    # Without optimisation, so that each access is known by all the calls that led to it.
    "count": ["-O0", "-DEMULATOR_CHECK", "-fsanitize=thread"],
}
RUNTIME_FLAGS = {
    "fast": ["-O2"],
    "check": ["-O2", "-DEMULATOR_CHECK"],
    "count": ["-O2", "-DEMULATOR_CHECK", "-DEMULATOR_COUNT"],
}
# A libstdc++ of its own: Python may have loaded another one.
RUNTIME_LINK = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
# The files of the runtime that a build leaves out.
LEFT_OUT = {
    "fast": {"checker.cpp", "checker_hooks.cpp", "counter.cpp"},
    "check": {"counter.cpp"},
    "count": {"checker.cpp"},
}
# What -march=x86-64-v3 lets g++ use, as /proc/cpuinfo names it (abm is lzcnt).
PROCESSOR = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}

DIGEST = 20  # characters
LEFTOVER = 3600  # seconds: no build takes as long

_kernels: dict[tuple, Compiled] = {}


def kernel(source: Path, expression: str, *, include: Sequence[Path] = (), defines: Sequence[str] = ()) -> Compiled:
    """The kernel `expression` (a function, or an instance of a template) of a `.cu`.

    It is compiled when first asked for, for the build that is in force now. Its directory and those of
    `include` are searched for headers; a change to any file in them compiles it anew. `defines` are
    preprocessor macros, "NAME" or "NAME=value".
    """
    source = Path(source).resolve()
    build = current_settings().build
    folders = [source.parent, *(Path(folder).resolve() for folder in include)]
    state = tuple(_folder_state(folder) for folder in folders)
    request = (source, expression, tuple(folders), tuple(defines), build, str(cache_folder()), state)
    if request not in _kernels:
        if reason := unavailable():
            raise EmulatorError(reason)
        _prepare(cache_folder())
        library = _build_kernel(source, expression, folders, tuple(defines), build)
        try:
            _kernels[request] = Compiled(expression, library)
        except OSError as error:  # such as a place that is mounted noexec
            raise EmulatorError(f"{library} does not load ({error}): set CUDCN_CACHE_DIR to another folder") from None
    return _kernels[request]


def unavailable() -> str | None:
    """Why the emulator cannot run on this machine, whatever is installed there; None if it can."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator runs on Linux on x86-64 only, this is {sys.platform} on {platform.machine()}"
    if missing := PROCESSOR - _processor_flags():
        return f"the emulator needs a processor with AVX2 (x86-64-v3), this one lacks {', '.join(sorted(missing))}"
    return None


@lru_cache
def _processor_flags() -> frozenset[str]:
    with open("/proc/cpuinfo") as file:
        return frozenset(next((line for line in file if line.startswith("flags")), "").split())


# ---- the cache


def cache_folder() -> Path:
    """Where compiled kernels are kept: $CUDCN_CACHE_DIR, or cudcn/emulator in $XDG_CACHE_HOME or ~/.cache."""
    try:
        if given := os.environ.get("CUDCN_CACHE_DIR"):
            return _absolute(Path(given).expanduser())
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # the XDG specification: a relative path there is to be ignored
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "cudcn" / "emulator"
    except RuntimeError as error:  # no home
        raise EmulatorError(f"the emulator has no place for its kernels ({error}): set CUDCN_CACHE_DIR") from None


@lru_cache
def _absolute(folder: Path) -> Path:
    """A relative folder stays where it was when it was first asked for, wherever the process goes later."""
    return folder.absolute()


def _prepare(folder: Path) -> None:
    """Make the cache's folder, and clear away what killed builds have left in it."""
    with _writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    for left in folder.glob("building_*"):
        with contextlib.suppress(OSError):  # another process was quicker
            if time.time() - left.stat().st_mtime > LEFTOVER:
                shutil.rmtree(left)


def _is_cached(library: Path) -> bool:
    """Whether a library is there and whole: loading one that was cut short would end the process."""
    if not library.exists():
        return False
    _check_private(library)
    data = library.read_bytes()
    return data[-DIGEST:] == _digest(data[:-DIGEST]).encode()


def _check_private(path: Path) -> None:
    """Refuse what somebody else could have written: what lies in the cache is run."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        rule = f"it belongs to user {status.st_uid}, and this process is user {os.geteuid()}'s"
    elif status.st_mode & 0o022:
        rule = f"others can write to it (mode {status.st_mode & 0o777:o}; `chmod go-w` forbids that)"
    else:
        return
    raise EmulatorError(f"the emulator runs no kernels from {path}: {rule}. CUDCN_CACHE_DIR names another folder")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmulatorError(
            f"the emulator cannot write its kernels to {folder} ({error}): set CUDCN_CACHE_DIR to a folder of yours"
        ) from None


# ---- building


def _build_kernel(source: Path, expression: str, folders: list[Path], defines: tuple[str, ...], build: str) -> Path:
    runtime = _build_runtime(build)
    text = f'#include "cuda_emulator.h"\n#include "{source}"\nEMULATOR_EXPORT({expression})\n'
    flags = [*FLAGS, *KERNEL_FLAGS[build], f"-I{INCLUDE}"]
    flags += [f"-I{folder}" for folder in folders]
    flags += [f"-D{define}" for define in defines]
    # The runtime's name stands for the compiler and for the emulator's own files.
    key = _digest(runtime.name, text, *flags, source.read_bytes(), *map(_folder_digest, folders))
    library = cache_folder() / f"{source.stem}_{build}_{key}.so"
    if not _is_cached(library):
        # -nodefaultlibs keeps libtsan out; the runtime lies beside the library.
        link = [str(runtime), "-nodefaultlibs", "-lm", "-lc", "-Wl,-rpath,$ORIGIN"]
        _compile(library, text, [*flags, *link])
    return library


def _build_runtime(build: str) -> Path:
    sources = sorted(path for path in RUNTIME.glob("*.cpp") if path.name not in LEFT_OUT[build])
    flags = [*FLAGS, *RUNTIME_FLAGS[build], f"-I{INCLUDE}"]
    # The C library too: one home may serve several machines.
    files = _folder_digest(INCLUDE), _folder_digest(RUNTIME)
    key = _digest(_compiler_version(_compiler()), *platform.libc_ver(), *flags, *files)
    library = cache_folder() / f"libcudcn_emulator_{build}_{key}.so"
    if not _is_cached(library):
        # One translation unit, since parsing the headers takes most of the time.
        text = "".join(f'#include "{path}"\n' for path in sources)
        _compile(library, text, [*flags, *RUNTIME_LINK, f"-Wl,-soname,{library.name}"])
    return library


def _compile(library: Path, text: str, flags: list[str]) -> None:
    """Writes the library under another name first: several processes may build it at once."""
    with _writing(library.parent), tempfile.TemporaryDirectory(dir=library.parent, prefix="building_") as folder:
        source = Path(folder) / "source.cpp"
        source.write_text(text)
        built = Path(folder) / library.name
        command = [_compiler(), "-shared", str(source), *flags, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"g++ failed on\n{text}\n{result.stderr[:8000]}\n{' '.join(command)}")
        built.chmod(0o700)
        with built.open("r+b") as file:
            digest = _digest(file.read())
            file.write(digest.encode())
        os.replace(built, library)


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError(
            "g++ was not found: install it, e.g. `apt-get install g++` or `dnf install gcc-c++`; "
            "the emulator compiles the CUDA kernels with it"
        )
    return compiler


@lru_cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


# ---- what a library was built from


def _folder_state(folder: Path) -> tuple:
    """Changes when a file of the folder does; quick enough for every call."""
    with os.scandir(folder) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in files))


def _folder_digest(folder: Path) -> str:
    return _contents_digest(folder, _folder_state(folder))


@lru_cache(maxsize=64)
def _contents_digest(folder: Path, state: tuple) -> str:
    return _digest(*(part for name, *_ in state for part in (name, (folder / name).read_bytes())))


def _digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:DIGEST]
