"""What a raw array may be: any strides, any address, a memmap, an object with DLPack; and what is refused."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import EACH
from cases.case import Case, Tensors

import cudcn

FIRST = next(case for case in EACH if case.op.name == "deform_conv2d")


def in_a_record(array: np.ndarray) -> np.ndarray:
    """The field of a record whose size no float's divides."""
    record = np.zeros(array.shape, [("before", np.int8), ("field", array.dtype), ("after", np.int16)])
    record["field"] = array
    return record["field"]


def a_byte_further(array: np.ndarray) -> np.ndarray:
    """Dense, at an odd address."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def backwards(array: np.ndarray) -> np.ndarray:
    """Negative strides."""
    every = (slice(None, None, -1),) * array.ndim
    return array[every].copy()[every]


def every_second(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def changed(tensors: Tensors, change: Callable[[np.ndarray], Any]) -> Tensors:
    return {name: None if t is None else change(t) for name, t in tensors.items()}


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("change", [in_a_record, a_byte_further, backwards, every_second])
@pytest.mark.parametrize("case", EACH, ids=lambda case: case.op.name)
def test_where_elements_lie(case: Case, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    moved = changed(tensors, change)
    close = {"rtol": 1e-5, "atol": 1e-5}  # sums have another order in other memory
    np.testing.assert_allclose(case.forward(moved), case.forward(tensors), **close)
    grads = case.backward(tensors, grad_output)
    for name, grad in case.backward(moved, change(grad_output)).items():
        if grads[name] is None:
            assert grad is None
        else:
            np.testing.assert_allclose(grad, grads[name], **close)


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.op.name)
def test_a_memmap_is_its_array(case: Case, tmp_path: Path) -> None:
    def mapped(array: np.ndarray) -> np.memmap:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.write_bytes(array.tobytes())
        return np.memmap(path, array.dtype, "r", shape=array.shape)

    out = case.forward(changed(case.tensors(), mapped))
    assert type(out) is np.ndarray
    assert np.array_equal(out, case.forward(case.tensors()))


class Quantity(np.ndarray):
    """An array with a meaning of its own."""


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (np.ma.masked_invalid, "MaskedArray"),
        (lambda a: np.matrix(a.reshape(-1, a.shape[-1])), "matrix"),
        (lambda a: a.view(Quantity), "Quantity"),
    ],
)
@pytest.mark.parametrize("case", EACH, ids=lambda case: case.op.name)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_other_arrays_are_refused(case: Case, make: Callable[[Any], Any], name: str) -> None:
    tensors = case.tensors()
    for tensor in (n for n, t in tensors.items() if t is not None):
        with pytest.raises(TypeError, match=f"{case.op.name}: {tensor} must be a plain array, got a {name}"):
            case.forward({**tensors, tensor: make(tensors[tensor])})
    grad_output = case.grad_output()
    with pytest.raises(TypeError, match=f"{case.op.name}_backward: grad_output must be a plain array, got a {name}"):
        case.backward(tensors, make(grad_output))


# ---- DLPack


class Exporter:
    def __init__(self, array: Any, device: Any = None) -> None:
        self._array, self._device = array, device

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__() if self._device is None else self._device()


def test_an_object_with_dlpack() -> None:
    out = FIRST.forward(changed(FIRST.tensors(), Exporter))
    assert type(out) is np.ndarray
    assert np.array_equal(out, FIRST.forward(FIRST.tensors()))


def test_bfloat16_by_dlpack_is_refused_in_words() -> None:
    torch = pytest.importorskip("torch")
    given = changed(FIRST.tensors(), lambda a: Exporter(torch.from_numpy(a).bfloat16()))
    with pytest.raises(TypeError, match=r"deform_conv2d: input must be readable by DLPack.*no bfloat16"):
        FIRST.forward(given)


def _raise() -> Any:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("exporter", "kind", "message"),
    [
        (lambda a: Exporter(a, _raise), TypeError, "offset must say where it lies.*out of order"),
        (lambda a: Exporter(a, lambda: None), TypeError, "offset must say where it lies"),
        (lambda a: Exporter(a, lambda: (7, 0)), ValueError, "offset must be in CPU or CUDA memory, got .* type 7"),
        (lambda a: Exporter(types.SimpleNamespace(__dlpack__=_raise), lambda: (1, 0)), TypeError,
         "offset must be readable by DLPack.*out of order"),
        (lambda a: Exporter(types.SimpleNamespace(__dlpack__=lambda: 3), lambda: (1, 0)), TypeError,
         "offset must be readable by DLPack"),
    ],
)  # fmt: skip
def test_broken_dlpack(exporter: Callable[[Any], Any], kind: type, message: str) -> None:
    given = changed(FIRST.tensors(), Exporter)
    with pytest.raises(kind, match=f"deform_conv2d: {message}"):
        FIRST.forward({**given, "offset": exporter(given["offset"])})


def test_gpu_memory_without_cupy_names_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # so its import fails
    given = changed(FIRST.tensors(), lambda a: Exporter(a, lambda: (2, 0)))
    with pytest.raises(ImportError, match=re.escape("need CuPy: install cupy-cuda12x or cupy-cuda13x")):
        FIRST.forward(given)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EACH, ids=lambda case: case.op.name)
def test_where_elements_lie_on_the_gpu(case: Case) -> None:
    import cupy

    def further(array: np.ndarray) -> Any:
        """Dense, two bytes from where a float32 may lie."""
        buffer = cupy.zeros(array.nbytes + 2, np.uint8)
        buffer[2:] = cupy.asarray(np.frombuffer(array.tobytes(), np.uint8))
        return cupy.ndarray(array.shape, array.dtype, buffer.data + 2)

    got, want = (case.forward(changed(case.tensors("float32"), make)).get() for make in (further, cupy.asarray))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_cupy_subclass_is_refused() -> None:
    import cupy

    class Distributed(cupy.ndarray):
        pass

    given = changed(FIRST.tensors(), cupy.asarray)
    with pytest.raises(TypeError, match="deform_conv2d: weight must be a plain array, got a Distributed"):
        FIRST.forward({**given, "weight": given["weight"].view(Distributed)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_one_element_are_not_summed_in_half(dtype: str) -> None:
    """A sum of 4096 ones and one hundredth of each, in a 1 x 1 output."""
    import cupy
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    image, weight = np.ones((1, 4096, 1, 1)).astype(kind), np.full((1, 4096, 1, 1), 1.0 / 128).astype(kind)
    offset = np.zeros((1, 2, 1, 1), kind)
    out = cudcn.deform_conv2d(*map(cupy.asarray, (image, offset, weight)))
    assert float(out.get()[0, 0, 0, 0]) == 32.0


@pytest.mark.gpu
def test_bfloat16_needs_a_numpy_that_has_its_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(np, "__version__", "2.1.1")
    with pytest.raises(ImportError, match=r"need NumPy 2\.1\.2 or later, this is 2\.1\.1"):
        FIRST.forward(changed(FIRST.tensors("bfloat16"), cupy.asarray))
