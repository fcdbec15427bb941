"""The emulator itself: that good kernels give right results, and that planted bugs are found."""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cudcn import emulator
from cudcn.emulator import BuildError, EmulatorError

KERNELS = Path(__file__).parent / "kernels"
KERNELS_CU = Path(__file__).parent.parent / "kernels_cu"
INCLUDE = (KERNELS_CU,)

BUILDS = ("fast", "check")
ORDERS = ("forward", "reverse", "random")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PREFIX = {np.dtype(np.float16): "__half", BFLOAT16: "__nv_bfloat16"}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDCN_EMULATOR_BUILD", raising=False)
    monkeypatch.delenv("CUDCN_EMULATOR_ORDER", raising=False)


# ---- every lane-level operation, on the emulator and on a device


Run = Callable[..., None]  # run(expression, grid, block, *arguments)


def run_on_emulator(expression: str, grid: int, block: int, *args: Any) -> None:
    emulator.kernel(KERNELS / "fragments.cu", expression, include=INCLUDE)((grid,), (block,), args)


def run_on_device(expression: str, grid: int, block: int, *args: Any) -> None:
    import cupy

    if int(cupy.cuda.Device().compute_capability) < 80 and re.search("bfloat16|tf32|reduce", expression):
        pytest.skip("needs sm_80")
    # CuPy's cache does not know the headers.
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KERNELS_CU.glob("*.cuh"))))
    module = cupy.RawModule(
        code=(KERNELS / "fragments.cu").read_text(),
        options=("-std=c++17", f"-I{KERNELS_CU}", f"-DHEADERS=0x{headers.hexdigest()[:12]}"),
        name_expressions=(expression,),
    )
    # As bytes: CuPy has no arrays of every dtype.
    on_device = [cupy.asarray(arg.view(np.uint8)) if isinstance(arg, np.ndarray) else arg for arg in args]
    module.get_function(expression)((grid,), (block,), tuple(on_device))
    for arg, result in zip(args, on_device, strict=True):
        if isinstance(arg, np.ndarray):
            arg.view(np.uint8)[...] = result.get()


def small_integers(rng: np.random.Generator, shape: tuple, dtype: Any) -> np.ndarray:
    """Exact in every format, and so are sums of a few hundred products of them."""
    return rng.integers(-8, 9, shape).astype(dtype)


def check_mma(run: Run, rng: np.random.Generator, dtype: Any, kernel: str) -> None:
    a = small_integers(rng, (16, 16), dtype)
    b = small_integers(rng, (16, 8), dtype)
    c = small_integers(rng, (16, 8), np.float32)
    d = emulator.empty((16, 8), np.float32)
    run(kernel.replace("T", PREFIX[np.dtype(dtype)], 1), 1, 32, a, b, c, d)
    np.testing.assert_array_equal(d, a.astype(np.float32) @ b.astype(np.float32) + c)


def check_half_mma(run: Run, rng: np.random.Generator) -> None:
    check_mma(run, rng, np.float16, "multiply_by_hand<T>")


def check_bfloat16_mma(run: Run, rng: np.random.Generator) -> None:
    check_mma(run, rng, BFLOAT16, "multiply_by_hand<T>")


def check_ldmatrix(run: Run, rng: np.random.Generator) -> None:
    check_mma(run, rng, np.float16, "multiply_by_ldmatrix<T, false>")


def check_ldmatrix_transposed(run: Run, rng: np.random.Generator) -> None:
    check_mma(run, rng, np.float16, "multiply_by_ldmatrix<T, true>")


def check_ldmatrix_bfloat16(run: Run, rng: np.random.Generator) -> None:
    check_mma(run, rng, BFLOAT16, "multiply_by_ldmatrix<T, false>")


def check_tf32_mma(run: Run, rng: np.random.Generator) -> None:
    a = small_integers(rng, (16, 8), np.float32)
    b = small_integers(rng, (8, 8), np.float32)
    c = small_integers(rng, (16, 8), np.float32)
    d = emulator.empty((16, 8), np.float32)
    a_tf32 = emulator.empty((16, 8), np.uint32)
    run("multiply_tf32", 1, 32, a, b, c, d, a_tf32)
    np.testing.assert_array_equal(d, a @ b + c)


