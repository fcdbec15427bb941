"""An operator as two torch operators, `torch.ops.cudcn.X` and `X_backward`, and the functions that call them.

Torch's dispatcher does what it is good at: autograd, torch.compile, fake tensors. Below it, NumPy or CuPy arrays
over the tensors' own memory go to the raw pair.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .. import dispatch
from ..cpu import parallel
from ..op import Op, by_position, spec, spread
from .transforms import differentiable

_LIBRARY = torch.library.Library("cudcn", "FRAGMENT")  # what it defines lives as long as this object
_SCHEMA_TYPES = {
    "Pair": "int[]", "Pair | None": "int[]", "Padding": "int[]",
    "int": "int", "float": "float", "bool": "bool", "str": "str",
}  # fmt: skip


def bind(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator's public pair on torch tensors."""
    _define(op)
    run, run_backward = differentiable(op, _LIBRARY)
    # what the functions below need is looked up here: torch.compile traces them
    names, backward_names, attribute_names = op.tensors, op.backward_tensors, op.optional_attributes
    name, fine, constants, canonical, gradients = op.name, op.fine, op.constants, op.canonical, op.gradients

    def by_order(name: str, names: dict[str, bool], tensors: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        tensors = by_position(name, names, attribute_names, ("torch",), tensors, keywords, constants)
        return tuple(as_tensor(t, tensors[0]) for t in tensors) if constants else tensors

    @functools.wraps(op.function)
    def forward(*tensors: Any, **attributes: Any) -> Any:
        tensors = by_order(name, names, tensors, attributes)
        return run(*_autocast(names, fine, tensors), *canonical(**attributes).values())

    @functools.wraps(op.backward_function)
    def backward(*tensors: Any, **attributes: Any) -> Any:
        tensors = by_order(f"{name}_backward", backward_names, tensors, attributes)
        needs = op.differentiable(tensors[1:])
        return gradients(*spread(needs, run_backward(*tensors, *canonical(**attributes).values(), needs)))

    return forward, backward


def as_tensor(value: Any, like: torch.Tensor) -> Any:
    """A NumPy array, which an operator's constants may be, as a tensor on the device of another."""
    if not isinstance(value, np.ndarray):
        return value
    # a copy: torch refuses arrays that run backwards, and warns of those that are read-only
    return torch.from_numpy(value.copy()).to(like.device)


def _autocast(names: dict[str, bool], fine: Sequence[str], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors as torch's convolutions take them under autocast; `fine` ones keep their float32."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda"):  # "meta" has no autocast to ask about
        return tensors
    if not torch.is_autocast_enabled(device) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or not t.is_floating_point() or (n in fine and t.dtype == torch.float32) else t.to(dtype)
        for n, t in zip(names, tensors, strict=True)
    )


def _define(op: Op) -> None:
    tensors = ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, optional in op.tensors.items())
    attributes = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in op.attributes.items())
    count = len(op.tensors)
    name, backward_name = op.name, f"{op.name}_backward"
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{name}({tensors}, {attributes}) -> Tensor", tags=tags)
    _LIBRARY.define(
        f"{backward_name}(Tensor grad_output, {tensors}, {attributes}, bool[] needs) -> Tensor[]",
        tags=tags,
    )

    def planned(plan: Callable[..., Any], tensors: Sequence[Any], attributes: Sequence[Any]) -> Any:
        values = (tuple(value) if isinstance(value, list) else value for value in attributes)
        return plan(tuple(map(spec, tensors)), **dict(zip(op.attributes, values, strict=True)))

    def empty(plan: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
        _check_devices(name, op.tensors, arguments)
        plan = planned(plan, arguments[:count], arguments[count:])
        return plan, torch.empty(plan.output.shape, dtype=arguments[0].dtype, device=arguments[0].device)

    def empty_grads(plan: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, list[Any]]:
        _check_devices(backward_name, op.backward_tensors, arguments)
        grad_output, *tensors = arguments[: count + 1]
        plan = planned(plan, tensors, arguments[count + 1 : -1])
        op.check_grad_output(plan, grad_output)
        wanted = [t if need else None for t, need in zip(tensors, arguments[-1], strict=True)]
        return plan, [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]

    def forward(*arguments: Any) -> Any:
        plan, out = empty(op.planned, arguments)
        with _arrays(out, *arguments[:count]) as arrays:
            op.forward(plan, *arrays)
        return out

    def backward(*arguments: Any) -> Any:
        plan, grads = empty_grads(op.planned, arguments)
        with _arrays(*arguments[: count + 1], *grads) as arrays:
            op.backward(plan, arrays[count + 1 :], *arrays[: count + 1])
        return [grad for grad in grads if grad is not None]

    # symbolic shapes must not be remembered: their truth is a guard of one trace
    def fake_forward(*arguments: Any) -> Any:
        return empty(op.plan, arguments)[1]

    def fake_backward(*arguments: Any) -> Any:
        return [grad for grad in empty_grads(op.plan, arguments)[1] if grad is not None]

    _register(name, op.tensors, forward, fake_forward)
    _register(backward_name, op.backward_tensors, backward, fake_backward)


def _register(name: str, names: Iterable[str], compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    for key in "CPU", "CUDA":
        _LIBRARY.impl(name, compute, key)
    _LIBRARY.impl(name, _unsupported(name, names), "CompositeExplicitAutograd")  # the key of all that have no other
    torch.library.register_fake(f"cudcn::{name}", fake, lib=_LIBRARY)


def _check_devices(name: str, names: Iterable[str], arguments: Sequence[Any]) -> None:
    """For torch.ops: the public functions have checked it. The meta kernel's output would hold anything."""
    places = {n: t.device for n, t in zip(names, arguments, strict=False) if t is not None}
    if len(set(places.values())) > 1:
        given = ", ".join(f"{tensor_name}: {device}" for tensor_name, device in places.items())
        raise ValueError(f"{name}: all tensors must be on one device, got {given}")


def _unsupported(name: str, names: Iterable[str]) -> Callable[..., Any]:
    """The kernel for all other kinds of tensors: sparse, quantized, nested, or on a device of another kind."""

    def refuse(*arguments: Any) -> Any:
        given = ", ".join(
            f"{tensor_name}: {t.dtype}, {t.layout} on {t.device}"
            for tensor_name, t in zip(names, arguments, strict=False)
            if t is not None
        )
        raise TypeError(f"{name}: tensors must be dense ones on a CPU or CUDA device, got {given}")

    return refuse


@contextlib.contextmanager
def _arrays(first: torch.Tensor, *others: torch.Tensor | None) -> Any:
    """NumPy or CuPy views of the tensors; meanwhile torch's number of threads, stream and memory are ours too."""
    device = first.device
    if device.type == "cpu":
        with parallel.limit(torch.get_num_threads()):
            yield [None if t is None else _numpy_view(t) for t in (first, *others)]
        return
    cupy = dispatch.cupy()

    stream = torch.cuda.current_stream(device).cuda_stream
    external = cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, stream)))
    # one pool for both: memory that CuPy's own pool kept would be lost to torch
    memory = functools.partial(_torch_memory, device)
    with cupy.cuda.Device(device.index), external, cupy.cuda.using_allocator(memory):
        yield [None if t is None else _cupy_view(t) for t in (first, *others)]


def _numpy_view(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return tensor.detach().view(torch.int16).numpy().view(_numpy_dtype(torch.bfloat16))
    return tensor.detach().numpy()


def _cupy_view(tensor: torch.Tensor) -> Any:
    """By address: from_dlpack would cost more and ask for streams; the dispatcher has resolved lazy negation."""
    cupy = dispatch.cupy()

    size = tensor.element_size()
    strides = tuple(size * stride for stride in tensor.stride())
    return cupy.ndarray(tuple(tensor.shape), _numpy_dtype(tensor.dtype), _pointer(tensor), strides)


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


def _torch_memory(device: torch.device, size: int) -> Any:
    """CuPy's allocator: torch's caching one, on torch's current stream."""
    return _pointer(torch.empty(size, dtype=torch.uint8, device=device))


def _pointer(tensor: torch.Tensor) -> Any:
    """Names the device, since an empty tensor's null address cannot tell it, and keeps the tensor alive."""
    cupy = dispatch.cupy()

    size = tensor.untyped_storage().nbytes() if tensor.numel() else 0
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size, tensor, tensor.device.index)
    return cupy.cuda.MemoryPointer(memory, 0)
