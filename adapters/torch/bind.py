"""An operator as two torch operators, `torch.ops.cudcn.X` and `X_backward`, and the functions that call them.

Torch's dispatcher does what it is good at: autograd, torch.compile, fake tensors. Below it, NumPy or CuPy arrays
over the tensors' own memory go to the raw pair.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from cudcn import dispatch, launch
from cudcn.cpu import parallel
from cudcn.op import Op, specs, spread
from cudcn.plan import ALIGNMENT

from .transforms import call, call_backward, derive

_LIBRARY = torch.library.Library("cudcn", "FRAGMENT")  # what it defines lives as long as this object
_SCHEMA_TYPES = {
    "Pair": "int[]", "Pair | None": "int[]", "Padding": "int[]", "Sequence[int] | None": "int[]?",
    "int": "int", "float": "float", "bool": "bool", "str": "str",
}  # fmt: skip


def bind(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator's public pair for torch tensors alone, which `run` and `run_backward` compute from now on."""
    _define(op)
    derive(op, _LIBRARY)
    for function in op.function, op.backward_function:
        function.__prepare_scriptable__ = partial(_refuse_script, function.__name__)  # type: ignore[attr-defined]
    return dispatch.only("torch", op.function), dispatch.only("torch", op.backward_function)


def _refuse_script(name: str) -> Any:
    """For TorchScript, which would say of Python's grammar what it lacks."""
    raise NotImplementedError(f"{name}: torch.jit.script is not supported; use torch.export, or torch.jit.trace")


def run(op: Op, tensors: Sequence[Any], attributes: dict[str, Any]) -> Any:
    """The operator on tensors and attributes that `Op` has checked. torch.compile traces this."""
    tensors = _as_tensors(op.name, op.tensors, tensors)
    return call(op, *_autocast(op, tensors), *attributes.values())


def run_backward(op: Op, tensors: Sequence[Any], attributes: dict[str, Any]) -> list[Any]:
    """A gradient, or None, for each of the tensors after the first, which is `grad_output`."""
    tensors = _as_tensors(f"{op.name}_backward", op.backward_tensors, tensors)
    needs = op.differentiable(tensors[1:])
    return spread(needs, call_backward(op, *tensors, *attributes.values(), needs))


def _as_tensors(name: str, names: Iterable[str], tensors: Sequence[Any]) -> list[Any]:
    if not torch.compiler.is_compiling():  # which takes NumPy's arrays for tensors
        tensors = dispatch.constants(name, names, tensors)
    return [as_tensor(t, like=tensors[0]) for t in tensors]


def as_tensor(value: Any, like: torch.Tensor) -> Any:
    """A NumPy array, which a tensor without a gradient may be, as a tensor on the device of another."""
    if not isinstance(value, np.ndarray):
        return value
    # a copy: torch refuses arrays that run backwards, and warns of those that are read-only
    return _tensor(value.copy()).to(like.device)


def _tensor(value: np.ndarray) -> torch.Tensor:
    if not torch.compiler.is_compiling() and value.dtype.kind == "V":  # bfloat16, which torch does not take from NumPy
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _autocast(op: Op, tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors as torch's convolutions take them under autocast; those that `may_be_float32` stay so."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda"):  # "meta" has no autocast to ask about
        return tensors
    if not torch.is_autocast_enabled(device) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def stays(name: str, t: Any) -> bool:
        return t is None or not t.is_floating_point() or (name in op.may_be_float32 and t.dtype == torch.float32)

    return [t if stays(name, t) else t.to(dtype) for name, t in zip(op.tensors, tensors, strict=True)]


def _define(op: Op) -> None:
    tensors = ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, optional in op.tensors.items())
    attributes = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in op.attributes.items())
    _register(op, op.name, f"({tensors}, {attributes}) -> Tensor", op.tensors, _forward, _fake_forward)
    schema = f"(Tensor grad_output, {tensors}, {attributes}, bool[] needs) -> Tensor[]"
    _register(op, f"{op.name}_backward", schema, op.backward_tensors, _backward, _fake_backward)


