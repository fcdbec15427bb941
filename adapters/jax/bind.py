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
import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

try:
    import jax
    import jax_tvm_ffi
except ImportError as error:
    module = (error.name or "jax").partition(".")[0]
    package = {"jax_tvm_ffi": "jax-tvm-ffi", "tvm_ffi": "apache-tvm-ffi"}.get(module, module)
    raise ImportError(
        f'cudcn.jax needs the package {package}, which pip install "cudcn[jax]" brings ({error})', name=error.name
    ) from error

from .. import dispatch
from ..op import Op, by_position, spec, spread

_FRAMEWORKS = ("jax", "numpy")  # jit takes NumPy's arrays too, and jax.test_util.check_grads passes them
_PIECE = 7  # bytes
_PIECES = [f"attributes{i:02}" for i in range(32)]  # in jax-tvm-ffi's order, which is by name
Attributes = tuple[tuple[str, Any], ...]  # canonical ones, as JAX wants static arguments: hashable


def bind(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator's public pair on JAX arrays."""
    _register(op)

    # jit: else every call outside of a user's jit would be traced anew
    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(attributes: Attributes, *tensors: Any) -> Any:
        output = op.planned(tuple(map(spec, tensors)), **dict(attributes)).output
        return _call(op.name, attributes, tensors, [jax.ShapeDtypeStruct(*output)])[0]

    def remember(attributes: Attributes, *tensors: Any) -> Any:
        return run(attributes, *tensors), tensors

    def differentiate(attributes: Attributes, tensors: Any, grad_output: Any) -> Any:
        return run_backward(attributes, grad_output, *tensors)

    run.__wrapped__.defvjp(remember, differentiate)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run_backward(attributes: Attributes, grad_output: Any, *tensors: Any) -> Any:
        """One gradient per tensor, None for one that is None or has no gradient.

        All of them: the `perturbed` flags that a custom_vjp with symbolic zeros could hand to the backward pass
        are at times those of another trace (JAX 0.10, under vmap and cond), and gradients would be missing.
        """
        plan = op.planned(tuple(map(spec, tensors)), **dict(attributes))
        op.check_grad_output(plan, grad_output)
        wanted = op.differentiable(tensors)
        outputs = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t, want in zip(tensors, wanted, strict=True) if want]
        return tuple(spread(wanted, _call(f"{op.name}_backward", attributes, (grad_output, *tensors), outputs)))

    @run_backward.__wrapped__.defjvp
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"{op.name}: the second derivative is not implemented")

    @functools.wraps(op.function)
    def forward(*tensors: Any, **attributes: Any) -> Any:
        tensors = by_order(op.name, op.tensors, tensors, attributes)
        return run(tuple(op.canonical(**attributes).items()), *tensors)

    @functools.wraps(op.backward_function)
    def backward(*tensors: Any, **attributes: Any) -> Any:
        grad_output, *tensors = by_order(f"{op.name}_backward", op.backward_tensors, tensors, attributes)
        return op.gradients(*run_backward(tuple(op.canonical(**attributes).items()), grad_output, *tensors))

    def by_order(name: str, names: dict[str, bool], tensors: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        tensors = by_position(name, names, op.optional_attributes, _FRAMEWORKS, tensors, keywords, op.constants)
        return [_fitting(name, n, t) for n, t in zip(names, tensors, strict=True)]

    return forward, backward


def _fitting(op: str, name: str, tensor: Any) -> Any:
    """The tensor; ValueError if it is a NumPy array of integers that JAX, without x64, would cut to 32 bits."""
    if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "iu":
        dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
        cut = tensor != tensor.astype(dtype)
        if cut.any():
            raise ValueError(f"{op}: without jax_enable_x64 {name} must fit {dtype}, got {tensor[cut][0]}")
    return tensor


def _call(name: str, attributes: Attributes, tensors: Sequence[Any], outputs: Sequence[Any]) -> Sequence[Any]:
    given = tuple(int(tensor is not None) for tensor in tensors)
    arrays = [tensor for tensor in tensors if tensor is not None]
    call = jax.ffi.ffi_call(f"cudcn.{name}", outputs, vmap_method="sequential")
    return call(*arrays, **_pieces(tuple(value for _, value in attributes), given))


def _pieces(values: tuple[Any, ...], given: tuple[int, ...]) -> dict[str, str]:
    text = repr((values, given)).replace(" ", "")
    return {name: text[i * _PIECE : (i + 1) * _PIECE] for i, name in enumerate(_PIECES)}


@functools.lru_cache(maxsize=1024)
def _parsed(pieces: tuple[str, ...]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What `_pieces` was given."""
    return ast.literal_eval("".join(pieces))


def _register(op: Op) -> None:
    def parts(call: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[int, ...], int, tuple[Any, ...]]:
        """A call's attributes, which of its tensors are given, its stream and its buffers."""
        values, given = _parsed(call[: len(_PIECES)])
        stream, *buffers = call[len(_PIECES) :]
        return dict(zip(op.attributes, values, strict=True)), given, stream, buffers

    def forward(*call: Any) -> None:
        attributes, given, stream, buffers = parts(call)
        with _device(buffers[0].device, stream):
            *arrays, out = map(_view, buffers)
            tensors = spread(given, arrays)
            op.forward(op.planned(tuple(map(spec, tensors)), **attributes), out, *tensors)

    def backward(*call: Any) -> None:
        attributes, given, stream, buffers = parts(call)
        with _device(buffers[0].device, stream):
            arrays = [_view(buffer) for buffer in buffers]
            grad_output, *tensors = spread(given, arrays)
            grads = spread(op.differentiable(tensors), arrays[sum(given) :])
            op.backward(op.planned(tuple(map(spec, tensors)), **attributes), grads, grad_output, *tensors)

    arguments = [*(f"attrs.{name}" for name in _PIECES), "ctx.stream", "args", "rets"]
    for platform in "cpu", "gpu":  # which asks for no GPU
        for name, function in (op.name, forward), (f"{op.name}_backward", backward):
            jax_tvm_ffi.register_ffi_target(f"cudcn.{name}", function, arguments, platform=platform)


@contextlib.contextmanager
def _device(device: Any, stream: int) -> Any:
    """CuPy on XLA's device and stream."""
    if device.type == "cpu":
        yield
        return
    cupy = dispatch.cupy()

    external = cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, stream)))
    with cupy.cuda.Device(device.index), external:
        yield


def _view(buffer: Any) -> Any:
    """A NumPy or CuPy array over an XLA buffer, which is dense; by address, as NumPy's DLPack has no bfloat16."""
    shape, dtype = tuple(buffer.shape), np.dtype(str(buffer.dtype))
    size = math.prod(shape) * dtype.itemsize
    if buffer.device.type == "cpu":
        return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(buffer.data_ptr()))
    cupy = dispatch.cupy()

    memory = cupy.cuda.UnownedMemory(buffer.data_ptr(), size, None, buffer.device.index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
