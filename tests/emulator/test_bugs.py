"""Planted bugs: each must be caught, or show as a wrong result, and its repaired twin must pass."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from emulator.bugs import BUG_NUMBERS, BUGS, RACE, RACE_OR_UNWRITTEN, Bug, lines_of, run_bug
from emulator.builds import BFLOAT16, BUILDS, ORDERS
from emulator.products import mma_gemm, tiled_gemm

from cudcn import emulator
from cudcn.emulator import EmulatorError

pytestmark = pytest.mark.usefixtures("default_settings")


# ---- matrix products


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", BUILDS)
def test_good_products(build: str, order: str, rng: np.random.Generator) -> None:
    with emulator.settings(build=build, order=order):
        assert tiled_gemm(rng)
        assert mma_gemm(rng)
        assert mma_gemm(rng, dtype=BFLOAT16)


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
