"""The counting build: kernels whose accesses can be counted by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator.builds import INCLUDE, ORDERS
from emulator.products import mma_gemm, tiled_gemm

from cudcn import emulator
from cudcn.emulator import Counts, EmulatorError, Event

pytestmark = pytest.mark.usefixtures("default_settings")

KERNELS = """
#include "cp_async.cuh"
__global__ void load(const float *in, float *out, int stride, int first) {
  out[threadIdx.x] = in[first + stride * threadIdx.x];
}
__global__ void load_wide(const float4 *in, float *out, int stride) {
  const float4 four = in[stride * threadIdx.x];
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}
template <class T> __global__ void store_shared(float *out, int stride) {
  SMEM(T, tile, [33 * 32]);
  tile[stride * threadIdx.x] = T{};
}
__global__ void load_shared(float *out, int stride) {
  SMEM(float, tile, [33 * 32]);
  tile[threadIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += tile[stride * threadIdx.x] * i;  // loaded once, and kept in a register
  out[threadIdx.x] = sum;
}
__global__ void add(float *sums, int stride) { atomicAdd(sums + stride * threadIdx.x, 1.0f); }
__global__ void add_wide(float4 *sums) { atomicAdd(sums + threadIdx.x, float4{}); }
__global__ void copy(const float *in, float *out) {
  SMEM(float, tile, [32]);
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void diverge(const float *in, float *out) {
  for (unsigned i = 0; i <= threadIdx.x % 32; i++) out[threadIdx.x] = in[i];
}
__device__ float twice(const float *in) { return 2 * in[threadIdx.x]; }
__global__ void call(const float *in, float *out) {
  out[threadIdx.x] = twice(in);
}
__global__ void cube(const float *in, float *out) {
  out[threadIdx.x] = in[threadIdx.x] * in[threadIdx.x] * in[threadIdx.x] + in[threadIdx.x + 32];
}
__global__ void sweep(const float *in, float *out) {
  for (int i = 0; i < 4; i++) out[blockIdx.x * 4 + i] += in[i];
}
__global__ void fault(float *out) { if (threadIdx.x == 5) out[32] = 1; }
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counts") / "count.cu"
    path.write_text(KERNELS)
    return path


@pytest.fixture
def counted(source: Path) -> Callable[..., Counts]:
    """Runs a kernel of KERNELS, and tells what was counted."""

    def run(name: str, *args: Any, grid: int = 1, block: int = 32, sample: int = 0) -> Counts:
        with emulator.counts(sample) as found:
            emulator.kernel(source, name, include=INCLUDE)((grid,), (block,), args)
        (counts,) = found
        return counts

    return run


def only(counts: Counts, name: str, *, shared: bool = False) -> Event:
    (event,) = [e for e in counts.events if e.name == name and e.shared == shared]
    return event


def floats(count: int) -> np.ndarray:
    """Of a whole number of lines, so that the emulator's copy, which ends with a page, begins with a line."""
    return np.zeros(count, np.float32)


@pytest.mark.parametrize(
    ("stride", "first", "lines", "sectors"),
    [(1, 0, 1, 4), (0, 0, 1, 1), (2, 0, 2, 8), (8, 0, 8, 32), (32, 0, 32, 32), (1, 1, 2, 5), (1, 8, 2, 4)],
)
def test_global_loads(counted: Callable, stride: int, first: int, lines: int, sectors: int) -> None:
    counts = counted("load", floats(2048), floats(32), np.int32(stride), np.int32(first))
    load = only(counts, "load")
    assert (load.size, load.instructions, load.lanes) == (4, 1, 32)
    assert (load.lines, load.sectors, load.wavefronts) == (lines, sectors, 0)
    assert counts.loaded_sectors == sectors
    store = only(counts, "store")
    assert (store.instructions, store.lines, store.sectors) == (1, 1, 4)


@pytest.mark.parametrize(("stride", "lines", "sectors"), [(1, 4, 16), (2, 8, 32), (0, 1, 1), (8, 32, 32)])
def test_wide_loads(counted: Callable, stride: int, lines: int, sectors: int) -> None:
    load = only(counted("load_wide", floats(2048), floats(32), np.int32(stride)), "load")
    assert (load.size, load.instructions, load.lanes) == (16, 1, 32)
    assert (load.lines, load.sectors) == (lines, sectors)


@pytest.mark.parametrize(
    ("element", "stride", "wavefronts"),
    [
        ("float", 1, 1), ("float", 0, 1), ("float", 2, 2), ("float", 8, 8), ("float", 32, 32), ("float", 33, 1),
        ("double", 1, 2), ("double", 2, 4), ("float4", 1, 4), ("float4", 2, 8), ("float4", 0, 4), ("__half", 1, 1),
    ],
)  # fmt: skip
def test_shared_stores(counted: Callable, element: str, stride: int, wavefronts: int) -> None:
    store = only(counted(f"store_shared<{element}>", floats(32), np.int32(stride)), "store", shared=True)
    assert (store.instructions, store.wavefronts, store.lines, store.sectors) == (1, wavefronts, 0, 0)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (0, 1), (4, 4), (32, 32)])