def check_tf32_rounding(run: Run, rng: np.random.Generator) -> None:
    a = rng.standard_normal((16, 8)).astype(np.float32)
    a.flat[:2] = [1 + 2**-11, -1 - 2**-11]  # ties: away from zero, among tf32's 10 bits of fraction
    zeros = np.zeros((16, 8), np.float32)
    d = emulator.empty((16, 8), np.float32)
    a_tf32 = emulator.empty((16, 8), np.uint32)
    run("multiply_tf32", 1, 32, a, zeros[:8], zeros, d, a_tf32)
    fraction, exponent = np.frexp(a.astype(np.float64))
    scaled = np.abs(fraction) * 2**11
    expected = np.copysign(np.ldexp(np.floor(scaled + 0.5) / 2**11, exponent), a)
    # PTX leaves the low 13 bits undefined.
    np.testing.assert_array_equal((a_tf32 & np.uint32(0xFFFFE000)).view(np.float32), expected)


def check_shuffles_and_votes(run: Run, rng: np.random.Generator) -> None:
    threads = 64
    out = emulator.empty((11, threads), np.int32)
    run("shuffle_and_vote", 1, threads, out)
    thread = np.arange(threads)
    lane = thread % 32
    expected = [
        thread // 8 * 8 + 3,
        np.where(lane == 0, thread, thread - 1),
        np.where(lane % 16 + 2 >= 16, thread, thread + 2),
        thread ^ 5,
        thread // 32 * 32 + np.where(lane < 16, 15, 16),
        np.full(threads, np.uint32(0x49249249)).astype(np.int32),
        thread >= 32,
        thread < 32,
        np.full(threads, 13),
        np.full(threads, 1),
        np.full(threads, 0),
    ]
    np.testing.assert_array_equal(out, np.array(expected))


def check_reductions(run: Run, rng: np.random.Generator) -> None:
    threads = 64
    out = emulator.empty((6, threads), np.int32)
    run("reduce_warps", 1, threads, out)
    warps = (np.arange(threads) - 5).reshape(2, 32)
    first, second = warps
    expected = [
        (first.sum(), second.sum()),
        (first.min(), second.min()),
        (first.max(), second.max()),
        (-1, second.max()),  # unsigned: -1 is the largest
        (-1, -1),
        (0, 0),
    ]
    np.testing.assert_array_equal(out, np.repeat(np.array(expected), 32, axis=1))


