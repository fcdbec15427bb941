"""An operator as two XLA custom calls, `cudcn.X` and `cudcn.X_backward`, and the functions that call them.

XLA hands a custom call its buffers and its stream; the raw pair fills the output buffers in place, through NumPy
or CuPy arrays over them.

The operator's attributes travel as one text, cut into pieces of 7 bytes. jax-tvm-ffi 0.1.3 keeps a copy of every
number and array that a call passes as an attribute, for ever, and frees a string before the callee reads it; only
strings of at most 7 bytes, which it holds without an allocation, arrive and leave nothing behind. A target per set of
attributes would need none, but a process can register no more than 1024 of them, and what is compiled here and run
elsewhere (`jax.export`) would not find its own.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    import jax_tvm_ffi
except ImportError as error:
    module = (error.name or "jax").partition(".")[0]
    package = {"jax_tvm_ffi": "jax-tvm-ffi", "tvm_ffi": "apache-tvm-ffi"}.get(module, module)
    raise ImportError(
        f'cudcn.jax needs the package {package}, which pip install "cudcn[jax]" brings ({error})', name=error.name
    ) from error

from cudcn import dispatch, launch
from cudcn.dtypes import DTYPES
from cudcn.op import Op, specs, spread

_PIECE = 7  # bytes
_PIECES = [f"attributes{i:02}" for i in range(32)]  # in jax-tvm-ffi's order, which is by name
Attributes = tuple[tuple[str, Any], ...]  # canonical ones, as JAX wants static arguments: hashable


def bind(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator's public pair for JAX arrays alone, which `run` and `run_backward` compute from now on."""
    arguments = [*(f"attrs.{name}" for name in _PIECES), "ctx.stream", "args", "rets"]
    for platform in "cpu", "gpu":  # which asks for no GPU
        for name, function in (op.name, _fill_output), (f"{op.name}_backward", _fill_grads):
            jax_tvm_ffi.register_ffi_target(f"cudcn.{name}", partial(function, op), arguments, platform=platform)
    return _taking_numpy(op.function), _taking_numpy(op.backward_function)


def run(op: Op, tensors: Sequence[Any], attributes: dict[str, Any]) -> Any:
    """The operator on tensors and attributes that `Op` has checked."""
    tensors = _constants(op.name, op.tensors, tensors)
    return _run(op, tuple(attributes.items()), *tensors)


def run_backward(op: Op, tensors: Sequence[Any], attributes: dict[str, Any]) -> Sequence[Any]:
    """A gradient, or None, for each of the tensors after the first, which is `grad_output`."""
    tensors = _constants(f"{op.name}_backward", op.backward_tensors, tensors)
    return _run_backward(op, tuple(attributes.items()), *tensors)


def _taking_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A public function for JAX arrays, and for NumPy arrays as if they were JAX's."""
    checked = dispatch.only("jax", function)

    @functools.wraps(checked)
    def converted(*tensors: Any, **keywords: Any) -> Any:
        by_name = {name: _from_numpy(value) for name, value in keywords.items()}
        return checked(*map(_from_numpy, tensors), **by_name)

    return converted


def _from_numpy(value: Any) -> Any:
    """Arrays of integers remain NumPy's, for `_constants` to see."""
    plain = type(value) in (np.ndarray, np.memmap)
    return jnp.asarray(value) if plain and str(value.dtype) in DTYPES else value


def _constants(op: str, names: Iterable[str], tensors: Sequence[Any]) -> list[Any]:
    """As JAX takes them; ValueError for too large integers: it cuts NumPy's to 32 bits unless jax_enable_x64 is set."""
    tensors = dispatch.constants(op, names, tensors)
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "iu":
            dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
            cut = tensor != tensor.astype(dtype)
            if cut.any():
                raise ValueError(f"{op}: without jax_enable_x64 {name} must fit {dtype}, got {tensor[cut][0]}")
    return tensors


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward(op: Op, attributes: Attributes, *tensors: Any) -> Any:
    output = op.known_geometry(specs(tensors), **dict(attributes)).output
    return _call(op.name, attributes, tensors, [jax.ShapeDtypeStruct(*output)])[0]


def _remember(op: Op, attributes: Attributes, *tensors: Any) -> Any:
    return _run(op, attributes, *tensors), tensors


