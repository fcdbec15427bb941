"""What a call would cost on an H100, counted without one. Every time that this prints is an estimate.

Usage: python benchmarks/model.py [--only OPERATOR] [--dtype DTYPE] [--kernels]

The launches of each of gpu.py's cases are those that the package makes for its full-size arrays. Of each launch some
blocks run on the emulator's counting build, and what these do is multiplied by the grid: sectors of 32 bytes and
shared-memory wavefronts as the emulator counts them, instructions from NVRTC's machine code for sm_90
(executions.py). Each of them, by the rate of what does it, is a time; a launch is taken to last as long as the longest,
and a call as long as its launches together. README.md says what that leaves out.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import executions
import numpy as np
from cases import Case
from common import commit, table
from gpu import CASES

import cudcn
from cudcn import dispatch, emulator, launch, nvrtc, sass, sources
from cudcn.dtypes import DTYPES
from cudcn.plan import Kernel, Launch, Plan, Run, Zero

PASSES = ("forward", "backward")
ARCHITECTURE = "sm_90"
# An H100 SXM: of NVIDIA's white paper, but for those marked, which are assumptions that no measurement has confirmed.
MULTIPROCESSORS = 132
CLOCK = 1.755e9
ISSUE = 4.0  # warp instructions a clock of a multiprocessor
TENSOR = 4 / 6.35  # of them mma.m16n8k16: 62% of the peak, which needs wgmma (assumed)
DOUBLE = 2.0  # of them in float64
SPECIAL = 0.5  # of them of the special functions' unit, which also converts
L1 = 1.0  # wavefronts of 128 bytes a clock of a multiprocessor
L2 = 5.5e12  # bytes a second (assumed)
REDUCTIONS = 2.0e12  # bytes a second, in whole sectors (assumed)
MEMORY = 3.0e12  # bytes a second, of 3.35e12 (assumed)
SECTOR = 32

LEAST_BLOCKS, MOST_BLOCKS = 8, 128
ACCESSES = 500_000  # of lanes: enough to stop at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="OPERATOR", choices=sorted({case.operator for case in CASES}))
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--kernels", action="store_true", help="a line for each launch too")
    options = parser.parse_args()
    for program, found, source in (
        ("nvdisasm", sass.nvdisasm(), "pip install nvidia-cuda-nvdisasm"),
        ("addr2line", shutil.which("addr2line"), "apt-get install binutils"),
    ):
        if not found:
            print(f"benchmarks/model.py needs {program}: {source}")
            return 1
    print(f"Estimates for an H100, {options.dtype}, commit {commit()}. Nothing of this was measured.", flush=True)
    rows = []
    for case in CASES:
        if options.only in (None, case.operator):
            for which in PASSES:
                estimates = estimate(case, options.dtype, which)
                rows.append(line(f"{case.operator} {case} {which}", estimates, floor(case, options.dtype, which)))
                print(" | ".join(rows[-1]), flush=True)
                if options.kernels:
                    for one in estimates:
                        print("    " + " | ".join(line(one.name, [one])), flush=True)
    print("\n" + table(HEADER, rows))
    return 0


# ---- the plan of a call


class Planned(NamedTuple):
    plan: Plan
    arrays: Sequence[Any]


class Device:
    """In the emulated one's place: keeps what it should run."""

    def run(self, *planned: Any) -> None:
        self.planned = Planned(*planned)


def planned(call: Callable[[], Any]) -> Planned:
    """What a call with NumPy arrays would have the emulator do."""
    device = Device()
    with (
        mock.patch.object(launch, "_emulated", return_value=device),
        mock.patch.object(dispatch, "empty_like", lambda array, shape: np.zeros(shape, array.dtype)),
        mock.patch.dict(os.environ, {"CUDCN_DEVICE": "emulator"}),
    ):
        call()
    return device.planned


def steering(plan: Plan) -> list[bool]:
    """Of each step, whether it writes integers that a later one reads, which would do something else without them."""
    integers = {i for i, scratch in enumerate(plan.scratch, len(plan.tensors)) if scratch.layout.dtype.kind == "i"}
    buffers = [integers.intersection(view.buffer for view in step.views) for step in plan.steps]
    return [any(own & other for other in buffers[i + 1 :]) for i, own in enumerate(buffers)]


# ---- what a launch does


@dataclass
class Estimate:
    """Of one launch, all its blocks. Instructions are those of warps."""

    name: str
    blocks: int = 0
    instructions: float = 0  # at least
    most: float = 0
    tensor: float = 0
    double: float = 0
    special: float = 0
    wavefronts: float = 0  # through L1 and shared memory, of 128 bytes
    l2: float = 0  # bytes
    reductions: float = 0  # bytes, in whole sectors
    memory: float = 0  # bytes: each array once, unless even L2 sees less

    @property
    def times(self) -> dict[str, float]:
        """Microseconds of each resource."""
        # the busiest multiprocessor's share, where blocks are few
        busiest = math.ceil(self.blocks / MULTIPROCESSORS) / self.blocks if self.blocks else 0
        clocks = {
            "issue": self.instructions / ISSUE,
            "tensor": self.tensor / TENSOR,
            "float64": self.double / DOUBLE,
            "special": self.special / SPECIAL,
            "L1": self.wavefronts / L1,
        }
        times = {name: count * busiest / CLOCK * 1e6 for name, count in clocks.items()}
        times |= {"L2": self.l2 / L2 * 1e6, "reductions": self.reductions / REDUCTIONS * 1e6}
        return times | {"memory": self.memory / MEMORY * 1e6}

    @property
    def microseconds(self) -> float:
        return max(self.times.values())

    @property
    def binds(self) -> str:
        return max(self.times, key=self.times.__getitem__)


