"""Comparisons for the adapters' tests; no framework is imported here."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import EACH, deform_conv2d
from cases.case import Case, Tensors

import cudcn

PLAIN = next(case for case in deform_conv2d.ADAPTED if case.name == "v2" and case.layout == "NCHW")
SECOND = "the second derivative is not implemented"


def double(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        return tensor.detach().cpu().double().numpy()
    return None if tensor is None else np.asarray(tensor).astype(np.float64)


def expected(case: Case, tensors: Tensors, grad_output: Any) -> tuple[np.ndarray, Tensors]:
    """Output and gradients in float64, by NumPy from the tensors' own values."""
    wide = {
        name: double(t) if t is None or case.tensors()[name].dtype.kind == "f" else np.asarray(t)
        for name, t in tensors.items()
    }
    return case.forward(wide), case.backward(wide, double(grad_output))


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    if want is None:
        assert got is None
    else:
        got = double(got)
        assert got.shape == want.shape
        assert np.abs(got - want).max(initial=0) <= tolerance * max(1, np.abs(want).max(initial=0))


def check_introduction(adapter: Any, name: str) -> None:
    """Names, signatures and docstrings are those of the public pair; pickle finds them."""
    for function in (name, f"{name}_backward"):
        bound, public = getattr(adapter, function), getattr(cudcn, function)
        assert bound.__name__ == function
        assert inspect.signature(bound) == inspect.signature(public)
        assert bound.__doc__ == public.__doc__
        assert pickle.loads(pickle.dumps(bound)) is bound


def check_tensors_by_position(adapter: Any, case: Case, make: Callable[[Any], Any]) -> None:
    given = {name: make(t) for name, t in case.tensors().items()}
    function, want = getattr(adapter, case.op.name), double(case.forward(given))
    first, *rest = given
    assert_close(function(*given.values(), **case.attributes), want)
    assert_close(function(given[first], **{name: given[name] for name in rest}, **case.attributes), want)


def check_missing_arguments(adapter: Any, make: Callable[[Any], Any]) -> None:
    case = next(case for case in EACH if case.op.name == "roi_avg_pool")
    given = [make(t) for t in case.tensors().values()]
    for function, tensors in ((adapter.roi_avg_pool, given), (adapter.roi_avg_pool_backward, [given[0], *given])):
        for arguments, keywords, message in (
            (tensors, {}, "missing 1 required keyword-only argument: 'output_size'"),
            (tensors[:1], {"output_size": 1}, "missing .*'rois'"),
            ([], {"output_size": 1}, "missing .*'rois'"),
            ([*tensors, None], {"output_size": 1}, "takes . positional arguments but . "),
            (tensors, {"output_size": 1, "rois": tensors[-1]}, "got multiple values for argument 'rois'"),
            (tensors, {"output_size": 1, "gamma": 1}, "got an unexpected keyword argument 'gamma'"),
        ):
            with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) {message}"):
                function(*arguments, **keywords)
