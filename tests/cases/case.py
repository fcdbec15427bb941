"""A `Case`: one configuration of an operator, its tensors and its oracle."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

import cudcn
from cudcn.op import Op

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
HALVES = ("float16", "bfloat16")
Tensors = dict[str, Any]  # by name, None for one that is left out


@dataclass(frozen=True)
class Case:
    """One configuration of an operator.

    A subclass has its sizes as fields, among them `batch`, and says what the tensors are. `CASES` of a family's file
    are tested by its own test file; `ADAPTED`, small ones, by all tests of every operator, the frameworks' too.
    """

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
        values = self.values(np.random.default_rng(zlib.crc32(repr(self).encode())))
        assert list(values) == list(self.op.tensors)
        return {name: _cast(value, "float32" if name in fine else dtype) for name, value in values.items()}

    @functools.lru_cache  # noqa: B019
    def expected(self) -> np.ndarray:
        return self.slow(**self.tensors())

    def output_shape(self) -> tuple[int, ...]:
        tensors = cudcn.op.specs(self.tensors().values())
        return self.op.geometry(tensors, **self.op.canonical(**self.attributes)).output.shape

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