def _differentiate(op: Op, attributes: Attributes, tensors: Any, grad_output: Any) -> Any:
    return _run_backward(op, attributes, grad_output, *tensors)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(op: Op, attributes: Attributes, grad_output: Any, *tensors: Any) -> Any:
    """One gradient per tensor, None for one that is None or has no gradient.

    All of them: the `perturbed` flags that a custom_vjp with symbolic zeros could hand to the backward pass
    are at times those of another trace (JAX 0.10, under vmap and cond), and gradients would be missing.
    """
    geometry = op.known_geometry(specs(tensors), **dict(attributes))
    op.check_grad_output(geometry, grad_output)
    wanted = op.differentiable(tensors)
    outputs = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t, want in zip(tensors, wanted, strict=True) if want]
    return tuple(spread(wanted, _call(f"{op.name}_backward", attributes, (grad_output, *tensors), outputs)))


@_backward.defjvp
def _refuse(op: Op, *_: Any) -> Any:
    raise NotImplementedError(f"{op.name}: the second derivative is not implemented")


_forward.defvjp(_remember, _differentiate)
# else every call outside of a user's jit would be traced anew
_run = jax.jit(_forward, static_argnums=(0, 1))
_run_backward = jax.jit(_backward, static_argnums=(0, 1))


def _call(name: str, attributes: Attributes, tensors: Sequence[Any], outputs: Sequence[Any]) -> Sequence[Any]:
    given = tuple(int(tensor is not None) for tensor in tensors)
    arrays = [tensor for tensor in tensors if tensor is not None]
    call = jax.ffi.ffi_call(f"cudcn.{name}", outputs, vmap_method="sequential")
    return call(*arrays, **_pieces(tuple(value for _, value in attributes), given))


def _pieces(values: tuple[Any, ...], given: tuple[int, ...]) -> dict[str, str]:
    text = repr((values, given)).replace(" ", "")
    if len(text) > _PIECE * len(_PIECES):
        raise ValueError(f"attributes must take at most {_PIECE * len(_PIECES)} characters, got {text}")
    return {name: text[i * _PIECE : (i + 1) * _PIECE] for i, name in enumerate(_PIECES)}


@functools.lru_cache(maxsize=1024)
def _parsed(pieces: tuple[str, ...]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What `_pieces` was given."""
    return ast.literal_eval("".join(pieces))


def _fill_output(op: Op, *call: Any) -> None:
    attributes, given, stream, buffers = _parts(op, call)
    with _device(buffers[0].device, stream):
        *arrays, out = map(_view, buffers)
        tensors = spread(given, arrays)
        op.forward(op.known_geometry(specs(tensors), **attributes), out, *tensors)


def _fill_grads(op: Op, *call: Any) -> None:
    attributes, given, stream, buffers = _parts(op, call)
    with _device(buffers[0].device, stream):
        arrays = [_view(buffer) for buffer in buffers]
        grad_output, *tensors = spread(given, arrays)
        grads = spread(op.differentiable(tensors), arrays[sum(given) :])
        op.backward(op.known_geometry(specs(tensors), **attributes), grads, grad_output, *tensors)


def _parts(op: Op, call: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[int, ...], int, Sequence[Any]]:
    """A call's attributes, which of its tensors are given, its stream and its buffers."""
    values, given = _parsed(call[: len(_PIECES)])
    stream, *buffers = call[len(_PIECES) :]
    return dict(zip(op.attributes, values, strict=True)), given, stream, buffers


@contextlib.contextmanager
def _device(device: Any, stream: int) -> Any:
    """CuPy on XLA's device and stream."""
    if device.type == "cpu":
        yield
        return
    cupy = dispatch.cupy()

    with cupy.cuda.Device(device.index), launch.on_stream(stream):
        yield


def _view(buffer: Any) -> Any:
    """A NumPy or CuPy array over an XLA buffer, which is dense; by address, as NumPy's DLPack has no bfloat16."""
    shape, dtype = tuple(buffer.shape), np.dtype(str(buffer.dtype))
    if buffer.device.type == "cpu":
        return dispatch.numpy_at(buffer.data_ptr(), shape, None, dtype, owner=buffer)
    cupy = dispatch.cupy()

    size = math.prod(shape) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(buffer.data_ptr(), size, None, buffer.device.index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