def test_shared_loads_are_kept_in_registers(counted: Callable, stride: int, wavefronts: int) -> None:
    counts = counted("load_shared", floats(32), np.int32(stride))
    load = only(counts, "load", shared=True)
    assert (load.instructions, load.wavefronts) == (1, wavefronts)
    assert only(counts, "__syncthreads").instructions == 1


@pytest.mark.parametrize(("stride", "lines", "sectors"), [(0, 1, 1), (1, 1, 4), (8, 8, 32)])
def test_atomics(counted: Callable, stride: int, lines: int, sectors: int) -> None:
    sums = floats(256)
    counts = counted("add", sums, np.int32(stride))
    assert sums.sum() == 32
    atomic = only(counts, "atomic")
    assert (atomic.instructions, atomic.lanes, atomic.lines, atomic.sectors) == (1, 32, lines, sectors)
    assert counts.loaded_sectors == 0


def test_wide_atomics(counted: Callable) -> None:
    atomic = only(counted("add_wide", floats(128)), "atomic")
    assert (atomic.size, atomic.instructions, atomic.sectors) == (16, 1, 16)


def test_asynchronous_copies_count_once(counted: Callable) -> None:
    counts = counted("copy", floats(32), floats(32))
    source, target = only(counts, "copy"), only(counts, "copy", shared=True)
    assert (source.instructions, source.sectors) == (1, 4)
    assert (target.instructions, target.wavefronts) == (1, 1)
    assert counts.loaded_sectors == 4
    assert {e.name for e in counts.events} == {"copy", "load", "store", "__syncwarp"}


def test_lanes_that_run_longer(counted: Callable) -> None:
    """Lane i loads i + 1 times: the k-th loads of all lanes are one instruction."""
    load = only(counted("diverge", floats(32), floats(64), block=64), "load")
    assert (load.instructions, load.lanes, load.sectors) == (2 * 32, 2 * 32 * 33 // 2, 2 * 32)


def test_a_place_is_its_calls_too(counted: Callable) -> None:
    lines = [number for number, line in enumerate(KERNELS.splitlines(), 1) if "twice(" in line]
    load = only(counted("call", floats(32), floats(32)), "load")
    assert load.where == tuple(f"count.cu:{number}" for number in lines)
    (line,) = [number for number, line in enumerate(KERNELS.splitlines(), 1) if "atomicAdd(sums + stride" in line]
    assert only(counted("add", floats(32), np.int32(1)), "atomic").where == (f"count.cu:{line}",)


def test_a_line_loads_an_element_once(counted: Callable) -> None:
    counts = counted("cube", floats(64), floats(32))
    loads = [e for e in counts.events if e.name == "load"]
    assert [(e.instructions, e.sectors) for e in loads] == [(1, 4), (1, 4)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_of_the_blocks(counted: Callable, order: str) -> None:
    out = floats(400)
    with emulator.settings(order=order):
        counts = counted("sweep", np.ones(4, np.float32), out, grid=100, block=1, sample=10)
    assert (counts.grid, counts.block, counts.blocks) == ((100, 1, 1), (1, 1, 1), 10)
    ran = np.flatnonzero(out.reshape(100, 4).all(1))
    assert len(ran) == 10
    assert len(np.unique(ran // 20)) >= 4  # they are spread over the grid
    loads = [e for e in counts.events if e.name == "load"]
    assert sum(e.instructions for e in loads) == 10 * 4 * 2
    assert counts.loaded_sectors == 10 * 2  # each block's own, once
    assert counted("sweep", np.ones(4, np.float32), out, grid=3, block=1, sample=10).blocks == 3


def test_counts_end_with_the_block(source: Path) -> None:
    kernel = lambda: emulator.kernel(source, "add", include=INCLUDE)  # noqa: E731
    run = lambda: kernel()((2,), (32,), (floats(32), np.int32(1)))  # noqa: E731
    with emulator.counts() as outer:
        run()
        with emulator.counts(sample=1) as inner:
            run()
        run()
    run()
    assert [c.blocks for c in outer] == [2, 2]
    assert [c.blocks for c in inner] == [1]


def test_after_an_error(counted: Callable) -> None:
    with pytest.raises(EmulatorError, match="fault"):
        counted("fault", floats(32))
    assert only(counted("add", floats(32), np.int32(1)), "atomic").lanes == 32


def test_products_are_right_and_counted(rng: np.random.Generator) -> None:
    with emulator.counts() as found:
        assert mma_gemm(rng)
        assert tiled_gemm(rng)
    products, _ = found
    of_mma = [e for e in products.events if e.name == "mma.m16n8k16"]
    # 2 x 2 blocks of 64 x 64, 104 of k in steps of 32, by 16 x 8 x 16
    assert sum(e.instructions for e in of_mma) == 4 * (64 // 16) * (64 // 8) * (128 // 16)
    of_ldmatrix = sum(e.instructions for e in products.events if e.name.startswith("ldmatrix"))
    assert of_ldmatrix == sum(e.instructions for e in products.events if e.name == "load" and e.where in {
        f.where for f in products.events if f.name.startswith("ldmatrix")
    })  # fmt: skip