def check_conversions(run: Run, rng: np.random.Generator) -> None:
    special = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 6e-8, 2.9e-8, 2.98023e-8, 3.3e38]
    numbers = rng.standard_normal(2000) * 10 ** rng.uniform(-9, 6, 2000)
    x = np.concatenate([numbers, special]).astype(np.float32)
    half, bfloat16 = emulator.empty(x.shape, np.float16), emulator.empty(x.shape, BFLOAT16)
    half_values, bfloat16_values = emulator.empty(x.shape, np.float32), emulator.empty(x.shape, np.float32)
    run("convert", 1, 64, x, half, bfloat16, half_values, bfloat16_values, np.int32(x.size))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, x.astype(np.float16))
        np.testing.assert_array_equal(half_values, x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloat16.astype(np.float32), x.astype(BFLOAT16).astype(np.float32))
    np.testing.assert_array_equal(bfloat16_values, x.astype(BFLOAT16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(half[:2000]), np.signbit(x[:2000]))


def check_arithmetic(run: Run, rng: np.random.Generator, dtype: Any) -> None:
    a, b, c = (rng.uniform(0.5, 4, (3, 500)) * rng.choice([-1, 1], (3, 500))).astype(dtype)
    out = emulator.empty((5, 500), dtype)
    run(f"calculate<{PREFIX[np.dtype(dtype)]}>", 1, 64, a, b, c, out, np.int32(500))
    x, y, z = (array.astype(np.float64) for array in (a, b, c))
    # float32 holds each result for bfloat16, so that ml_dtypes rounds only once.
    wide = np.float64 if dtype == np.float16 else np.float32
    expected = np.array([x + y, x - y, x * y, x * y + z, np.maximum(x, y)]).astype(wide).astype(dtype)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


def check_half_arithmetic(run: Run, rng: np.random.Generator) -> None:
    check_arithmetic(run, rng, np.float16)


def check_bfloat16_arithmetic(run: Run, rng: np.random.Generator) -> None:
    check_arithmetic(run, rng, BFLOAT16)


def check_atomics(run: Run, rng: np.random.Generator) -> None:
    sums = [np.zeros(1, dtype) for dtype in (np.float32, np.float64, np.int32, np.uint64)]
    half_sum, bfloat16_sum, maximum = np.zeros(2, np.float16), np.zeros(2, BFLOAT16), np.full(1, -1, np.int32)
    run("count_atomically", 4, 48, *sums, half_sum, bfloat16_sum, maximum)
    assert [float(total[0]) for total in sums] == [192, 192, 192, 192 * 2**33]
    assert half_sum.tolist() == bfloat16_sum.astype(np.float32).tolist() == [192, 96]
    assert maximum[0] == 191


def check_async_copies(run: Run, rng: np.random.Generator) -> None:
    source = rng.standard_normal(180).astype(np.float32)
    out = emulator.empty((2, 128), np.float32)
    run("reverse_asynchronously", 2, 32, source, out, np.int32(180))
    padded = np.concatenate([source, np.zeros(76, np.float32)]).reshape(2, 128)
    np.testing.assert_array_equal(out, padded[:, ::-1])


CHECKS = [
    check_half_mma,
    check_bfloat16_mma,
    check_ldmatrix,
    check_ldmatrix_transposed,
    check_ldmatrix_bfloat16,
    check_tf32_mma,
    check_tf32_rounding,
    check_shuffles_and_votes,
    check_reductions,
    check_conversions,
    check_half_arithmetic,
    check_bfloat16_arithmetic,
    check_atomics,
    check_async_copies,
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("check", CHECKS)
def test_fragments(check: Callable, build: str, rng: np.random.Generator) -> None:
    for order in ORDERS:
        with emulator.settings(build=build, order=order):
            check(run_on_emulator, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_fragments_on_device(check: Callable, rng: np.random.Generator) -> None:
    check(run_on_device, rng)


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
def test_bugs_in_products(
    product: Callable, bug: str, build: str, outcome: str, rng: np.random.Generator
) -> None:
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


# ---- launches


SMALL_KERNELS = """
#include "platform.cuh"
#include "small.cuh"
__constant__ float table[3] = {1.0f, 2.0f, 4.0f};
struct Shape { int height, width; };
__global__ void copy(const float *in, float *out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = SCALE * in[i];
}
__global__ void fill(float *out, Shape shape, double value) {
  for (int i = threadIdx.x; i < shape.height * shape.width; i += blockDim.x) out[i] = (float)value;
}
__global__ void tell_null(const float *in, float *out, int *result) {
  *result = (in == nullptr) + 2 * (out == nullptr);
}
__global__ void read_table(float *out) { out[threadIdx.x] = table[threadIdx.x]; }
__global__ void mark_blocks(int *out) {
  if (threadIdx.x + threadIdx.y + threadIdx.z) return;
  out[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] += 1;
}
__global__ void record_order(int *turns, int *counters) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  turns[thread] = atomicAdd(&counters[0], 1);
  __syncthreads();
  turns[threads + thread] = atomicAdd(&counters[1], 1);
}
__global__ void static_shared_memory(float *out) {
  SMEM(float, tile, [ELEMENTS]);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void step(float *values, int rows, int columns, int stride) {
  for (int i = 0; i < rows * columns; i++) values[i / columns * stride + i % columns] += 1.0f;
}
__global__ void overflow_stack(float *out, int depth) {
  volatile float frame[1024];
  frame[depth % 1024] = depth;
  if (depth) overflow_stack(out, depth - 1);
  *out += frame[depth % 1024];
}
"""


@pytest.fixture
def small(tmp_path: Path) -> Callable:
    (tmp_path / "small.cu").write_text(SMALL_KERNELS)
    (tmp_path / "small.cuh").write_text("#define SCALE 2.0f\n#ifndef ELEMENTS\n#define ELEMENTS 64\n#endif\n")

    def kernel(name: str, *defines: str) -> emulator.Kernel:
        return emulator.kernel(tmp_path / "small.cu", name, include=INCLUDE, defines=defines)

    return kernel


@pytest.mark.parametrize("build", BUILDS)
def test_arguments(small: Callable, build: str) -> None:
    with emulator.settings(build=build):
        shape = np.array((3, 4), np.dtype([("height", np.int32), ("width", np.int32)]))
        out = emulator.empty((3, 4), np.float32)
        small("fill")((1,), (8,), (out, shape, np.float64(2.5)))
        assert (out == 2.5).all()

        result = np.zeros(1, np.int32)
        small("tell_null")((1,), (1,), (None, np.zeros(0, np.float32), result))
        assert result[0] == 3

        table = emulator.empty(3, np.float32)
        small("read_table")((1,), (3,), (table,))
        assert table.tolist() == [1, 2, 4]


def test_wrong_arguments(small: Callable) -> None:
    copy = small("copy")
    a, b, count = np.zeros(4, np.float32), np.zeros(4, np.float32), np.int32(4)
    launch = lambda *args: copy((1,), (4,), args)  # noqa: E731
    with pytest.raises(TypeError, match="copy takes 3 arguments, got 2"):
        launch(a, b)
    with pytest.raises(TypeError, match="argument 2 is a value of 4 bytes, got 8 bytes of int64"):
        launch(a, b, np.int64(4))
    with pytest.raises(
        TypeError, match=r"argument 2 is a value of 4 bytes: pass a NumPy scalar, not 4 \(int\)"
    ):
        launch(a, b, 4)
    with pytest.raises(TypeError, match=r"argument 2 is a value .*, not an array of shape \(4,\)"):
        launch(a, b, a)
    with pytest.raises(TypeError, match="argument 1 is a pointer: pass an array or None"):
        launch(a, count, count)
    with pytest.raises(
        ValueError, match="argument 1 may be written by the kernel, and the array is read-only"
    ):
        launch(a, np.broadcast_to(b, (2, 4)), count)
    with pytest.raises(ValueError, match="arguments 0 and 1 overlap in memory"):
        launch(a, a[1:], count)
    launch(a[:2], a[2:], np.int32(2))


def test_strided_views(small: Callable) -> None:
    whole = np.zeros((5, 8), np.float32)
    view = whole[1:4, 2:5]
    small("step")((1,), (1,), (view, np.int32(3), np.int32(3), np.int32(8)))
    expected = np.zeros((5, 8), np.float32)
    expected[1:4, 2:5] = 1
    np.testing.assert_array_equal(whole, expected)
    with pytest.raises(EmulatorError, match="out-of-bounds"):
        small("step")((1,), (1,), (view, np.int32(3), np.int32(4), np.int32(8)))
    small("step")((1,), (1,), (whole[::-1, :][4:], np.int32(1), np.int32(8), np.int32(8)))
    expected[0] += 1
    np.testing.assert_array_equal(whole, expected)
    reversed_rows = np.zeros((2, 4), np.float32)[::-1]
    small("step")((1,), (1,), (reversed_rows, np.int32(2), np.int32(4), np.int32(-4)))
    assert (reversed_rows == 1).all()


@pytest.mark.parametrize("build", BUILDS)
def test_alignment_is_kept(build: str) -> None:
    """A view that starts 4 bytes into an array is as misaligned for the kernel as it is for the caller."""
    values = np.arange(66, dtype=np.float32)
    out = np.zeros(64, np.float32)
    with emulator.settings(build=build):
        kernel = emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE, defines=("FIXED",))
        number = np.int32(BUG_NUMBERS["load_misaligned_vector"])
        kernel((1,), (64,), (number, values[:64], out, np.int32(64)))
        with pytest.raises(EmulatorError, match="misaligned"):
            kernel((1,), (64,), (number, values[1:65], out, np.int32(64)))


def test_vector_load_across_the_end() -> None:
    out = np.zeros(64, np.float32)
    with emulator.settings(build="check"):
        kernel = emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE, defines=("FIXED",))
        number = np.int32(BUG_NUMBERS["load_misaligned_vector"])
        with pytest.raises(EmulatorError, match=r"read of 16 bytes in argument 1 \(248 bytes\) at byte 240"):
            kernel((1,), (64,), (number, np.zeros(62, np.float32), out, np.int32(62)))


def test_launch_limits(small: Callable) -> None:
    args = (np.zeros(4, np.float32), np.zeros(4, np.float32), np.int32(4))
    for grid, block, shared_mem, reason in [
        ((0,), (32,), 0, "at least 1"),
        ((1,), (32, 0), 0, "at least 1"),
        ((1,), (1025,), 0, "1025 threads, at most 1024"),
        ((1,), (32, 33), 0, "1056 threads"),
        ((1,), (1, 1, 65), 0, "65 deep in z, at most 64"),
        ((1, 65536), (1,), 0, r"grid \(1, 65536, 1\), at most"),
        ((1, 1, 65536), (1,), 0, "at most"),
        ((2**31,), (1,), 0, "at most"),
        ((1,), (1,), 227 * 1024 + 1, "232449 bytes of dynamic shared memory"),
    ]:
        with pytest.raises(EmulatorError, match=f"invalid launch configuration: .*{reason}"):
            small("copy")(grid, block, args, shared_mem=shared_mem)


def test_shared_memory_limits(small: Callable) -> None:
    out = np.zeros(64, np.float32)
    kernel = small("static_shared_memory")
    kernel((1,), (64,), (out,), shared_mem=227 * 1024 - 256)
    assert (out == 1).all()
    with pytest.raises(EmulatorError, match="232464 bytes of shared memory in a block, at most 232448"):
        kernel((1,), (64,), (out,), shared_mem=227 * 1024 - 240)
    with pytest.raises(EmulatorError, match="49168 bytes of static shared memory, at most 49152"):
        small("static_shared_memory", "ELEMENTS=12289")((1,), (64,), (out,))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [(1,), (7,), (3, 4, 5), (2654, 3)])
