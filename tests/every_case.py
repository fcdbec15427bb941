"""What is tested of every operator.

A test file parametrizes subclasses of these over its cases.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from cases.case import DTYPES, HALVES, Case, Tensors, widened

from cudcn import emulator, launch
from cudcn.plan import Kernel


class EveryCase:
    """The tests of one case on the CPU path, on the emulator, and on a GPU where there is one."""

    def test_forward_is_the_slow_loop(self, case: Case) -> None:
        case.close(case.forward(case.tensors()), case.expected(), "float64")

    def test_gradients_are_finite_differences(self, case: Case) -> None:
        """Along random directions."""
        tensors = case.smooth(dict(case.tensors()))
        grad_output = case.grad_output()
        grads = case.backward(tensors, grad_output)
        random, step = np.random.default_rng(0), 1e-6
        for name, tensor in tensors.items():
            if tensor is None or name in case.op.non_differentiable:
                assert grads[name] is None
                continue
            for _ in range(3):
                direction = random.standard_normal(tensor.shape)
                above, below = (
                    (case.forward({**tensors, name: tensor + sign * step * direction}) * grad_output).sum()
                    for sign in (1, -1)
                )
                slope = (above - below) / (2 * step)
                assert (grads[name] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-6), name

    @pytest.mark.parametrize("dtype", ["float32", *HALVES])
    def test_smaller_types(self, case: Case, dtype: str) -> None:
        agrees_with_float64(case, dtype)

    @pytest.mark.usefixtures("emulated")
    @pytest.mark.parametrize("order", ["forward", "reverse"])
    def test_emulated(self, case: Case, order: str) -> None:
        with emulator.settings(build="fast", order=order):
            agrees_with_float64(case, "float64")

    @pytest.mark.usefixtures("emulated")
    def test_emulated_float32(self, case: Case) -> None:
        with emulator.settings(build="fast"):
            agrees_with_float64(case, "float32")

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_on_the_gpu(self, case: Case, dtype: str) -> None:
        import cupy

        tensors = case.tensors(dtype)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            arrays = {name: None if t is None else cupy.asarray(t) for name, t in tensors.items()}
            out = case.forward(arrays)
            grads = case.backward(arrays, cupy.asarray(case.grad_output(dtype)))
            stream.synchronize()
        _check(case, dtype, tensors, out.get(), {n: None if g is None else g.get() for n, g in grads.items()})


class EverySmallCase:
    """The slowest test, of a few small cases."""

    @pytest.mark.usefixtures("emulated")
    def test_checking_build(self, case: Case) -> None:
        with emulator.settings(build="check"):
            agrees_with_float64(case, "float32")


def agrees_with_float64(case: Case, dtype: str, fine: Collection[str] = ()) -> None:
    """The pair on the current device and dtype against the float64 CPU path on the same numbers."""
    tensors = case.tensors(dtype, tuple(fine))
    _check(case, dtype, tensors, case.forward(tensors), case.backward(tensors, case.grad_output(dtype)))


def _check(case: Case, dtype: str, tensors: Tensors, out: Any, grads: Tensors) -> None:
    assert out.dtype == DTYPES[dtype]
    with pytest.MonkeyPatch.context() as cpu:
        cpu.setenv("CUDCN_DEVICE", "cpu")
        case.close(out, case.forward(widened(tensors)), dtype)
        wants = case.backward(widened(tensors), case.grad_output(dtype).astype(np.float64))
    for name, want in wants.items():
        if want is None:
            assert grads[name] is None
        else:
            assert grads[name].dtype == tensors[name].dtype
            case.close(grads[name], want, dtype)


def launched(monkeypatch: pytest.MonkeyPatch) -> set[Kernel]:
    """What the emulator launches from now on."""
    seen: set[Kernel] = set()
    run = launch._Emulated.launch

    def spy(self: Any, kernel: Kernel, *args: Any) -> None:
        seen.add(kernel)
        run(self, kernel, *args)

    monkeypatch.setattr(launch._Emulated, "launch", spy)
    return seen