def estimate(case: Case, dtype: str, which: str) -> list[Estimate]:
    plan, arrays = planned(prepared(case, dtype, which))
    buffers = [*arrays, *(np.zeros(scratch.layout.shape, scratch.layout.dtype) for scratch in plan.scratch)]
    found = []
    for step, steers in zip(plan.steps, steering(plan), strict=True):
        run = functools.partial(launch._emulated().do, step, buffers)
        if isinstance(step, Launch):
            found.append(counted(step, [launch.array_of(buffers, view) for view in step.views], run))
        else:
            found.append(Estimate("(zeros)" if isinstance(step, Zero) else "(CuPy's copy)", memory=moved(step)))
        if steers or not isinstance(step, Launch):
            run()
    return found


def moved(step: Zero | Run) -> int:
    return sum(view.nbytes for view in step.views)


def prepared(case: Case, dtype: str, which: str) -> Callable[[], Any]:
    import ml_dtypes  # noqa: F401  (which gives NumPy bfloat16)

    kind = np.dtype(dtype)
    tensors = {name: t.astype(kind) if t.dtype == np.float32 else t for name, t in case.tensors().items()}
    if which == "forward":
        return functools.partial(getattr(cudcn, case.operator), **tensors, **case.attributes)
    backward = getattr(cudcn, f"{case.operator}_backward")
    return functools.partial(backward, case.grad_output().astype(kind), **tensors, **case.attributes)


def counted(made: Launch, arrays: list[np.ndarray], run: Callable[[], None]) -> Estimate:
    """`arrays` are the launch's."""
    counts = sampled(arrays, run, LEAST_BLOCKS)
    lanes = sum(event.lanes for event in counts.events)
    more = min(MOST_BLOCKS, LEAST_BLOCKS * ACCESSES // max(1, lanes))
    if more > LEAST_BLOCKS and counts.blocks < made.grid:
        counts = sampled(arrays, run, more)
    runs = executions.runs(code(made.kernel), counts)
    times, warps = made.grid / counts.blocks, made.grid * math.ceil(math.prod(made.block) / 32)
    of_global = [event for event in counts.events if event.size and not event.shared]
    sectors = {name: sum(e.sectors for e in of_global if e.name == name) for name in ("store", "atomic")}
    l2 = times * SECTOR * (counts.loaded_sectors + sum(sectors.values()))
    issued = {
        name: warps * sum(n for opcode, n in runs.opcodes.items() if opcode.startswith(kinds))
        for name, kinds in OPCODES.items()
    }
    return Estimate(
        made.kernel.expression,
        blocks=made.grid,
        instructions=warps * runs.least,
        most=warps * runs.most,
        **issued,
        wavefronts=times * sum(e.wavefronts + e.sectors / 4 for e in counts.events),
        l2=l2,
        reductions=times * SECTOR * sectors["atomic"],
        memory=min(l2, sum(array.nbytes for array in arrays)),
    )


OPCODES = {
    "tensor": ("HMMA",),
    "double": ("DADD", "DFMA", "DMUL", "DSETP"),
    "special": ("MUFU", "F2F.", "I2F", "F2I", "FRND", "POPC", "FLO", "BREV"),
}


def sampled(arrays: list[np.ndarray], run: Callable[[], None], blocks: int) -> emulator.Counts:
    """The counts of some blocks, whose writes of integers are undone: where a sort counts, they would count twice."""
    integers = [array for array in arrays if array.dtype.kind == "i"]
    before = [array.copy() for array in integers]
    with emulator.counts(sample=blocks) as found:
        run()
    for array, saved in zip(integers, before, strict=True):
        if array.flags.writeable:
            np.copyto(array, saved)
    (counts,) = found
    return counts


@functools.cache
def code(kernel: Kernel) -> sass.Code:
    compiled = nvrtc.compiled(sources.path(kernel.source), [kernel.expression], ARCHITECTURE, "-lineinfo")
    return sass.disassemble(compiled.cubin, lines=True)[compiled.names[kernel.expression]]


# ---- the table

HEADER = (
    "", "launches", "M instructions", "M tensor", "M wavefronts", "MB of L2", "MB of reductions", "MB of memory",
    "estimate, us", "binds", "floor, us",
)  # fmt: skip


def floor(case: Case, dtype: str, which: str) -> float:
    """Microseconds that the compulsory bytes take."""
    size = DTYPES[dtype].size
    forward = case.bytes("forward", size)
    return (forward if which == "forward" else case.bytes("forward+backward", size) - forward) / MEMORY * 1e6


def line(title: str, parts: list[Estimate], least: float | None = None) -> list[str]:
    def total(name: str) -> float:
        return sum(getattr(part, name) for part in parts) / 1e6

    time = sum(part.microseconds for part in parts)
    shares: dict[str, float] = {}
    for part in parts:
        shares[part.binds] = shares.get(part.binds, 0) + part.microseconds / time
    binds = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda x: -x[1])[:2])
    more = total("most") / total("instructions") - 1 if total("instructions") else 0
    numbers = [total(name) for name in ("tensor", "wavefronts", "l2", "reductions", "memory")]
    return [
        title, str(len(parts)), f"{total('instructions'):.1f} (+{more:.0%})", *(f"{n:.1f}" for n in numbers),
        f"{time:.0f}", binds, "" if least is None else f"{least:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
