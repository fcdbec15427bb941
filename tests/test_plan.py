"""What a call's plan is made of: views of arrays that are not there, scratch memory, and what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from cudcn import launch
from cudcn.plan import ALIGNMENT, Launch, Layout, Plan, View, Zero


def layout(array: np.ndarray) -> Layout:
    return Layout(array.shape, array.strides, array.dtype, array.__array_interface__["data"][0] % ALIGNMENT)


def check(view: View, base: np.ndarray, want: np.ndarray) -> None:
    got = launch.array_of([base], view)
    assert (got.shape, got.strides, got.dtype) == (want.shape, want.strides, want.dtype)
    assert np.array_equal(got, want)
    assert view.is_contiguous == want.flags.c_contiguous
    assert (view.size, view.nbytes) == (want.size, want.nbytes)
    if want.size:
        assert view.alignment == np.gcd(ALIGNMENT, want.__array_interface__["data"][0])


@given(st.data(), arrays.array_shapes(min_dims=1, max_dims=4, max_side=5))
def test_views_are_numpys(data: st.DataObject, shape: tuple[int, ...]) -> None:
    base = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    key = data.draw(arrays.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    part = base[key]
    if not isinstance(part, np.ndarray):
        return
    (view,) = Plan([layout(base)]).tensors
    check(view[key], base, part)
    order = data.draw(st.permutations(range(part.ndim)))
    check(view[key].transpose(order), base, part.transpose(order))
    check(view[key].T, base, part.T)
    if part.ndim > 1:
        check(view[key].swapaxes(0, -1), base, part.swapaxes(0, -1))


def test_an_array_that_goes_backwards() -> None:
    base = np.arange(12, dtype=np.int16).reshape(3, 4)[::-1, ::-1]
    (view,) = Plan([layout(base)]).tensors
    check(view[1:, ::2], base, base[1:, ::2])


def test_a_view_cannot_be_assigned_to() -> None:
    (view,) = Plan([layout(np.zeros(3))]).tensors
    with pytest.raises(TypeError):
        view[...] = 0


class TestScratch:
    def test_arrays_are_apart(self) -> None:
        plan = Plan([])
        for size in (1, 512, 513, 0, 7):
            plan.empty((size,), np.int8)
        assert [scratch.offset for scratch in plan.scratch] == [0, 512, 1024, 2048, 2048]
        assert plan.scratch_bytes == 2560

    def test_reused(self) -> None:
        plan = Plan([])
        plan.empty((100,), np.float64)
        for _ in range(3):
            with plan.reused():
                plan.empty((1000,), np.float64)
                with plan.reused():
                    plan.zeros((5,), np.int32)
            plan.empty((1,), np.int32)
        offsets = [0, 1024, 9216, 1024, 1536, 9728, 1536, 2048, 10240, 2048]
        assert [scratch.offset for scratch in plan.scratch] == offsets
        assert plan.scratch_bytes == 10752

    @pytest.mark.parametrize("way", ["clear", "launch", "run"])
    def test_what_is_freed_cannot_be_used(self, way: str) -> None:
        plan = Plan([])
        with plan.reused():
            view = plan.empty((3,), np.float32)
        ways = {
            "clear": lambda: plan.clear(view),
            "launch": lambda: plan.launch(launch.Kernel("sort", "sort_scan"), 1, (1, 1), view[1:]),
            "run": lambda: plan.run(lambda _: None, view),
        }
        with pytest.raises(LookupError, match="already another's"):
            ways[way]()


class TestCopies:
    def test_contiguous(self) -> None:
        plan = Plan([layout(np.zeros((2, 3), np.float32)), layout(np.zeros((2, 3), np.float32).T)])
        as_it_is, turned = plan.tensors
        assert plan.contiguous(as_it_is) is as_it_is
        assert not plan.steps
        copy = plan.contiguous(turned)
        assert copy.is_contiguous
        assert copy.shape == (3, 2)
        assert plan.contiguous(as_it_is, np.float64).dtype == np.float64
        assert len(plan.steps) == 2

    @pytest.mark.parametrize(
        ("residue", "stride", "copied"), [(0, 4, False), (4, 4, False), (2, 4, True), (0, 6, True), (12, 8, False)]
    )
    def test_addressable(self, residue: int, stride: int, copied: bool) -> None:
        plan = Plan([Layout((3,), (stride,), np.dtype(np.float32), residue)])
        (view,) = plan.tensors
        assert (plan.addressable(view) is not view) == copied == bool(plan.steps)
        assert all(part.dtype == np.uint8 for step in plan.steps for part in step.views)  # CuPy's kernels count so, too

    def test_clear(self) -> None:
        plan = Plan([layout(np.zeros((4, 4)))])
        (view,) = plan.tensors
        plan.clear(view)
        plan.clear(view[:, 1:])
        assert plan.steps[0] == Zero(view)
        assert not isinstance(plan.steps[1], Zero | Launch)


class TestRun:
    def test_steps_run_in_order(self) -> None:
        def make(plan: Plan, number: int, outs: Sequence[View], given: View, missing: Any) -> None:
            assert missing is None
            scratch = plan.zeros(given.shape, np.float64)
            plan.copy(scratch[::2], given[::2])
            plan.copy(outs[0], scratch)
            plan.clear(outs[0][number:])

        out, values = np.full(6, 9.0), np.arange(1.0, 7)
        launch.run(make, 5, [out, None], [values, None])
        assert out.tolist() == [1, 0, 3, 0, 5, 0]

    def test_plans_are_remembered(self) -> None:
        made = []

        def make(plan: Plan, geometry: object, outs: Sequence[View], given: View) -> None:
            made.append(given.layout)
            plan.copy(outs[0], given)

        geometry = object()
        for values in (np.arange(4.0), np.arange(4.0) + 1, np.arange(8.0)[::2], np.arange(4, dtype=np.float32)):
            out = np.empty(4)
            launch.run(make, geometry, [out], [values])
            assert np.array_equal(out, values)
        assert [one.strides for one in made] == [(8,), (16,), (4,)]  # the second is as the first

    def test_tf32_is_part_of_a_plan(self) -> None:
        asked = []

        def make(plan: Plan, geometry: None, outs: Sequence[View], given: View) -> None:
            asked.append((given.dtype, launch.tf32()))

        for dtype in np.float32, np.float64:
            for allowed in False, True, False:
                with launch.allow_tf32(allowed):
                    launch.run(make, None, [], [np.zeros(4, dtype)])
        assert asked == [(np.float32, False), (np.float32, True), (np.float64, False)]
