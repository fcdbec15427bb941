"""Planted bugs: each must be caught, or show as a wrong result, and its repaired twin must pass."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from emulator_cases import BFLOAT16, BUILDS, INCLUDE, KERNELS, ORDERS, PREFIX

from cudcn import emulator
from cudcn.emulator import EmulatorError

pytestmark = pytest.mark.usefixtures("default_settings")


# ---- two matrix products, right and with planted bugs


def tiled_gemm(rng: np.random.Generator, *defines: str) -> bool:
    """Whether the product is right."""
    m, n, k = 50, 37, 45
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    c, total = emulator.empty((m, n), np.float32), np.zeros(1, np.float32)
    expression = "tiled_gemm<float, 16>"
    kernel = emulator.kernel(KERNELS / "tiled_gemm.cu", expression, include=INCLUDE, defines=defines)
    kernel((3, 4), (16, 16), (a, b, c, total, np.int32(m), np.int32(n), np.int32(k)))
    return np.allclose(c, a @ b, atol=1e-4) and np.allclose(total[0], (a @ b).sum(), atol=1e-2)


def mma_gemm(rng: np.random.Generator, *defines: str, dtype: Any = np.float16) -> bool:
    m, n, k = 72, 72, 104
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    c = emulator.empty((m, n), np.float32)
    expression = f"mma_gemm<{PREFIX[np.dtype(dtype)]}>"
    kernel = emulator.kernel(KERNELS / "mma_gemm.cu", expression, include=INCLUDE, defines=defines)
    two_stages = 2 * (64 * 40 + 32 * 72) * 2
    kernel((2, 2), (128,), (a, b, c, np.int32(m), np.int32(n), np.int32(k)), shared_mem=two_stages)
    return np.allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", BUILDS)
def test_good_products(build: str, order: str, rng: np.random.Generator) -> None:
    with emulator.settings(build=build, order=order):
        assert tiled_gemm(rng)
        assert mma_gemm(rng)
        assert mma_gemm(rng, dtype=BFLOAT16)


RACE = r"race on shared array '\w+' at byte \d+: .*, with no barrier between"
RACE_OR_UNWRITTEN = rf"{RACE}|read of uninitialised shared array"

# The bug; the build that finds it; the message, or "wrong <order>" for a wrong result in that order.
PRODUCT_BUGS = [
    (tiled_gemm, "BUG_NO_BARRIER_AFTER_WRITE", "fast", "wrong forward"),
    (tiled_gemm, "BUG_NO_BARRIER_AFTER_WRITE", "fast", "wrong reverse"),
    (tiled_gemm, "BUG_NO_BARRIER_AFTER_WRITE", "check", RACE_OR_UNWRITTEN),
    (tiled_gemm, "BUG_NO_BARRIER_AFTER_READ", "fast", "wrong random"),
    (tiled_gemm, "BUG_NO_BARRIER_AFTER_READ", "check", RACE),
    (tiled_gemm, "BUG_DIVERGENT_BARRIER", "fast", r"divergent barrier: .*gemm.cu:\d+.*gemm.cu:\d+"),
    (tiled_gemm, "BUG_DIVERGENT_BARRIER", "check", "divergent barrier"),
    (tiled_gemm, "BUG_EARLY_RETURN", "fast", "wrong forward"),
    (tiled_gemm, "BUG_EARLY_RETURN", "check", "read of uninitialised shared array '[ab]_tile'"),
    (tiled_gemm, "BUG_SHARED_OVERRUN", "fast", "write of shared array 'warp_sums' .* at byte 32"),
    (tiled_gemm, "BUG_SHARED_OVERRUN", "check", "index outside an array's dimension .*tiled_gemm.cu"),
    (mma_gemm, "BUG_NO_WAIT", "fast", "wrong forward"),
    (mma_gemm, "BUG_NO_WAIT", "check", "read of dynamic shared .* while a cp.async to it .* is in flight"),
    (mma_gemm, "BUG_NO_BARRIER_AFTER_STAGE", "fast", "wrong random"),
    (mma_gemm, "BUG_NO_BARRIER_AFTER_STAGE", "check", "race on dynamic shared memory .*gemm.cu.*gemm.cu"),
]


@pytest.mark.parametrize(("product", "bug", "build", "outcome"), PRODUCT_BUGS)
def test_bugs_in_products(product: Callable, bug: str, build: str, outcome: str, rng: np.random.Generator) -> None:
    if outcome.startswith("wrong "):
        with emulator.settings(build=build, order=outcome.removeprefix("wrong ")):
            assert not product(rng, bug)
    else:
        with emulator.settings(build=build), pytest.raises(EmulatorError, match=outcome):
            product(rng, bug)


# ---- small planted bugs


@dataclass(frozen=True)
class Bug:
    """One function of bugs.cu: what each build says of it, "wrong" for a wrong result, None if it hides.

    The message must name a line of the function, except where `line` is False.
    """

    name: str
    fast: str | None
    check: str | None
    orders: tuple[str, ...] = ORDERS
    grid: int = 1
    threads: int = 64
    strict: bool = False
    line: bool = True


PAST_END = r"out-of-bounds {} argument \d \(256 bytes\) at byte 256"
NEGATIVE = "out-of-bounds .* at byte -"
RETURNED = "threads of the block have returned"
MISALIGNED_COPY = r"cp.async .*: misaligned source"
MISALIGNED_ROW = "ldmatrix.x4: row address .* not 16-byte aligned"
DIMENSION = "index outside an array's dimension"
BUGS = [
    Bug("read_past_end", PAST_END.format("read of"), PAST_END.format("read of 4 bytes in")),
    Bug("read_far_past_end", "out-of-bounds read of argument 1", "read of 4 bytes in argument 1"),
    Bug("read_before_start", NEGATIVE, NEGATIVE),
    Bug("write_past_end", PAST_END.format("write of"), PAST_END.format("write of 4 bytes in"), threads=96),
    Bug("write_just_before_start", "write to argument 2 .*1 bytes before its start", None, line=False),
    Bug("write_just_before_start", None, "write of 4 bytes in argument 2 .* at byte -4"),
    Bug("write_to_const", "write to read-only argument 1", "write to read-only argument 1"),
    Bug("load_misaligned_vector", "misaligned vector access", "misaligned access"),
    Bug("write_past_shared", "write of shared array 'tile' .* byte 256", "shared array 'tile' .* byte 256"),
    Bug("read_past_dynamic_shared", "read of dynamic shared .* byte 256", "dynamic shared .* byte 256"),
    Bug("write_before_shared", "write to shared array 'tile' .* before its start", None, line=False),
    Bug("write_before_shared", None, "write of 4 bytes in shared array 'tile' .* at byte -4"),
    Bug("overrun_inner_dimension", "out-of-bounds write of shared array 'tile'", DIMENSION),
    Bug("read_uninitialised_shared", "wrong", "read of uninitialised shared array 'tile'"),
    Bug("overrun_local_array", None, DIMENSION),
    Bug("read_neighbour", "wrong", RACE_OR_UNWRITTEN, orders=("reverse", "random")),
    Bug("read_neighbour", None, RACE, orders=("forward",)),
    Bug("overwrite_neighbour", "wrong", RACE, orders=("reverse",)),
    Bug("overwrite_neighbour", None, RACE, orders=("forward", "random")),
    Bug("overwrite_after_shuffle", None, RACE),
    Bug("read_lane", "wrong", RACE),
    Bug("write_same_value", None, "race on shared array 'flag'"),
    Bug("add_without_atomic", None, "race on argument 2 .* of the same block"),
    Bug("add_from_blocks", None, "race on argument 2 .* of another block", grid=4),
    Bug("forget_async_wait", "wrong", "while a cp.async to it .* is in flight"),
    Bug("copy_misaligned", MISALIGNED_COPY, MISALIGNED_COPY),
    Bug("copy_past_end", PAST_END.format("read of"), PAST_END.format("read of 16 bytes in")),
    Bug("wait_in_both_branches", "divergent barrier", "divergent barrier"),
    Bug("wait_after_return", RETURNED, RETURNED, strict=True),
    Bug("wait_against_shuffle", "deadlock.* in __syncthreads .* in __shfl_sync", "deadlock"),
    Bug("shuffle_in_both_branches", "divergent warp collective", "divergent warp collective"),
    Bug("shuffle_outside_mask", "is not in its mask 0000ffff", "is not in its mask 0000ffff"),
    Bug("shuffle_from_returned_lane", "wrong", "wrong"),
    Bug("multiply_with_half_warp", "mma.m16n8k16 needs a full warp", "mma.m16n8k16 needs a full warp"),
    Bug("load_misaligned_matrix", MISALIGNED_ROW, MISALIGNED_ROW),
    Bug("convert_nan", "wrong", "conversion of NaN"),
    Bug("divide_by_zero", "integer division by zero", "integer division by zero"),
]
BUG_SOURCE = (KERNELS / "bugs.cu").read_text()
BUG_NUMBERS = {name: int(number) for number, name in re.findall(r"case (\d+): return (\w+)\(", BUG_SOURCE)}


def lines_of(name: str) -> range:
    """The lines of a function of bugs.cu."""
    start = BUG_SOURCE.index(f"PLANTED {name}(")
    end = re.compile(r"^}|}$", re.MULTILINE).search(BUG_SOURCE, start).end()
    return range(BUG_SOURCE.count("\n", 0, start) + 1, BUG_SOURCE.count("\n", 0, end) + 2)


def run_bug(bug: Bug, *defines: str) -> np.ndarray:
    source = np.arange(64, dtype=np.float32)
    out = np.zeros(64, np.float32)
    kernel = emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE, defines=defines)
    args = (np.int32(BUG_NUMBERS[bug.name]), source, out, np.int32(64))
    kernel((bug.grid,), (bug.threads,), args, shared_mem=256)
    return out


def expect(bug: Bug, outcome: str) -> None:
    right = run_bug(bug, "FIXED")
    assert np.isfinite(right).all()
    if outcome == "wrong":
        assert not np.array_equal(run_bug(bug), right)
        return
    with pytest.raises(EmulatorError, match=outcome) as raised:
        run_bug(bug)
    if bug.line:
        reported = {int(line) for line in re.findall(r"bugs\.cu:(\d+)", str(raised.value))}
        assert reported & set(lines_of(bug.name)), raised.value


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bugs(bug: Bug, build: str) -> None:
    outcome = getattr(bug, build)
    if outcome is None:
        return  # this build does not see it
    for order in bug.orders:
        with emulator.settings(build=build, order=order, strict=bug.strict):
            expect(bug, outcome)


def test_every_bug_is_in_the_table() -> None:
    assert {bug.name for bug in BUGS} == set(BUG_NUMBERS)
    assert list(BUG_NUMBERS.values()) == list(range(len(BUG_NUMBERS)))


def test_return_before_a_barrier_is_allowed_unless_strict() -> None:
    bug = Bug("wait_after_return", None, None)
    np.testing.assert_array_equal(run_bug(bug), np.arange(64) < 40)
