"""Compile kernels for the GPU that is here, ahead of the calls that need them, into CuPy's cache on disk."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from . import dispatch, launch
from .dtypes import DTYPES
from .ops import OPS
from .plan import Kernel

_BAR = 30  # characters


def kernels(operators: Collection[str], dtypes: Collection[str]) -> list[Kernel]:
    """Those that calls of these operators on data of these dtypes launch, other members of a family's among them."""
    families = dict.fromkeys(op.cuda for op in OPS if op.name in operators)
    ctypes = {DTYPES[dtype].ctype for dtype in dtypes} | ({"Tf32"} if "float32" in dtypes else set())
    all_kernels = dict.fromkeys(kernel for family in families for kernel in family.kernels())
    return [kernel for kernel in all_kernels if _ctype(kernel) in (None, *ctypes)]


def _ctype(kernel: Kernel) -> str | None:
    """The data's type: the first template argument, as in `pool<__half, Average>`; None for a kernel of any."""
    match = re.search(r"<(\w+)", kernel.expression)
    return match[1] if match else None


def warm_up(operators: Collection[str], dtypes: Collection[str], report: TextIO = sys.stderr) -> int:
    """Compile what `kernels` lists for the current device, on all cores; how many there were.

    Those that lie in the cache are only loaded.
    """
    cupy = dispatch.cupy()
    wanted, device = kernels(operators, dtypes), cupy.cuda.runtime.getDevice()

    def compile_one(kernel: Kernel) -> Kernel:
        with cupy.cuda.Device(device):
            launch.compiled(kernel, device)
        return kernel

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count, kernel in enumerate(pool.map(compile_one, wanted), 1):
            done = "#" * (_BAR * count // len(wanted))
            line = f"[{done:{_BAR}}] {count}/{len(wanted)} {kernel.expression}"
            report.write(f"\r{line:.120}\x1b[K" if report.isatty() else f"{line}\n")
            report.flush()
    if report.isatty():
        report.write("\n")
    return len(wanted)
