"""Compile kernels for GPUs that are not here: NVRTC needs no device, only CuPy and its CUDA headers."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import sources
from .launch import compile_options
from .ops import OPS
from .plan import Kernel

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


class Resources(NamedTuple):
    """What ptxas says of a kernel, in registers and bytes."""

    registers: int
    shared: int
    stack: int
    spills: int


def kernels() -> list[Kernel]:
    """Every instance of every operator, once."""
    return list(dict.fromkeys(kernel for op in OPS for kernel in op.cuda.kernels()))


class Compiled(NamedTuple):
    resources: dict[str, Resources]  # of each expression
    names: dict[str, str]  # of each expression, mangled
    cubin: bytes


def compile_kernels(source: Path, expressions: Sequence[str], architecture: str) -> dict[str, Resources]:
    """The resources of each template instance of a `.cu`; RuntimeError with NVRTC's log if it does not compile."""
    return compiled(source, expressions, architecture).resources


def compiled(source: Path, expressions: Sequence[str], architecture: str, *options: str) -> Compiled:
    """The template instances of a `.cu` with their machine code; `options` are more of NVRTC's."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source.read_text(), source.name, (), ())
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        needed = (*compile_options(), f"-I{_cuda_headers()}", f"-arch={architecture}", "--ptxas-options=-v")
        try:
            nvrtc.compileProgram(program, (*needed, *options))
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{log}") from None
        names = {e: nvrtc.getLoweredName(program, e) for e in expressions}
        found = _parse(nvrtc.getProgramLog(program))
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy cuts off the last byte
    finally:
        nvrtc.destroyProgram(program)
    return Compiled({e: found[name] for e, name in names.items() if name in found}, names, cubin)


def _nvrtc() -> ModuleType:
    """CuPy's binding of the compiler, which loads the library at its first call."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise ImportError(
            f"CuPy cannot be imported ({error}): pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime"
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:  # each version of CuPy has its own
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"NVRTC was not found ({reason}): install nvidia-cuda-nvrtc") from error
    return nvrtc


def cuda_folders(name: str) -> list[Path]:
    """Those of a name, such as "bin", of NVIDIA's wheels and of an installed CUDA."""
    wheels = importlib.util.find_spec("nvidia")
    roots = wheels.submodule_search_locations if wheels else None
    folders = [folder for root in roots or () for folder in Path(root).glob(f"*/{name}")]
    if "CUDA_PATH" in os.environ:
        folders.append(Path(os.environ["CUDA_PATH"]) / name)
    return folders


def _cuda_headers() -> Path:
    """The include folder with cuda_fp16.h: of the nvidia-cuda-runtime wheel, or of an installed CUDA."""
    for folder in cuda_folders("include"):
        if (folder / "cuda_fp16.h").exists():
            return folder
    raise RuntimeError("cuda_fp16.h was not found: install nvidia-cuda-runtime, or set CUDA_PATH")


def _parse(log: str) -> dict[str, Resources]:
    entries = re.split(r"Compiling entry function '(\S+)' for", log)[1:]
    return {name: _resources(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _resources(text: str) -> Resources:
    def number(pattern: str) -> int:
        match = re.search(pattern, text)
        return int(match[1]) if match else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        number(r"(\d+) bytes stack frame"),
        spills,
    )


def table(architectures: Sequence[str], report: Callable[[str], object]) -> str:
    """A Markdown table of every kernel's resources; `report` is told what is compiled next."""
    rows = ["| kernel | " + " | ".join(architectures) + " |", "|" + "---|" * (len(architectures) + 1)]
    by_source: dict[str, list[str]] = {}
    for kernel in kernels():
        by_source.setdefault(kernel.source, []).append(kernel.expression)
    for source, expressions in by_source.items():
        compiled = []
        for architecture in architectures:
            report(f"{source}.cu for {architecture}: {len(expressions)} kernels")
            compiled.append(compile_kernels(sources.path(source), expressions, architecture))
        for expression in expressions:
            cells = (_cell(resources[expression]) for resources in compiled)
            rows.append(f"| `{expression}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(r: Resources) -> str:
    extra = f", {r.stack} B stack, {r.spills} B spills" if r.stack or r.spills else ""
    return f"{r.registers} regs, {r.shared} B shared{extra}"