def _register(
    op: Op, name: str, schema: str, names: Iterable[str], compute: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in "CPU", "CUDA":
        _LIBRARY.impl(name, partial(compute, op), key)
    # the key of all kinds of tensors that have no other
    _LIBRARY.impl(name, partial(_refuse, name, names), "CompositeExplicitAutograd")
    torch.library.register_fake(f"cudcn::{name}", partial(fake, op), lib=_LIBRARY)


def _forward(op: Op, *arguments: Any) -> torch.Tensor:
    geometry, output = _empty_output(op, op.known_geometry, arguments)
    tensors = arguments[: len(op.tensors)]
    if output.device.type == "cpu":
        with _threads_and_tf32():
            op.forward(geometry, *map(_numpy_view, (output, *tensors)))
    elif output.numel():
        _launch(op.cuda.forward, geometry, [output], tensors)
    return output


def _backward(op: Op, *arguments: Any) -> list[torch.Tensor]:
    geometry, grads = _empty_grads(op, op.known_geometry, arguments)
    tensors = arguments[: len(op.backward_tensors)]
    found = [grad for grad in grads if grad is not None]
    if tensors[0].device.type == "cpu":
        with _threads_and_tf32():
            op.backward(geometry, [*map(_numpy_view, grads)], *map(_numpy_view, tensors))
    elif not tensors[0].numel():
        for grad in found:
            grad.zero_()
    elif found:
        _launch(op.cuda.backward, geometry, grads, tensors)
    return found


# These take `geometry`, not `known_geometry`: symbolic shapes must not be remembered, as what holds of them is a guard
# of one trace.
def _fake_forward(op: Op, *arguments: Any) -> torch.Tensor:
    return _empty_output(op, op.geometry, arguments)[1]


def _fake_backward(op: Op, *arguments: Any) -> list[torch.Tensor]:
    return [grad for grad in _empty_grads(op, op.geometry, arguments)[1] if grad is not None]


def _empty_output(op: Op, rules: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, torch.Tensor]:
    count = len(op.tensors)
    _check_devices(op.name, op.tensors, arguments)
    geometry = _geometry_of(op, rules, arguments[:count], arguments[count:])
    return geometry, _empty(geometry.output.shape, like=arguments[0])


def _empty_grads(op: Op, rules: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, list[torch.Tensor | None]]:
    """One for each tensor whose gradient is wanted, None for the others."""
    count = len(op.backward_tensors)
    _check_devices(f"{op.name}_backward", op.backward_tensors, arguments)
    grad_output, *tensors = arguments[:count]
    *attributes, needs = arguments[count:]
    geometry = _geometry_of(op, rules, tensors, attributes)
    op.check_grad_output(geometry, grad_output)
    wanted = [t if need else None for t, need in zip(tensors, needs, strict=True)]
    return geometry, [None if t is None else _empty(t.shape, like=t) for t in wanted]


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Channels last in memory where those of `like` are, so that layers that follow find what they are fastest with."""
    last = len(shape) == like.ndim == 4 and not like.is_contiguous()
    last = last and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _geometry_of(op: Op, rules: Callable[..., Any], tensors: Sequence[Any], attributes: Sequence[Any]) -> Any:
    values = (tuple(value) if isinstance(value, list) else value for value in attributes)
    return rules(specs(tensors), **dict(zip(op.attributes, values, strict=True)))


def _check_devices(name: str, names: Iterable[str], arguments: Sequence[Any]) -> None:
    """For torch.ops: the public functions have checked it. The meta kernel's output would hold anything."""
    places = {n: t.device for n, t in zip(names, arguments, strict=False) if t is not None}
    if len(set(places.values())) > 1:
        given = ", ".join(f"{tensor_name}: {device}" for tensor_name, device in places.items())
        raise ValueError(f"{name}: all tensors must be on one device, got {given}")


def _refuse(name: str, names: Iterable[str], *arguments: Any) -> Any:
    """The kernel for all other kinds of tensors: sparse, quantized, nested, or on a device of another kind."""
    given = ", ".join(
        f"{tensor_name}: {t.dtype}, {t.layout} on {t.device}"
        for tensor_name, t in zip(names, arguments, strict=False)
        if t is not None
    )
    raise TypeError(f"{name}: tensors must be dense ones on a CPU or CUDA device, got {given}")


@contextlib.contextmanager
def _threads_and_tf32() -> Any:
    """Torch's are ours too."""
    with parallel.limit(torch.get_num_threads()), launch.allow_tf32(_tf32()):
        yield


def _launch(make: Callable[..., None], geometry: Any, outs: Sequence[Any], tensors: Sequence[Any]) -> None:
    """On torch's stream, and in its memory: what CuPy's own pool kept would be lost to torch."""
    device = tensors[0].device
    arrays = [*outs, *tensors]
    # by address: a CuPy array for each would take longer than the launch; the dispatcher has resolved lazy negation
    addresses = [0 if t is None else t.data_ptr() for t in arrays]
    layouts = [_layout(t, address) for t, address in zip(arrays, addresses, strict=True)]
    tf32 = tensors[0].dtype == torch.float32 and _tf32()
    call = make, geometry, tuple(layouts[: len(outs)]), tuple(layouts[len(outs) :]), tf32
    stream = torch.cuda.current_stream(device).cuda_stream
    with dispatch.on_device(device.index):
        launch.run_at(call, addresses, device.index, stream, partial(_memory, device))


def _layout(tensor: torch.Tensor | None, address: int) -> tuple[Any, ...] | None:
    """The fields of plan.Layout."""
    if tensor is None:
        return None
    return tuple(tensor.shape), _strides(tensor), _numpy_dtype(tensor.dtype), address % ALIGNMENT


def _memory(device: torch.device, size: int) -> launch.Memory:
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    return launch.Memory(memory.data_ptr(), memory)


def _tf32() -> bool:
    """Torch's choice for its own matrix products, which has a new name since 2.9; asked by the old one it may raise."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _numpy_view(tensor: torch.Tensor | None) -> Any:
    """By address: after `tensor.numpy()` torch refuses to resize the memory, which FSDP does to a layer's weights."""
    if tensor is None:
        return None
    return dispatch.numpy_at(
        tensor.data_ptr(), tuple(tensor.shape), _strides(tensor), _numpy_dtype(tensor.dtype), owner=tensor
    )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """In bytes."""
    size = tensor.element_size()
    return tuple([size * stride for stride in tensor.stride()])


@functools.cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """NumPy's dtype of the same name; bfloat16 is another package's."""
    if dtype == torch.bfloat16:
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError(f"bfloat16 tensors need ml_dtypes: pip install ml_dtypes ({error})") from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(str(dtype).removeprefix("torch."))
