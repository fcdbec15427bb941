"""Every lane-level operation against plain NumPy: on the emulator, and on a device where there is one."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator.builds import BFLOAT16, BUILDS, INCLUDE, KERNELS, KERNELS_CU, ORDERS, PREFIX

from cudcn import emulator

pytestmark = pytest.mark.usefixtures("default_settings")


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
