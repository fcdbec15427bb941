"""Which framework an array is of, where it lies, and which code runs it, without importing any framework."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from .dtypes import DTYPES
from .plan import layout_of

_NOTHING = contextlib.nullcontext()
_CPU = 1  # DLPack's device types
_CUDA = 2
_PLAIN = frozenset({bool, int, float, str, type(None)})
# The class of arrays, by the module that has it; JAX's last, as its isinstance is slow.
_CLASSES = {"torch": "Tensor", "numpy": "ndarray", "cupy": "ndarray", "jax": "Array"}


def signature(tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """The tensors' layouts, and all else that the checks of a call look at.

    None if there is more to see than in plain arrays and numbers.
    """
    of_cupy = getattr(sys.modules.get("cupy"), "ndarray", None)
    layouts: list[Any] = []
    seen: list[Any] = [tuple(attributes)]
    for tensor in tensors:
        if type(tensor) is np.ndarray:
            layouts.append((tensor.shape, tensor.dtype))
        elif of_cupy and type(tensor) is of_cupy:
            data = tensor.data
            layouts.append(layout_of(tensor, data.ptr))
            seen.append(data.device_id)
        elif tensor is None:
            layouts.append(None)
        else:
            return None
    for value in attributes.values():
        plain = (type(value), value) if type(value) in _PLAIN else _sequence(value)
        if plain is None:
            return None
        seen.append(plain)
    return tuple(layouts), tuple(seen)


def _sequence(value: Any) -> Any:
    """A tuple or list with its items' types, as 1, 1.0 and True are equal; None if all are not of Python's own."""
    if type(value) not in (tuple, list):
        return None
    items = tuple([(type(item), item) if type(item) in _PLAIN else _sequence(item) for item in value])
    return None if None in items else (type(value), items)


def framework(op: str, names: Mapping[str, bool], tensors: Sequence[Any], non_differentiable: Sequence[str]) -> str:
    """A module of _CLASSES, or 'dlpack'; TypeError unless all tensors agree, ValueError on devices.

    `names` says of each tensor whether it can be None; those that are `non_differentiable` may be NumPy arrays beside
    tensors that an adapter carries.
    """
    given = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
    for name, optional in names.items():
        if not optional and name not in given:
            raise TypeError(f"{op}: {name} is required, got None")
    kinds = {name: kind(op, name, tensor) for name, tensor in given.items()}
    found = next(iter(kinds.values()))
    for name in non_differentiable:
        if kinds.get(name) == "numpy" and adapter(found):
            del kinds[name], given[name]
    if any(other != found for other in kinds.values()):
        raise TypeError(f"{op}: all tensors must be of one framework, got {_listed(kinds)}")
    places = {name: _place(op, name, tensor) for name, tensor in given.items()}
    if len(set(places.values())) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {_listed(places)}")
    return found


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in items.items())


def kind(op: str, name: str, tensor: Any) -> str:
    """The framework of one tensor."""
    for module, array in _CLASSES.items():
        if _is(tensor, module):
            # a mask or a unit would be dropped in silence; a memmap has nothing that its elements do not say
            if array == "ndarray" and type(tensor) not in (sys.modules[module].ndarray, np.memmap):
                raise TypeError(
                    f"{op}: {name} must be a plain array, got a {type(tensor).__name__}; "
                    f"{module}.asarray makes one of its elements"
                )
            return module
    if hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        return "dlpack"
    raise TypeError(
        f"{op}: {name} must be an array of NumPy, CuPy, torch or JAX, or have __dlpack__, got {type(tensor).__name__}"
    )


def _is(tensor: Any, module: str) -> bool:
    """isinstance without the import: an array of a framework exists only where that framework is loaded."""
    cls = getattr(sys.modules.get(module), _CLASSES[module], None)
    return cls is not None and isinstance(tensor, cls)


def _place(op: str, name: str, tensor: Any) -> Any:
    """The tensor's device; None for JAX, which places arrays itself (and whose tracers have none)."""
    if _is(tensor, "torch"):
        return tensor.device
    if isinstance(tensor, np.ndarray) or _is(tensor, "jax"):
        return None
    try:
        kind, index = map(int, tensor.__dlpack_device__())
    except Exception as error:  # somebody else's code: it may raise anything
        raise TypeError(f"{op}: {name} must say where it lies, but its __dlpack_device__ failed: {error!r}") from error
    if kind not in (_CPU, _CUDA):
        raise ValueError(f"{op}: {name} must be in CPU or CUDA memory, got DLPack device type {kind}")
    return "cpu" if kind == _CPU else f"cuda:{index}"


