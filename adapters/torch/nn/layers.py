"""How the papers start their layers, in place; and a check."""

from __future__ import annotations

import torch


def zero_(*layers: torch.nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)


def xavier_(*layers: torch.nn.Linear) -> None:
    for layer in layers:
        torch.nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)


def check_channels(module: str, name: str, axes: str, channels: int, tensor: torch.Tensor) -> None:
    """Of a tensor from which an operator would read off other groups instead.

    Not while torch.jit.trace looks on, which would warn of a decision.
    """
    if not torch.jit.is_tracing() and tensor.shape[-3:-2] != (channels,):
        raise ValueError(f"{module}: {name} must be {axes} = {channels}, got {tuple(tensor.shape)}")
