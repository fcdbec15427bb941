"""What a call costs the host before the GPU has done anything: launches, and microseconds beside a bare CuPy launch.

Usage: python benchmarks/host.py [--quick] [--only OPERATOR]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
from cases import (
    Case,
    DCNv3,
    DCNv4,
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIPool,
    MSDeformAttn,
    PSRoIPool,
    RoIAvgPool,
)
from common import ROOT, commit, table

sys.path.insert(0, str(Path(ROOT) / "tests"))
import fake_cuda

import cudcn

Make = Callable[[np.ndarray], Any]

# The host's time hardly depends on sizes, as long as one chunk holds all.
CASES: list[Case] = [
    DeformConv2d(2, 16, 8, 8),
    DeformConv2d(2, 16, 8, 8, layout="NHWC"),
    DCNv3(2, 8, 8, 16, 2),
    DCNv4(2, 8, 8, 16, 2),
    MSDeformAttn(1, ((4, 4), (2, 2)), 2, 8, 2),
    RoIAvgPool(1, 8, 12, 12, 4, 3),
    PSRoIPool(1, 9, 12, 12, 4, 3),
    DeformRoIPool(1, 8, 12, 12, 4, 3),
    DeformPSRoIPool(1, 9, 12, 12, 4, 3),
]
BATCH = 20  # calls between two waits for the device
WARM_UP = 20  # calls, of which the first compiles
WORK = {
    "cuLaunchKernel": "launches",
    "cudaMemsetAsync": "memsets",
    "cudaMemcpyAsync": "copies",
}


class Times(NamedTuple):
    """The lower decile of the calls, and of the bare launches beside: above it, other processes are in the figures."""

    call: float
    bare: float


class Framework(NamedTuple):
    """How one framework's arrays are made and waited for."""

    make: Make
    wait: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--only", metavar="OPERATOR", choices=sorted({case.operator for case in CASES}))
    options = parser.parse_args()
    count = 200 if options.quick else 2000

    fake_cuda.install_without_gpu()
    print(f"cudcn {cudcn.__version__}, commit {commit()}; {device()}\n")
    with contextlib.ExitStack() as stack:
        frameworks = {"CuPy": cupy_framework(), **torch_framework(stack)}
        if fake_cuda.installed():
            stack.enter_context(fake_cuda.launches.without_running())
        bare = bare_launch()
        header = ["", "framework", "pass", *WORK.values(), "us", "a bare launch", "bare launches"]
        rows = []
        for case in CASES:
            if options.only in (None, case.operator):
                for name, framework in frameworks.items():
                    for which, function in passes(case, framework.make).items():
                        took = microseconds(function, bare, count, framework.wait)
                        work = calls(function, framework.wait)
                        figures = f"{took.call:.0f}", f"{took.bare:.1f}", f"{took.call / took.bare:.0f}"
                        rows.append([label(case), name, which, *work, *figures])
        print(table(header, rows))


def device() -> str:
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    if not fake_cuda.installed():
        return name
    return (
        f"{name}: these are the host's times alone and say nothing about a GPU. CUDA's own calls cost next to nothing, "
        "and torch's tensors are CPU tensors that pose as CUDA's, whose allocations cost more than torch's"
    )


def label(case: Case) -> str:
    return case.operator + (" NHWC" if getattr(case, "layout", "") == "NHWC" else "")


def cupy_framework() -> Framework:
    import cupy

    return Framework(cupy.asarray, cupy.cuda.Device().synchronize)


def torch_framework(stack: contextlib.ExitStack) -> dict[str, Framework]:
    """Nothing where torch is not installed, or has no CUDA for the GPU that is there."""
    try:
        import torch
    except ImportError:
        return {}
    if fake_cuda.installed():
        from fake_cuda.posing import posing

        cuda = stack.enter_context(posing())
        return {"torch": Framework(lambda array: cuda.cuda(torch.from_numpy(array)), fake_cuda.synchronize)}
    if not torch.cuda.is_available():
        return {}
    return {"torch": Framework(lambda array: torch.from_numpy(array).cuda(), torch.cuda.synchronize)}


def bare_launch() -> Callable[[], Any]:
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void nothing(float *) {}', "nothing")
    return partial(kernel, (1,), (128,), (cupy.empty(1, np.float32),))


def passes(case: Case, make: Make) -> dict[str, Callable[[], Any]]:
    tensors = [None if t is None else make(t) for t in map(case.tensors().get, case.op.tensors)]
    grad_output = make(case.grad_output())
    forward, backward = (getattr(cudcn, f"{case.operator}{suffix}") for suffix in ("", "_backward"))
    return {
        "forward": partial(forward, *tensors, **case.attributes),
        "backward": partial(backward, grad_output, *tensors, **case.attributes),
    }


def microseconds(function: Callable[[], Any], bare: Callable[[], Any], calls: int, wait: Callable[[], Any]) -> Times:
    """Times of single calls, each right after a bare launch.

    A batch of calls is longer than a scheduler's slice where other processes want the core, and a bare launch is not:
    measured apart, their ratio was off by a factor of ten on a busy machine, and by two from process to process.
    """
    times: dict[Callable[[], Any], list[float]] = {bare: [], function: []}
    for call in range(calls + WARM_UP):
        for one, taken in times.items():
            start = time.perf_counter()
            one()
            taken.append((time.perf_counter() - start) * 1e6)
        if call % BATCH == 0:
            wait()
    wait()
    of_bare, of_function = (quantiles(taken[WARM_UP:], n=10)[0] for taken in times.values())
    return Times(of_function, of_bare)


def calls(function: Callable[[], Any], wait: Callable[[], Any]) -> Iterator[str]:
    """How often a call asks the device for each kind of work; unknown on a real one."""
    if not fake_cuda.installed():
        return ("?" for _ in WORK)
    with fake_cuda.noted_calls() as noted:
        function()
    wait()
    counts = Counter(call.name for call in noted)
    return (str(counts[name]) for name in WORK)


if __name__ == "__main__":
    main()
