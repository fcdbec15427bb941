"""Builds the fake CUDA device for the CuPy that is installed, once, into the emulator's cache folder.

CuPy's module `runtime` has CUDA's runtime inside, so it is compiled again, from CuPy's own source archive.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cudcn.emulator.build import _digest, cache_folder

HERE = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LIBRARY = "libcuda.so.1"  # the name under which CuPy opens the driver; ours has the runtime in it, too
CUPY = "14.2.0"  # which functions it needs, and which constants its source is compiled with, was read in this version
RUNTIME = "cupy_backends.cuda.api.runtime"
TOOLS = ("cython", "nvidia-cuda-crt", "nvidia-cuda-profiler-api", "nvidia-cuda-runtime")
CONSTANTS = {
    "CUPY_CUDA_VERSION": 13000, "CUPY_HIP_VERSION": 0, "CUPY_CUFFT_STATIC": False, "CUPY_USE_CUDA_PYTHON": False,
}  # fmt: skip


class Unavailable(Exception):
    """Why the fake device cannot be built here."""


def build() -> Path:
    """The folder with the library and CuPy's module."""
    versions = _requirements()
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h") or path.name == "build.py")
    contents = (part for path in sources for part in (path.name, path.read_bytes()))
    folder = cache_folder() / "fake_cuda" / _digest(str(SUFFIX), sys.base_prefix, *versions, *contents)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / "lock"):
        if not folder.exists():
            for abandoned in folder.parent.glob("building_*"):
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building_") as scratch:
                _build(Path(scratch))
                (Path(scratch) / "done").rename(folder)
    return folder


def _requirements() -> list[str]:
    """The versions of all that goes into a build."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"it runs on Linux on x86-64 only, this is {sys.platform} on {platform.machine()}")
    versions = []
    for name in (f"cupy-cuda{CONSTANTS['CUPY_CUDA_VERSION'] // 1000}x", "numpy", *TOOLS):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            raise Unavailable(f"{name} is not installed") from None
    if versions[0].split()[1] != CUPY:
        raise Unavailable(f"it is written for CuPy {CUPY}, this is {versions[0]}")
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} was not found")
    return [*versions, _run(["g++", "--version"])]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> None:
    done, objects = folder / "done", folder / "objects"
    done.mkdir()
    objects.mkdir()
    with ThreadPoolExecutor() as pool:
        compiled = pool.submit(_compile_module, RUNTIME, folder)
        ours = [*pool.map(lambda source: _compile(source, objects), HERE.glob("*.cpp"))]
        runtime = compiled.result()
    missing = _undefined(runtime)
    for path in ours:
        missing -= _defined(path)
    stubs = folder / "unimplemented.cpp"
    stubs.write_text(_unimplemented(missing))
    ours.append(_compile(stubs, objects))
    library = done / LIBRARY
    flags = ["-shared", f"-Wl,-soname,{LIBRARY}"]
    _run(["g++", *flags, "-static-libstdc++", "-static-libgcc", *map(str, ours), "-o", str(library)])
    module = done / f"runtime{SUFFIX}"
    _run(["g++", "-shared", str(runtime), str(library), "-Wl,-rpath,$ORIGIN", "-o", str(module)])


def _compile_module(name: str, folder: Path) -> Path:
    """One of CuPy's Cython modules."""
    root = _cupy_source(folder)
    source = root / (name.replace(".", "/") + ".pyx")
    version = importlib.metadata.version("cython")
    constants = ",".join(f"{key}={value}" for key, value in {**CONSTANTS, "CUPY_CYTHON_VERSION": version}.items())
    translated = folder / f"{source.stem}.cpp"
    cython = [sys.executable, "-m", "cython", "--cplus", "-3", "-X", "embedsignature=False"]
    _run([*cython, "-E", constants, str(source.relative_to(root)), "-o", str(translated)], cwd=root)
    return _compile(translated, folder, [root, root / "cupy_backends" / "cuda", source.parent])


def _cupy_source(folder: Path) -> Path:
    """CuPy's source archive, unpacked. The archive is kept: only the first build needs the network."""
    name = f"cupy-{CUPY}"
    archive = cache_folder() / "fake_cuda" / f"{name}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", f"cupy=={CUPY}", "--no-deps", "--no-binary", "cupy"]
        # a stub: pip asks every source archive for its metadata, and CuPy's would look for a CUDA toolkit
        _run([*command, "--dest", str(folder)], env={**os.environ, "CUPY_INSTALL_USE_STUB": "1"})
        (folder / archive.name).rename(archive)
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder, filter="data")
    return folder / name


def _compile(source: Path, folder: Path, include: Sequence[Path] = ()) -> Path:
    import numpy

    places = [HERE, *include, *_cuda_headers(), Path(sysconfig.get_paths()["include"]), Path(numpy.get_include())]
    compiled = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", *(f"-I{place}" for place in places)]
    _run(["g++", *flags, "-c", str(source), "-o", str(compiled)])
    return compiled


def _cuda_headers() -> list[Path]:
    import nvidia

    return [folder for root in nvidia.__path__ for folder in Path(root).glob("*/include")]


# ---- functions that nobody has needed yet


def _unimplemented(names: set[str]) -> str:
    """Each says its name, and fails."""
    lines = [f'extern "C" int {name}(...) {{ return fake_unimplemented("{name}"); }}' for name in sorted(names)]
    text = """#include <cstdio>
static int fake_unimplemented(const char *name) {
  std::fprintf(stderr, "fake CUDA device: %s is not implemented\\n", name);
  return 801;  // cudaErrorNotSupported
}
"""
    return text + "\n".join(lines) + "\n"


def _undefined(path: Path) -> set[str]:
    """CUDA's functions that this file calls."""
    names = _run(["nm", "--undefined-only", "--format=posix", str(path)]).splitlines()
    return {match[0] for name in names if (match := re.match(r"cuda[A-Z]\w*", name))}


def _defined(path: Path) -> set[str]:
    return {line.split()[0] for line in _run(["nm", "--defined-only", "--format=posix", str(path)]).splitlines()}


def _run(command: Sequence[str], **where: object) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **where)
    if result.returncode != 0:
        raise Unavailable(f"this failed: {' '.join(command[:8])} ...\n{(result.stdout + result.stderr)[-2000:]}")
    return result.stdout