def test_every_block_runs_once(small: Callable, grid: tuple, order: str) -> None:
    out = np.zeros(grid[::-1], np.int32)
    with emulator.settings(order=order, seed=5):
        small("mark_blocks")(grid, (2, 3, 4), (out,))
    assert (out == 1).all()


@pytest.mark.parametrize("build", BUILDS)
def test_usable_after_errors(build: str, rng: np.random.Generator) -> None:
    with emulator.settings(build=build):
        for bug in BUGS:
            if getattr(bug, build) not in (None, "wrong") and not bug.strict:
                with pytest.raises(EmulatorError):
                    run_bug(bug)
        assert tiled_gemm(rng)
        assert mma_gemm(rng)


def test_results_are_kept_back_after_an_error() -> None:
    out = np.zeros(64, np.float32)
    number = np.int32(BUG_NUMBERS["write_past_end"])
    kernel = emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE)
    with pytest.raises(EmulatorError):
        kernel((1,), (96,), (number, np.zeros(64, np.float32), out, np.int32(64)))
    assert (out == 0).all()


def test_null_pointer_and_stack_overflow(small: Callable) -> None:
    with pytest.raises(EmulatorError, match=r"read through a null pointer.* \(small\.cu:8\)"):
        small("copy")((1,), (1,), (None, np.zeros(1, np.float32), np.int32(1)))
    with pytest.raises(EmulatorError, match="stack overflow"):
        small("overflow_stack")((1,), (1,), (np.zeros(1, np.float32), np.int32(1000)))


