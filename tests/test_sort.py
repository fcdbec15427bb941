"""The sort behind the input gradients, on cells that are given: against NumPy's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cudcn import emulator, launch
from cudcn.cuda.sort import Segments, sort
from cudcn.plan import Kernel, Plan, View

SOURCE = str(Path(__file__).parent / "emulator" / "kernels" / "sorted_cells.cu")
NOWHERE = -1


def sorting(plan: Plan, segments: Segments, outs: Sequence[View], given: View) -> None:
    found = sort(plan, segments, 16, Kernel(SOURCE, "count"), Kernel(SOURCE, "write"), given)
    for out, view in zip(outs, found, strict=True):
        plan.copy(out, view)


def check(given: np.ndarray, segments: Segments) -> None:
    """`given`: each sample's cell, counted through all segments."""
    given = given.astype(np.int32)
    starts, records = np.empty(segments.cells + 1, np.int32), np.empty(4 * segments.samples, np.int32)
    launch.run(sorting, segments, [starts, records], [given])
    order = np.argsort(given, kind="stable")[np.count_nonzero(given == NOWHERE) :]
    counts = np.bincount(given[order], minlength=segments.cells)
    assert starts.tolist() == [0, *np.cumsum(counts)]
    sorted_records = records.reshape(-1, 4)[: len(order)]
    assert sorted_records[:, 0].tolist() == order.tolist()
    assert np.array_equal(
        sorted_records[:, 1:].view(np.float32), np.column_stack([order, given[order], np.full(len(order), 0.5)])
    )


def any_cells(rng: np.random.Generator, segments: Segments, used: int) -> np.ndarray:
    """Of the first `used` cells of each segment, or none."""
    cells = rng.integers(-1, used, (segments.number, segments.segment_samples))
    return np.where(cells < 0, NOWHERE, cells + segments.segment_cells * np.arange(segments.number)[:, None]).ravel()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("segments", "used"),
    [
        (Segments(1, 1, 1), 1),
        (Segments(1, 7, 300), 7),
        (Segments(6, 700, 500), 700),  # cells of two blocks of the scan
        (Segments(2, 3000, 3), 3000),  # more cells than samples
        (Segments(3, 5, 900), 2),  # lists around 256, the longest that each sample goes over
        (Segments(2, 9, 70_000), 1),  # all in one cell; five digits
    ],
    ids=str,
)
def test_any_cells(segments: Segments, used: int, order: str, rng: np.random.Generator) -> None:
    with emulator.settings(build="fast", order=order, seed=3):
        check(any_cells(rng, segments, used), segments)


@pytest.mark.parametrize("size", [255, 256, 257, 258])
def test_the_longest_list_that_no_block_sorts(size: int) -> None:
    with emulator.settings(build="fast", order="random"):
        check(np.repeat([2, 0, 2], [100, 300, size - 100]), Segments(1, 3, 200 + size + 100))


def test_checking_build(rng: np.random.Generator) -> None:
    segments = Segments(2, 600, 2000)
    cells = any_cells(rng, segments, 600)
    cells[300:1200] = 17
    with emulator.settings(build="check", order="random"):
        check(cells, segments)


def test_nothing_lies_anywhere() -> None:
    check(np.full(600, NOWHERE), Segments(2, 5, 300))


class TestSegments:
    def test_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cells take 4 bytes, samples 8 and their record."""
        monkeypatch.setattr(launch, "WORKSPACE", 10_000)
        segments = Segments(2, 50, 40)
        assert segments.at_a_time("x", 16) == 10_000 // (400 + 80 * 24)
        assert segments.at_a_time("x", 32) == 10_000 // (400 + 80 * 40)
        assert segments.at_a_time("x", 16, 1000) == 10_000 // (1400 + 80 * 24)
        assert segments.at_a_time("x", 16, 20_000) == 1

    @pytest.mark.parametrize(("cells", "samples"), [(2**30, 1), (1, 2**30)])
    def test_too_many_for_an_int(self, cells: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "WORKSPACE", 2**50)
        assert Segments(1, cells, samples).at_a_time("x", 16) == 1
        with pytest.raises(ValueError, match=rf"x: on CUDA the input's gradient .* got {2 * samples} and {2 * cells}"):
            Segments(2, cells, samples).at_a_time("x", 16)
