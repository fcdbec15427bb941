"""Cases and comparisons for the adapters' tests; no framework is imported here."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np

import cudcn
from cudcn.ops.deform_conv2d import OP

NAMES = tuple(OP.tensors)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# groups and offset groups, asymmetric padding, and the two pairs unequal
ATTRIBUTES = {"stride": (1, 2), "padding": ((2, 0), (0, 1)), "dilation": (2, 1)}
SHAPES = {
    "input": (2, 4, 6, 7),
    "offset": (2, 36, 4, 3),
    "weight": (6, 2, 3, 3),
    "bias": (6,),
    "mask": (2, 18, 4, 3),
}
VERSIONS = {
    "v1": ("input", "offset", "weight"),
    "v1_bias": NAMES[:4],
    "v2": NAMES,
    "v2_no_bias": (*NAMES[:3], "mask"),
}
LAYOUTS = ("NCHW", "NHWC")
SECOND = "deform_conv2d: the second derivative is not implemented"


def arrays(version: str = "v2", layout: str = "NCHW", dtype: Any = np.float64, batch: int = 2) -> list[Any]:
    rng = np.random.default_rng(0)
    result: list[Any] = []
    for name, shape in SHAPES.items():
        data = rng.standard_normal(shape)
        if name in ("input", "offset", "mask"):
            data = data[:batch]
            data = np.ascontiguousarray(data.transpose(0, 2, 3, 1)) if layout == "NHWC" else data
        result.append(data.astype(dtype) if name in VERSIONS[version] else None)
    return result


def double(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        return tensor.detach().cpu().double().numpy()
    return None if tensor is None else np.asarray(tensor).astype(np.float64)


def reference(layout: str, given: list[Any]) -> tuple[np.ndarray, np.ndarray, Any]:
    """Output, its gradient and the tensors' gradients, in float64 from the tensors' own values."""
    given = [double(t) for t in given]
    out = cudcn.deform_conv2d(*given, **ATTRIBUTES, layout=layout)
    grad = np.random.default_rng(1).standard_normal(out.shape)
    return out, grad, cudcn.deform_conv2d_backward(grad, *given, **ATTRIBUTES, layout=layout)


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    if want is None:
        assert got is None
    else:
        got = double(got)
        assert got.shape == want.shape
        assert np.abs(got - want).max(initial=0) <= tolerance * max(1, np.abs(want).max(initial=0))


def check_introduction(adapter: Any) -> None:
    """Names, signatures and docstrings are those of the public pair."""
    for name in ("deform_conv2d", "deform_conv2d_backward"):
        bound, public = getattr(adapter, name), getattr(cudcn, name)
        assert bound.__name__ == name
        assert inspect.signature(bound) == inspect.signature(public)
        assert bound.__doc__ == public.__doc__


def check_tensors_by_name(adapter: Any, given: list[Any]) -> None:
    want = double(adapter.deform_conv2d(*given, **ATTRIBUTES))
    by_name = dict(zip(NAMES, given, strict=True))
    assert_close(adapter.deform_conv2d(**by_name, **ATTRIBUTES), want)
    assert_close(adapter.deform_conv2d(given[0], **dict(list(by_name.items())[1:]), **ATTRIBUTES), want)
