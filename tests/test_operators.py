"""What holds of every operator, on one case of each."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cases import EACH
from cases.case import DTYPES, HALVES, Case
from every_case import agrees_with_float64, launched

import cudcn
from cudcn import emulator, op

every_operator = pytest.mark.parametrize("case", EACH, ids=lambda case: case.op.name)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES)
@every_operator
def test_half_data_with_any_float32_positions(case: Case, dtype: str) -> None:
    count = len(case.op.may_be_float32)
    with emulator.settings(build="fast"):
        for chosen in itertools.product((False, True), repeat=count):
            agrees_with_float64(case, dtype, tuple(itertools.compress(case.op.may_be_float32, chosen)))


@pytest.mark.usefixtures("emulated")
@every_operator
def test_half_data_on_the_checking_build(case: Case) -> None:
    with emulator.settings(build="check", order="reverse"):
        agrees_with_float64(case, "float16", case.op.may_be_float32[:1])


@pytest.mark.usefixtures("emulated")
@every_operator
def test_every_launched_instance_is_in_the_list(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which NVRTC compiles for every architecture."""
    seen = launched(monkeypatch)
    for dtype in DTYPES:
        agrees_with_float64(case, dtype)
    assert len(seen) >= len(DTYPES)
    assert seen <= set(case.op.cuda.kernels())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@every_operator
def test_gradients_have_the_same_bits_in_every_order(case: Case, dtype: str) -> None:
    """Of blocks, warps and lanes; where many samples meet in few pixels."""
    crowded = {"size": (5, 6), "rois": 60, "sizes": ((3, 4), (2, 2)), "queries": 100}
    case = replace(case, **{name: value for name, value in crowded.items() if hasattr(case, name)})
    tensors, grad_output = case.tensors(dtype), case.grad_output(dtype)
    runs = []
    for order, seed in (("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))):
        with emulator.settings(build="fast", order=order, seed=seed):
            runs.append(case.backward(tensors, grad_output))
    for name, first in runs[0].items():
        assert first is None or all(first.tobytes() == run[name].tobytes() for run in runs), name


@pytest.mark.usefixtures("any_device")
@every_operator
def test_only_the_gradients_that_are_wanted(case: Case) -> None:
    """Each alone, and in an array of any strides."""
    tensors, grad_output = tuple(case.tensors("float32").values()), case.grad_output("float32")
    geometry = case.op.known_geometry(cudcn.op.specs(tensors), **case.op.canonical(**case.attributes))
    for name, whole in case.backward(case.tensors("float32"), grad_output).items():
        if whole is None:
            continue
        wide = emulator.empty((*whole.shape[:-1], 2 * whole.shape[-1]), whole.dtype)
        grads = [wide[..., ::2] if name == n else None for n in case.op.tensors]
        case.op.backward(geometry, grads, grad_output, *tensors)
        case.close(wide[..., ::2], whole, "float32")


@pytest.mark.usefixtures("any_device")
@every_operator
def test_nothing_to_do(case: Case) -> None:
    """No images, and so no rois or queries."""
    empty = replace(case, batch=0, **({"rois": 0} if hasattr(case, "rois") else {}))
    assert empty.forward(empty.tensors()).shape == empty.output_shape()
    for name, grad in empty.backward(empty.tensors(), empty.grad_output()).items():
        if grad is not None:
            assert grad.shape == empty.tensors()[name].shape
            assert not np.any(grad)


@pytest.mark.parametrize("wrong", [True, 1.0, "1", (1, True), [1, 1.0], (1, (1,)), np.True_, {1}], ids=repr)
@pytest.mark.parametrize(
    "case", [case for case in EACH if case.op.name != "ms_deform_attn"], ids=lambda case: case.op.name
)
def test_a_call_that_has_passed_lets_no_other_through(case: Case, wrong: object) -> None:
    """Calls that look alike are checked once, and 1 == 1.0 == True."""
    tensors = list(case.tensors("float32").values())
    name = next(name for name, kind in case.op.attributes.items() if kind in ("Pair", "int"))

    def outcome(value: object) -> object:
        try:
            return case.op.function(*tensors, **{**case.attributes, name: value}).shape
        except (ValueError, TypeError) as error:
            return str(error)

    alone = outcome(wrong)
    for passing in (1, (1, 1), [1, 1]):
        outcome(passing)
    assert isinstance(alone, str)
    assert outcome(wrong) == alone


@every_operator
def test_no_more_calls_than_so_many_are_remembered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_REMEMBERED", 2)
    case.op._checked.clear()
    tensors = list(case.tensors("float32").values())
    for dtype in ("float32", "float64", "float16"):
        tensors = list(case.tensors(dtype).values())
        expected = case.op.function(*tensors, **case.attributes)
        assert 1 <= len(case.op._checked) <= 2
        np.testing.assert_array_equal(case.op.function(*tensors, **case.attributes), expected)
