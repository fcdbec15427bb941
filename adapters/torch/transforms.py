"""What autograd, torch.compile and torch.func's transforms do with an operator.

torch.compile and torch.export know it as a torch operator with a derivative registered. The registration's Function
is hidden from torch.func's transforms and drops forward-mode derivatives in silence, so that eager calls go through a
Function of our own, above the dispatcher: the transforms see it, and it refuses forward mode. All of this is torch's
public interface, which is the same in every version. What stays torch's error is torch.compile of one of torch.func's
transforms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cudcn.op import Op, spread

from . import formulas, onnx, vmap

Arguments = Sequence[Any]


def call(op: Op, *arguments: Any) -> Any:
    """The torch operator, with a derivative and a rule for vmap; in torch.onnx.export what ONNX knows."""
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return onnx.compute(op, *arguments)
    return _overload(op.name)(*arguments) if _is_recorded() else _Forward.apply(*arguments, op)


def call_backward(op: Op, *arguments: Any) -> Any:
    name = f"{op.name}_backward"
    return _overload(name)(*arguments) if _is_recorded() else _Backward.apply(*arguments, op)


def _is_recorded() -> bool:
    """Whether a graph is made of the call, which names torch's operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def derive(op: Op, library: torch.library.Library) -> None:
    """Tell torch.compile the operator's derivatives."""
    torch.library.register_autograd(
        f"cudcn::{op.name}", partial(_differentiate, op), setup_context=partial(_save, op), lib=library
    )
    again = partial(_differentiate_again, op)
    torch.library.register_autograd(
        f"cudcn::{op.name}_backward", again, setup_context=partial(_save_all, op), lib=library
    )


def _overload(name: str) -> Any:
    return getattr(torch.ops.cudcn, name).default


def _save(op: Op, ctx: Any, inputs: Arguments, output: Any) -> None:
    count = len(op.tensors)
    ctx.save_for_backward(*inputs[:count])
    ctx.attributes = inputs[count:]


def _differentiate(op: Op, ctx: Any, grad_output: Any) -> Any:
    tensors = ctx.saved_tensors  # once: checkpointing refuses a second look
    given = zip(ctx.needs_input_grad, op.differentiable(tensors), strict=False)
    needs = [asked and possible for asked, possible in given]
    grads = call_backward(op, grad_output, *tensors, *ctx.attributes, needs)
    return *spread(needs, grads), *(None for _ in ctx.attributes)


def _save_all(op: Op, ctx: Any, inputs: Arguments, output: Any) -> None:
    count = len(op.backward_tensors)
    ctx.save_for_backward(*inputs[:count])
    *ctx.attributes, ctx.needs = inputs[count:]


def _differentiate_again(op: Op, ctx: Any, grads: Arguments) -> Any:
    """The derivative of the backward, by the operator's formula in torch's operations. That has one of its own."""
    given = ctx.saved_tensors
    asked = zip(ctx.needs_input_grad, given, strict=False)
    moving = [asks and t is not None and t.is_floating_point() for asks, t in asked]

    def gradients(*some: Any) -> Any:
        grad_output, *tensors = _replaced(given, moving, some)

        def output(*wanted: Any) -> Any:
            return formulas.compute(op, *_replaced(tensors, ctx.needs, wanted), *ctx.attributes)

        pull = torch.func.vjp(output, *itertools.compress(tensors, ctx.needs))[1]
        return pull(grad_output)

    pull = torch.func.vjp(gradients, *itertools.compress(given, moving))[1]
    return *spread(moving, pull(tuple(grads))), *(None for _ in ctx.attributes), None


def _replaced(tensors: Arguments, flags: Sequence[bool], others: Arguments) -> list[Any]:
    """The tensors, with others in the place of those that are flagged."""
    placed = zip(tensors, flags, spread(flags, others), strict=True)
    return [other if flag else tensor for tensor, flag, other in placed]


class _Forward(torch.autograd.Function):
    """A torch operator, called with its arguments and last the `Op`; `needs_input_grad` begins with the tensors."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *arguments, op = inputs
        return _overload(op.name)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
        *arguments, ctx.op = inputs
        _save(ctx.op, ctx, arguments, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        return *_differentiate(ctx.op, ctx, grad_output), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{ctx.op.name}: forward-mode differentiation is not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: Arguments, *inputs: Any) -> Any:
        *arguments, op = inputs
        return vmap.forward(op, partial(call, op), info.batch_size, in_dims, arguments)


class _Backward(torch.autograd.Function):
    """The same of the operator's backward."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *arguments, op = inputs
        return tuple(_overload(f"{op.name}_backward")(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
        *arguments, ctx.op = inputs
        _save_all(ctx.op, ctx, arguments, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_differentiate_again(ctx.op, ctx, grads), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{ctx.op.name}_backward: forward-mode differentiation is not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: Arguments, *inputs: Any) -> Any:
        *arguments, op = inputs
        grads, dims = vmap.backward(op, partial(call_backward, op), info.batch_size, in_dims, arguments)
        return tuple(grads), tuple(dims)
