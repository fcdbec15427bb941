"""What is tested of every operator: a `Case` per configuration, and the tests that take one.

A test file parametrizes subclasses of `EveryCase` and `EverySmallCase` over its cases; the adapters' tests take the
same cases.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

import cudcn
from cudcn import emulator, launch
from cudcn.op import Op

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
HALVES = ("float16", "bfloat16")
Tensors = dict[str, Any]  # by name, None for one that is left out


@dataclass(frozen=True)
class Case:
    """One configuration of an operator. A subclass has its sizes as fields and says what the tensors are."""

    name: str
    op: ClassVar[Op]
    # of a result's norm. Halves: the columns, the products and the sum are each rounded to 11 or 8 bits.
    tolerance: ClassVar[Mapping[str, float]] = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5, "float64": 1e-12}

    def __str__(self) -> str:
        return self.name

    @property
    def attributes(self) -> dict[str, Any]:
        raise NotImplementedError

    def values(self, random: np.random.Generator) -> Tensors:
        """Every tensor, in float64 if it is not of integers."""
        raise NotImplementedError

    def slow(self, **tensors: Any) -> np.ndarray:
        """The oracle on `values()`."""
        raise NotImplementedError

    def smooth(self, tensors: Tensors) -> Tensors:
        """The tensors moved away from where the operator has no derivative."""
        return tensors

    @functools.lru_cache  # noqa: B019
    def tensors(self, dtype: str = "float64", fine: tuple[str, ...] = ()) -> Tensors:
        """The same numbers for every dtype, as far as it holds them; those in `fine` are float32."""
        values = self.values(np.random.default_rng(len(self.name)))
        assert list(values) == list(self.op.tensors)
        return {name: _cast(value, "float32" if name in fine else dtype) for name, value in values.items()}

    @functools.lru_cache  # noqa: B019
    def expected(self) -> np.ndarray:
        return self.slow(**self.tensors())

    def output_shape(self) -> tuple[int, ...]:
        tensors = cudcn.op.specs(self.tensors().values())
        return self.op.plan(tensors, **self.op.canonical(**self.attributes)).output.shape

    def grad_output(self, dtype: str = "float64") -> np.ndarray:
        return _cast(np.random.default_rng(1).standard_normal(self.output_shape()), dtype)

    def forward(self, tensors: Tensors) -> Any:
        return getattr(cudcn, self.op.name)(**tensors, **self.attributes)

    def backward(self, tensors: Tensors, grad_output: Any) -> Tensors:
        return getattr(cudcn, f"{self.op.name}_backward")(grad_output, **tensors, **self.attributes)._asdict()

    def close(self, got: Any, want: Any, dtype: str) -> None:
        assert error(got, want) <= self.tolerance[dtype]


def _cast(value: Any, dtype: str) -> Any:
    return value if value is None or value.dtype.kind in "iu" else value.astype(DTYPES[dtype])


def widened(tensors: Tensors) -> Tensors:
    return {name: _cast(tensor, "float64") for name, tensor in tensors.items()}


def error(got: Any, want: Any) -> float:
    """Relative to the norm of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


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
            if tensor is None or name in case.op.constants:
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
    """The slower tests, of a few small cases."""

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


def launched(monkeypatch: pytest.MonkeyPatch) -> set[launch.Kernel]:
    """What the emulator launches from now on."""
    seen: set[launch.Kernel] = set()
    run = launch._Emulated.launch

    def spy(self: Any, kernel: launch.Kernel, *args: Any) -> None:
        seen.add(kernel)
        run(self, kernel, *args)

    monkeypatch.setattr(launch._Emulated, "launch", spy)
    return seen
