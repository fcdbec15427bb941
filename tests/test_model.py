"""benchmarks/model.py: runs of machine code from counts of the source, and what a call is made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from emulator.builds import INCLUDE
from emulator.products import mma_gemm

from cudcn import emulator, nvrtc, sass
from cudcn.plan import Layout, Plan

pytest.importorskip("cupy")
pytestmark = [
    pytest.mark.usefixtures("default_settings"),
    pytest.mark.skipif(sass.nvdisasm() is None, reason="nvdisasm is not installed"),
]

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEST_KERNELS = Path(__file__).parent / "emulator" / "kernels"
ITS_OWN = ("cases", "common", "executions", "gpu", "model", "peers")  # of these names tests/ has some, too


@pytest.fixture(scope="module")
def model() -> Iterator[ModuleType]:
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in ITS_OWN}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import model

        yield model
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ITS_OWN:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


# ---- runs of machine code

SUM = """
#include "platform.cuh"
__device__ float one(const float *from) { return *from; }
__global__ void sum(const float *__restrict__ in, float *out, int count, int squares, int rare) {
  SMEM(float, sums, [64]);
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += 64) sum += one(in + i);
  if (squares) {
    for (int i = threadIdx.x; i < count; i += 64) sum += in[i] * in[i] * in[i];
  }
  if (blockIdx.x == rare) sum = __fsqrt_rn(sum) + in[threadIdx.x];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int i = 0; i < 64; i++) sum += sums[(threadIdx.x + i) % 64];
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}
"""


@pytest.mark.parametrize("count", [64, 64 * 5, 64 * 37])
@pytest.mark.parametrize("squares", [False, True])
def test_runs_of_loops(model: ModuleType, tmp_path: Path, count: int, squares: bool) -> None:
    """However they are unrolled: here one by four and its rest, the last one wholly."""
    source = tmp_path / "sum.cu"
    source.write_text(SUM)
    arguments = np.ones(count, np.float32), np.zeros(64 * 4, np.float32), *map(np.int32, (count, squares, 1))
    with emulator.counts() as found:
        emulator.kernel(source, "sum", include=INCLUDE)((4,), (64,), arguments)
    runs = model.executions.runs(machine_code(source, "sum"), found[0])
    turns = count / 64
    by_kind = {kind: issued(runs, kind) for kind in ("LDG", "STG", "FADD", "BAR", "STS", "EXIT")}
    expected = {"LDG": turns * (1 + squares) + 0.25, "STG": 1, "BAR": 1, "STS": 1, "EXIT": 1}
    expected["FADD"] = turns + 64 + 0.25
    assert by_kind == pytest.approx(expected, rel=0.02)
    assert sum(runs.opcodes.values()) == pytest.approx(runs.least)
    assert runs.least <= runs.most <= 1.3 * runs.least


def test_runs_of_matrix_products(model: ModuleType, rng: np.random.Generator) -> None:
    with emulator.counts() as found:
        assert mma_gemm(rng)
    runs = model.executions.runs(machine_code(TEST_KERNELS / "mma_gemm.cu", "mma_gemm<__half>"), found[0])
    warps = 4 * 4
    for event, shared, kind in (
        ("mma.m16n8k16", False, "HMMA"), ("ldmatrix", False, "LDSM"), ("copy", True, "LDGSTS"),
    ):  # fmt: skip
        events = [e.instructions for e in found[0].events if e.name.startswith(event) and e.shared == shared]
        assert issued(runs, kind) == pytest.approx(sum(events) / warps, rel=0.02), kind


def machine_code(source: Path, expression: str) -> sass.Code:
    options = [f"-I{folder}" for folder in INCLUDE]
    compiled = nvrtc.compiled(source, [expression], "sm_90", "-lineinfo", *options)
    return sass.disassemble(compiled.cubin, lines=True)[compiled.names[expression]]


def issued(runs: Any, kind: str) -> float:
    return sum(number for opcode, number in runs.opcodes.items() if opcode.partition(".")[0] == kind)


# ---- what a call is made of


def test_the_estimate_of_a_call(model: ModuleType) -> None:
    dcnv3 = next(type(case) for case in model.CASES if case.operator == "dcnv3")
    case = dcnv3(2, 24, 24, 64, 2)
    (forward,) = model.estimate(case, "float16", "forward")
    queries, rows, warps = 2 * 24 * 24, 16, 4  # 16 rows of 9 samples are what a warp holds
    assert forward.blocks == queries * 2 / (rows * warps)
    assert 0 < forward.instructions <= forward.most
    assert forward.tensor == forward.reductions == 0
    assert forward.memory == pytest.approx(case.bytes("forward", 2))
    backward = model.estimate(case, "float16", "backward")
    names = [part.name for part in backward]
    for kernel in ("backward_places<__half", "count<__half", "records<__half", "backward_input<__half"):
        assert any(name.startswith(f"aggregate_{kernel}") for name in names)
    assert "(zeros)" in names  # to count in
    assert sum(part.microseconds for part in backward) > forward.microseconds > 0


def test_what_binds(model: ModuleType) -> None:
    one = model.Estimate("one", blocks=model.MULTIPROCESSORS, instructions=4e6 * model.MULTIPROCESSORS)
    assert one.times["issue"] == pytest.approx(1e6 / model.CLOCK * 1e6)
    assert (one.binds, one.microseconds) == ("issue", one.times["issue"])
    two = model.Estimate("two", blocks=model.MULTIPROCESSORS + 1, instructions=4e6 * (model.MULTIPROCESSORS + 1))
    assert two.microseconds == pytest.approx(2 * one.microseconds)  # one multiprocessor has two blocks
    copied = model.Estimate("copied", blocks=1, memory=3e9)
    assert (copied.binds, copied.microseconds) == ("memory", pytest.approx(3e9 / model.MEMORY * 1e6))


def test_steps_that_steer_others(model: ModuleType) -> None:
    plan = Plan([Layout((4,), (4,), np.dtype(np.int32), 0)])
    (given,) = plan.tensors
    integers, floats = plan.empty((4,), np.int32), plan.empty((4,), np.float32)
    for views in (given, floats), (given, integers), (floats, given), (integers[2:], floats), (floats,):
        plan.launch(None, 1, (32, 1), *views, np.int32(1))
    assert model.steering(plan) == [False, True, False, False, False]
