"""Samples sorted by the cell that they lie in, for input gradients without atomics. See kernels_cu/sort.cuh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .. import launch, sources
from ..check import LARGEST
from ..geometry import ceil_div
from ..plan import Kernel, Plan, View

_THREADS = sources.constant("sort.cuh", "SORTERS")
_COUNTED = sources.constant("sort.cuh", "COUNTED")
_SCANNED = sources.constant("sort", "SCANNED")
_BLOCKS = 1024  # that share out the long lists: enough to fill a GPU


class Segments(NamedTuple):
    """What is sorted apart in one sort, and how many cells and samples each has."""

    number: int
    segment_cells: int
    segment_samples: int

    @property
    def cells(self) -> int:
        return self.number * self.segment_cells

    @property
    def samples(self) -> int:
        return self.number * self.segment_samples

    def times(self, factor: int) -> Segments:
        return self._replace(number=factor * self.number)

    def at_a_time(self, name: str, record: int, more: int = 0) -> int:
        """How many times as many are sorted at a time: these fit the workspace, at `more` bytes beside the sort's.

        `record` is a record's size in bytes.
        """
        if max(self.cells, self.samples) > LARGEST:
            raise ValueError(
                f"{name}: on CUDA the input's gradient sorts fewer than 2**31 samples into fewer than 2**31 cells at a "
                f"time, got {self.samples} and {self.cells}"
            )
        scratch = 4 * self.cells + (8 + record) * self.samples + more
        return max(1, min(launch.WORKSPACE // max(1, scratch), LARGEST // max(1, self.cells, self.samples)))


def kernels() -> list[Kernel]:
    """Those of every family."""
    return [_kernel(name) for name in ("totals", "scan", "fill", "long")]


def record_bytes(dtype: Any) -> int:
    """Of `Record`, with positions of `dtype`."""
    return 4 * int(np.dtype(dtype).itemsize)


def sort(
    plan: Plan, segments: Segments, record: int, count: Kernel, write: Kernel, *arguments: Any
) -> tuple[View, View]:
    """`starts` and the records, of `record` bytes each.

    The kernels `count` and `write` take these arguments, and then those of count_samples and write_records.
    """
    cells, samples = segments.cells, segments.samples
    most_long = samples // (_COUNTED + 1)
    zeros = plan.zeros((cells + 1 + 1 + most_long,), np.int32)
    starts, long_lists = zeros[: cells + 1], zeros[cells + 1 :]
    records = plan.empty((samples * record // 4,), np.int32)

    def launch(kernel: Kernel, grid: int, *args: Any) -> None:
        plan.launch(kernel, grid, (_THREADS, 1), *args)

    with plan.reused():
        cell_of, order = (plan.empty((samples,), np.int32) for _ in range(2))
        scanned = ceil_div(cells, _SCANNED)
        totals = plan.empty((scanned,), np.int32)
        each_sample = ceil_div(samples, _THREADS)
        launch(count, each_sample, *arguments, np.int32(samples), cell_of, starts)
        launch(_kernel("totals"), scanned, starts[1:], np.int32(cells), totals)
        launch(_kernel("scan"), 1, totals, np.int32(scanned), np.int32(scanned), None, None)
        launch(_kernel("scan"), scanned, starts[1:], np.int32(cells), np.int32(_SCANNED), totals, long_lists)
        launch(_kernel("fill"), each_sample, cell_of, np.int32(samples), starts, order)
        sizes = np.int32(segments.segment_cells), np.int32(segments.segment_samples)
        spare = records[:samples]  # which the blocks of the lists write, before there are records
        launch(_kernel("long"), min(most_long + 1, _BLOCKS), long_lists, starts, *sizes, order, spare)
        launch(write, each_sample, *arguments, np.int32(cells), cell_of, starts, order, records)
    return starts, records


@functools.cache
def _kernel(name: str) -> Kernel:
    return Kernel("sort", f"sort_{name}")
