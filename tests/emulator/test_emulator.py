"""The emulator: launches, builds and settings."""

import doctest
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator.bugs import BUG_NUMBERS, BUGS, run_bug
from emulator.builds import BFLOAT16, BUILDS, INCLUDE, KERNELS, KERNELS_CU, ORDERS
from emulator.products import mma_gemm, tiled_gemm

from cudcn import emulator
from cudcn.emulator import BuildError, EmulatorError

pytestmark = pytest.mark.usefixtures("default_settings")


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

    def kernel(name: str, *defines: str) -> emulator.Compiled:
        return emulator.kernel(tmp_path / "small.cu", name, include=INCLUDE, defines=defines)

    return kernel


def test_the_example_runs() -> None:
    outcome = doctest.testmod(emulator)
    assert (outcome.attempted, outcome.failed) == (10, 0)


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
    with pytest.raises(TypeError, match=r"argument 2 is a value of 4 bytes: pass a NumPy scalar, not 4 \(int\)"):
        launch(a, b, 4)
    with pytest.raises(TypeError, match=r"argument 2 is a value .*, not an array of shape \(4,\)"):
        launch(a, b, a)
    with pytest.raises(TypeError, match="argument 1 is a pointer: pass an array or None"):
        launch(a, count, count)
    with pytest.raises(ValueError, match="argument 1 may be written by the kernel, and the array is read-only"):
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


FORKED = """
import os
from cudcn.emulator import launch
with launch._launch_lock:  # as a thread has it that launches
    child = os.fork()
    if child == 0:
        os._exit(0 if launch._launch_lock.acquire(timeout=10) else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_launches_though_its_parent_was_launching() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True)
