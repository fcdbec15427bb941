"""Torch tensors of a case, and functions of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import torch  # a test file that takes these is skipped where there is none
from cases.case import Case, Tensors
from frameworks.comparing import PLAIN

import cudcn.torch  # noqa: F401  (which registers torch.ops.cudcn)


def to_torch(array: Any) -> Any:
    if array is None:
        return None
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def tensors(case: Case = PLAIN, dtype: str = "float64", device: str = "cpu", grad: bool = True) -> Tensors:
    """The case's tensors, requiring gradients where there are any."""
    given = {name: to_torch(t) for name, t in case.tensors(dtype).items()}
    return {
        name: None if t is None else t.to(device).requires_grad_(grad and name not in case.op.non_differentiable)
        for name, t in given.items()
    }


def flat(case: Case) -> list[Any]:
    """The attributes as the torch operators take them."""
    return [list(v) if isinstance(v, tuple) else v for v in case.op.canonical(**case.attributes).values()]


def overload(name: str) -> Any:
    return getattr(torch.ops.cudcn, name).default


def gradients(given: Tensors) -> Tensors:
    return {name: None if t is None else t.grad for name, t in given.items()}


def differentiable(case: Case) -> Tensors:
    """Those of the case's tensors that have a gradient, by name."""
    given = tensors(case, grad=False)
    flags = case.op.differentiable([*given.values()])
    return {name: t for (name, t), flag in zip(given.items(), flags, strict=True) if flag}


def forward_of(case: Case, names: Iterable[str]) -> Callable[..., Any]:
    """The operator as a function of these tensors alone."""
    rest = tensors(case, grad=False)
    return lambda *values: case.forward({**rest, **dict(zip(names, values, strict=True))})


def loss_of(case: Case, names: Iterable[str]) -> Callable[..., Any]:
    """A number whose gradient with respect to the output is `case.grad_output()`."""
    forward, grad_output = forward_of(case, names), to_torch(case.grad_output())
    return lambda *values: (forward(*values) * grad_output).sum()
