"""What autograd and torch.func's transforms do with a torch operator.

`torch.library.register_autograd` would make an autograd.Function that refuses torch.func's transforms, and that lets
forward-mode derivatives vanish. So the kernel is written here; like one of torch's own, it handles one level of
autograd, and calls the operator again below it, where the next level's turn is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

Arguments = Sequence[Any]


def autograd_kernel(
    run: Any,
    save: Callable[[Any, Arguments], None],
    differentiate: Callable[..., Sequence[Any]],
    forward_mode: str,
) -> Callable[..., Any]:
    """What to register at the key "Autograd" for the operator `run`.

    `save(ctx, arguments)` keeps what `differentiate(ctx, *grad_outputs)` needs to return one gradient per argument;
    `ctx.needs_input_grad` begins with one flag that is not an argument's. `forward_mode` is the error that says why
    there is no forward-mode derivative.
    """

    def below(keys: Any, arguments: Arguments) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
            save(ctx, arguments)
            # Function turns both off, but they are this level's alone: an outer transform goes on recording
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = below(keys, arguments)
            return tuple(out) if isinstance(out, list) else out

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            return None, *differentiate(ctx, *grad_outputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(forward_mode)

    # not Function's own: that is for calls above the dispatcher, and would begin with the transforms anew
    apply = super(torch.autograd.Function, Function).apply  # type: ignore[misc]

    def kernel(keys: Any, *arguments: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
        if not recorded and forward_ad._current_level < 0:
            return below(keys, arguments)
        with enable_single_level_autograd_function():
            out = apply(keys, *arguments)
        return list(out) if isinstance(out, tuple) else out

    return kernel


def vmap_rule(name: str, run: Any) -> Callable[..., Any]:
    """What to register with torch.library.register_vmap: the operator `run`, called for one item after the other."""

    def looped(info: Any, in_dims: Arguments, *arguments: Any) -> Any:
        if info.batch_size == 0:
            raise NotImplementedError(f"{name}: vmap over an axis of length 0 is not implemented")
        outs = [
            # the attributes that are lists have lists in the place of a dimension
            run(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], torch.Tensor):
            return torch.stack(outs), 0
        stacked = [torch.stack(out) for out in zip(*outs, strict=True)]
        return stacked, [0] * len(stacked)

    return looped
