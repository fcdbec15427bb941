"""An operator as data: all that dispatch, the adapters and the tests know about one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from . import dispatch, launch
from .geometry import Spec

_REMEMBERED = 1024  # geometries of one operator


def specs(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """A Spec for each tensor; None for one that is None."""
    return tuple(None if t is None else Spec(tuple(t.shape), _dtype_name(t.dtype)) for t in tensors)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def spread(flags: Iterable[Any], arrays: Iterable[Any]) -> list[Any]:
    """The arrays at the places that are flagged, None at the others."""
    rest = iter(arrays)
    return [next(rest) if flag else None for flag in flags]


@dataclass(eq=False)
class Op:
    """A pair of raw functions and the rules around it.

    `function` and `backward_function` are the public pair. The first one's positional parameters name the tensors,
    its keyword-only ones the attributes, and their annotations the types (`Pair` and `Padding` are tuples of ints
    once canonical). A tensor can be None if that is its default, or its annotation `Any | None`.
    `canonical(**attributes)` brings the attributes to flat tuples and plain numbers, or raises.
    `geometry(specs, **canonical)` checks the tensors and returns a class of geometry.py, whose `output` is a Spec.
    `cpu` and `cuda` are the modules that compute: on the CPU `forward(geometry, out, *tensors)` fills `out`, and
    `backward(geometry, grads, grad_output, *tensors)` fills those `grads` that are not None; for CUDA
    `forward(plan, geometry, [out], *tensors)` and `backward(plan, geometry, grads, grad_output, *tensors)` plan that.
    `may_be_float32` names the tensors that may be so beside half-precision data, `non_differentiable` those without a
    gradient.
    """

    function: Callable[..., Any]
    backward_function: Callable[..., Any]
    gradients: type  # a NamedTuple with one field per tensor
    canonical: Callable[..., dict[str, Any]]
    geometry: Callable[..., Any]
    cpu: ModuleType
    cuda: ModuleType
    may_be_float32: tuple[str, ...] = ()
    non_differentiable: tuple[str, ...] = ()

    # What follows from the signature of `function`:
    name: str = field(init=False)
    tensors: dict[str, bool] = field(init=False)  # each one's name, and whether it can be left out
    backward_tensors: dict[str, bool] = field(init=False)
    attributes: dict[str, str] = field(init=False)  # each one's name and the name of its type
    # `geometry`, remembered: a model calls an operator with the same few shapes again and again
    known_geometry: Callable[..., Any] = field(init=False)
    _checked: dict[Any, Any] = field(init=False, default_factory=dict)  # that of calls that have passed, by signature

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        self.name = self.function.__name__
        self.tensors = {
            p.name: p.default is None or p.annotation == "Any | None"
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        }
        self.backward_tensors = {"grad_output": False, **self.tensors}
        self.attributes = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.known_geometry = functools.lru_cache(maxsize=_REMEMBERED)(self.geometry)

    def differentiable(self, tensors: Sequence[Any]) -> list[bool]:
        """Which tensors have a gradient."""
        return [
            t is not None and name not in self.non_differentiable for name, t in zip(self.tensors, tensors, strict=True)
        ]

    def __call__(self, *tensors: Any, **attributes: Any) -> Any:
        """Run the operator on tensors of any framework."""
        signature = dispatch.signature(tensors, attributes)
        geometry = signature and self._checked.get(signature)
        if geometry is None:
            framework = dispatch.framework(self.name, self.tensors, tensors, self.non_differentiable)
            attributes = self.canonical(**attributes)
            if adapter := dispatch.adapter(framework):
                return adapter.run(self, tensors, attributes)
            given = zip(self.tensors, tensors, strict=True)
            tensors = tuple([dispatch.array(self.name, name, tensor) for name, tensor in given])
            geometry = self.known_geometry(specs(tensors), **attributes)
            self._remember(signature, geometry)
        with dispatch.on_device(dispatch.device_of(tensors[0])):
            out = dispatch.empty_like(tensors[0], geometry.output.shape)
            self.forward(geometry, out, *tensors, layouts=signature and signature[0])
        return out

    def backward_of(self, *tensors: Any, **attributes: Any) -> Any:
        """The gradients of all tensors but the first, `grad_output`, on tensors of any framework."""
        signature = dispatch.signature(tensors, attributes)
        geometry = signature and self._checked.get(signature)
        if geometry is None:
            name = f"{self.name}_backward"
            framework = dispatch.framework(name, self.backward_tensors, tensors, self.non_differentiable)
            attributes = self.canonical(**attributes)
            if adapter := dispatch.adapter(framework):
                return self.gradients(*adapter.run_backward(self, tensors, attributes))
            given = zip(self.backward_tensors, tensors, strict=True)
            tensors = tuple([dispatch.array(name, tensor_name, tensor) for tensor_name, tensor in given])
            geometry = self.known_geometry(specs(tensors[1:]), **attributes)
            self.check_grad_output(geometry, tensors[0])
            self._remember(signature, geometry)
        grad_output, *arrays = tensors
        wanted = zip(arrays, self.differentiable(arrays), strict=True)
        with dispatch.on_device(dispatch.device_of(grad_output)):
            grads = [dispatch.empty_like(a, a.shape) if want else None for a, want in wanted]
            self.backward(geometry, grads, grad_output, *arrays, layouts=signature and signature[0])
        return self.gradients(*grads)

    def _remember(self, signature: Any, geometry: Any) -> None:
        if len(self._checked) >= _REMEMBERED:
            self._checked.clear()
        if signature is not None:
            self._checked[signature] = geometry

    def check_grad_output(self, geometry: Any, grad_output: Any) -> None:
        (got,) = specs([grad_output])
        if got != geometry.output:
            raise ValueError(
                f"{self.name}_backward: grad_output must have the output's shape and dtype, "
                f"{geometry.output.shape} {geometry.output.dtype}, got {got.shape} {got.dtype}"
            )

    def forward(self, geometry: Any, out: Any, *tensors: Any, layouts: Any = None) -> None:
        """Fill `out` from NumPy arrays, or CuPy's on the current device; they have passed `geometry`.

        `layouts` are theirs as `dispatch.signature` has them, if that is known.
        """
        if not out.size:
            return
        if dispatch.runs_kernels(out):
            launch.run(self.cuda.forward, geometry, [out], tensors, layouts)
        else:
            self.cpu.forward(geometry, out, *tensors)

    def backward(
        self, geometry: Any, grads: Sequence[Any], grad_output: Any, *tensors: Any, layouts: Any = None
    ) -> None:
        """Fill the `grads` that are not None."""
        if all(grad is None for grad in grads):
            return
        if not grad_output.size:
            for grad in grads:
                if grad is not None:
                    grad.fill(0)
        elif dispatch.runs_kernels(grad_output):
            launch.run(self.cuda.backward, geometry, grads, (grad_output, *tensors), layouts)
        else:
            self.cpu.backward(geometry, grads, grad_output, *tensors)