def adapter(framework: str) -> ModuleType | None:
    """The module with `run` and `run_backward` for a framework's tensors; None for raw arrays."""
    if framework == "torch":
        import cudcn.torch

        return cudcn.torch
    if framework == "jax":
        import cudcn.jax

        return cudcn.jax
    return None


def only(framework: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A public function for the tensors of one framework; what it takes first says which they are of."""
    first = next(iter(inspect.signature(function).parameters))
    name, module = function.__name__, f"cudcn.{framework}"

    @functools.wraps(function)
    def checked(*tensors: Any, **keywords: Any) -> Any:
        tensor = tensors[0] if tensors else keywords.get(first)
        if tensor is not None and not _is(tensor, framework):
            raise TypeError(f"{name}: {module} takes tensors of {framework}, got {kind(name, first, tensor)}")
        return function(*tensors, **keywords)

    checked.__module__ = module  # where pickle finds it
    return checked


def array(op: str, name: str, tensor: Any) -> Any:
    """A NumPy or CuPy array over the memory of a tensor that has passed `framework`."""
    if tensor is None or type(tensor) is np.ndarray or _is(tensor, "cupy"):
        return tensor
    if isinstance(tensor, np.ndarray):
        return np.asarray(tensor)  # of a memmap the array below it
    on_cpu = int(tensor.__dlpack_device__()[0]) == _CPU
    module = np if on_cpu else cupy()
    try:
        return module.from_dlpack(tensor)
    except Exception as error:  # somebody else's code: it may raise anything
        hint = " (NumPy takes no bfloat16 by DLPack)" if on_cpu else ""
        raise TypeError(f"{op}: {name} must be readable by DLPack, but that failed{hint}: {error!r}") from error


def constant(array: np.ndarray, like: Any) -> Any:
    """A NumPy array of a tensor without a gradient, for a call with `like`: a CuPy array beside CuPy's."""
    if not _is(like, "cupy"):
        return array
    with like.device:
        return cupy().asarray(array)


def numpy_at(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: np.dtype,
    owner: Any,
    read_only: bool = False,
) -> np.ndarray:
    """A NumPy array of what lies there, which keeps the memory's owner alive; strides None if it is dense."""
    # of bfloat16 the typestr says no more than its size
    interface = {
        "version": 3, "data": (address, read_only), "typestr": dtype.str, "shape": shape, "strides": strides,
    }  # fmt: skip
    return np.asarray(SimpleNamespace(__array_interface__=interface, owner=owner)).view(dtype)


def constants(op: str, names: Iterable[str], tensors: Iterable[Any]) -> list[Any]:
    """The tensors, NumPy's among them in the machine's byte order; TypeError if these hold no numbers."""
    found = []
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, np.ndarray):
            if tensor.dtype.kind not in "iuf" and str(tensor.dtype) not in DTYPES:
                raise TypeError(f"{op}: {name} must be of integers or floats, got {tensor.dtype}")
            tensor = tensor.astype(tensor.dtype.newbyteorder("="), copy=False)
        found.append(tensor)
    return found


def cupy() -> ModuleType:
    """CuPy, which carries every array in GPU memory to the kernels."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"arrays in GPU memory need CuPy: install cupy-cuda12x or cupy-cuda13x, after your CUDA ({error})"
        ) from error
    return cupy


def runs_kernels(array: Any) -> bool:
    """Whether the CUDA path takes this array: a CuPy array, or any with CUDCN_DEVICE=emulator."""
    if not isinstance(array, np.ndarray):
        return True
    device = os.environ.get("CUDCN_DEVICE", "")
    if device not in ("", "cpu", "emulator"):
        raise ValueError(
            f"CUDCN_DEVICE must be 'cpu' or 'emulator' (CuPy arrays run on the GPU anyway), got {device!r}"
        )
    return device == "emulator"


def device_of(array: Any) -> int | None:
    """The number of a CuPy array's device; None for a NumPy array."""
    return None if isinstance(array, np.ndarray) else array.data.device_id


def on_device(device: int | None) -> Any:
    """A context in which this is the current CUDA device."""
    if device is None or device == cupy().cuda.runtime.getDevice():
        return _NOTHING
    return cupy().cuda.Device(device)


def empty_like(array: Any, shape: tuple[int, ...]) -> Any:
    """An uninitialised array of the same dtype on the current device; poisoned with NaN on the emulated one."""
    if not isinstance(array, np.ndarray):
        return cupy().ndarray(shape, array.dtype)
    if runs_kernels(array):
        from . import emulator

        return emulator.empty(shape, array.dtype)
    return np.empty(shape, array.dtype)
