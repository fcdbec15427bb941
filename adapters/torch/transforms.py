"""What autograd, torch.compile and torch.func's transforms do with an operator.

torch.compile and torch.export know it as a torch operator with a derivative registered. The registration's Function
is hidden from torch.func's transforms and drops forward-mode derivatives in silence, so that eager calls go through a
Function of our own, above the dispatcher: the transforms see it, and without a `jvp` it refuses forward mode. All of
this is torch's public interface, which is the same in every version. What stays torch's error is torch.compile of one
of torch.func's transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..op import Op, spread

Arguments = Sequence[Any]


def differentiable(op: Op, library: torch.library.Library) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair of torch operators as functions with a derivative and a rule for vmap."""
    run = getattr(torch.ops.cudcn, op.name).default
    run_backward = getattr(torch.ops.cudcn, f"{op.name}_backward").default
    count = len(op.tensors)

    def save(ctx: Any, inputs: Arguments, output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.attributes = inputs[count:]

    def save_nothing(ctx: Any, inputs: Arguments, output: Any) -> None:
        pass

    def differentiate(ctx: Any, grad_output: Any) -> Any:
        tensors = ctx.saved_tensors  # once: checkpointing refuses a second look
        given = zip(ctx.needs_input_grad, op.differentiable(tensors), strict=False)
        needs = [asked and possible for asked, possible in given]
        grads = call_backward(grad_output, *tensors, *ctx.attributes, needs)
        return *spread(needs, grads), *(None for _ in ctx.attributes)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op.name}: the second derivative is not implemented")

    class Forward(torch.autograd.Function):
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return run(*arguments)

        @staticmethod
        def vmap(info: Any, in_dims: Arguments, *arguments: Any) -> Any:
            return torch.stack(_one_by_one(op.name, Forward, info, in_dims, arguments)), 0

    class Backward(torch.autograd.Function):
        setup_context = staticmethod(save_nothing)
        backward = staticmethod(refuse)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return tuple(run_backward(*arguments))

        @staticmethod
        def vmap(info: Any, in_dims: Arguments, *arguments: Any) -> Any:
            grads = _one_by_one(op.name, Backward, info, in_dims, arguments)
            stacked = tuple(torch.stack(items) for items in zip(*grads, strict=True))
            return stacked, (0,) * len(stacked)

    def call(*arguments: Any) -> Any:
        return run(*arguments) if torch.compiler.is_compiling() else Forward.apply(*arguments)

    def call_backward(*arguments: Any) -> Any:
        return run_backward(*arguments) if torch.compiler.is_compiling() else Backward.apply(*arguments)

    torch.library.register_autograd(f"cudcn::{op.name}", differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(f"cudcn::{op.name}_backward", refuse, lib=library)
    return call, call_backward


def _one_by_one(name: str, function: Any, info: Any, in_dims: Arguments, arguments: Arguments) -> list[Any]:
    """A call of an autograd.Function for each item along the mapped axes."""
    if info.batch_size == 0:
        raise NotImplementedError(f"{name}: vmap over an axis of length 0 is not implemented")
    return [
        # attributes that are lists have lists in the place of a dimension
        function.apply(
            *(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
