"""How the papers start their layers, in place."""

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