def test_launches_from_many_threads(rng: np.random.Generator) -> None:
    results = []

    def work() -> None:
        generator = np.random.default_rng(1)
        for _ in range(5):
            results.append(tiled_gemm(generator))
            with pytest.raises(EmulatorError, match="out-of-bounds"):
                run_bug(BUGS[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def recorded_order(small: Callable, order: str, seed: int = 0) -> np.ndarray:
    """The turns of the threads of 5 blocks of 3 warps, before and after a barrier."""
    turns = np.full((2, 5, 3, 32), -1, np.int32)
    with emulator.settings(order=order, seed=seed):
        small("record_order")((5,), (96,), (turns, np.zeros(2, np.int32)))
    np.testing.assert_array_equal(np.sort(turns.reshape(2, 480)), [range(480)] * 2)
    return turns


def test_forward_and_reverse_order(small: Callable) -> None:
    forward = np.arange(480).reshape(5, 3, 32)
    np.testing.assert_array_equal(recorded_order(small, "forward")[0], forward)
    np.testing.assert_array_equal(recorded_order(small, "reverse")[0], 479 - forward)


def test_random_order(small: Callable) -> None:
    runs = np.array([recorded_order(small, "random", seed) for seed in range(8)])
    again = np.array([recorded_order(small, "random", seed) for seed in range(8)])
    np.testing.assert_array_equal(runs, again)
    # Warps run one after another, each as far as it goes; their lanes in no order.
    np.testing.assert_array_equal(runs.max(axis=-1) - runs.min(axis=-1), 31)
    assert not (np.diff(runs) == 1).all(axis=-1).any()
    order_of_blocks = runs.min(axis=(-1, -2)).argsort(axis=-1)
    order_of_warps = runs.min(axis=-1).argsort(axis=-1)
    assert len(np.unique(order_of_blocks[:, 0], axis=0)) > 2
    assert len(np.unique(order_of_warps.reshape(-1, 3), axis=0)) == 6
    assert (order_of_warps[:, 0] != order_of_warps[:, 1]).any()  # new at a barrier


# ---- builds


def test_edited_header_rebuilds(small: Callable, tmp_path: Path) -> None:
    def copied() -> float:
        out = np.zeros(1, np.float32)
        small("copy")((1,), (1,), (np.ones(1, np.float32), out, np.int32(1)))
        return out[0]

    assert copied() == 2
    (tmp_path / "small.cuh").write_text("#define SCALE 3.0f\n#define ELEMENTS 64\n")
    assert copied() == 3


def test_header_in_an_include_folder_rebuilds(tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    shutil.copytree(KERNELS_CU, headers)
    code = '#include "value.cuh"\n__global__ void store(int *out) { *out = VALUE; }\n'
    (tmp_path / "user.cu").write_text(code)
    out = np.zeros(1, np.int32)
    for value in (7, 12):
        (headers / "value.cuh").write_text(f'#include "platform.cuh"\n#define VALUE {value}\n')
        emulator.kernel(tmp_path / "user.cu", "store", include=[headers])((1,), (1,), (out,))
        assert out[0] == value


def test_kernels_are_cached(small: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDCN_CACHE_DIR", str(tmp_path / "cache"))
    first = small("copy")
    assert small("copy") is first
    with emulator.settings(build="check"):
        assert small("copy") is not first
    stems = sorted(path.name.rsplit("_", 1)[0] for path in (tmp_path / "cache").iterdir())
    runtimes = ["libcudcn_emulator_check", "libcudcn_emulator_fast"]
    assert stems == [*runtimes, "small_check", "small_fast"]


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('#include "platform.cuh"\n__global__ void wrong(int *out) { *out = undeclared; }\n')
    with pytest.raises(BuildError, match=r"wrong.cu:2:.*undeclared"):
        emulator.kernel(source, "wrong", include=INCLUDE)
    source.write_text('#include "platform.cuh"\n__global__ void wrong() { __shared__ float tile[4]; }\n')
    with pytest.raises(BuildError, match=r"declare shared memory with SMEM\(\) or DYN_SMEM\(\)"):
        emulator.kernel(source, "wrong", include=INCLUDE)


def test_missing_compiler(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"g\+\+ was not found: install it, e.g. `apt-get install g\+\+`"):
        small("copy")


def test_missing_addr2line(monkeypatch: pytest.MonkeyPatch) -> None:
    run_bug(BUGS[0], "FIXED")
    emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulatorError, match=r"at byte 256$"):
        run_bug(BUGS[0])


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64")])
def test_other_machines(small: Callable, monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(EmulatorError, match=f"on Linux on x86-64 only, this is {system} on {machine}"):
        small("copy")


# ---- settings and arrays


def test_settings_nest_and_return(monkeypatch: pytest.MonkeyPatch) -> None:
    from cudcn.emulator.configuration import current_settings

    monkeypatch.setenv("CUDCN_EMULATOR_ORDER", "reverse")
    before = current_settings()
    assert (before.build, before.order, before.seed, before.strict) == ("fast", "reverse", 0, False)
    with emulator.settings(build="check", seed=3):
        with emulator.settings(order="random", strict=True):
            now = current_settings()
            assert (now.build, now.order, now.seed, now.strict) == ("check", "random", 3, True)
        with pytest.raises(ZeroDivisionError), emulator.settings(order="random"):
            1 / 0  # noqa: B018
        assert current_settings().order == "reverse"
    assert current_settings() == before
    with pytest.raises(ValueError, match="build must be one of"), emulator.settings(build="slow"):
        pass
    monkeypatch.setenv("CUDCN_EMULATOR_ORDER", "sideways")
    with pytest.raises(ValueError, match=r"order must be one of .* got 'sideways'"):
        current_settings()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BFLOAT16])
def test_empty_is_full_of_nan(dtype: Any) -> None:
    array = emulator.empty((2, 3), dtype)
    assert array.shape == (2, 3)
    assert array.dtype == dtype
    assert np.isnan(array.astype(np.float64)).all()
    assert emulator.empty((2, 0), dtype).shape == (2, 0)
