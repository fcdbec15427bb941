"""Linear layers with the starts that the papers give them."""

from __future__ import annotations

import torch


def zeroed(features: int, out_features: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(features, out_features)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def projection(features: int, bias: bool = True) -> torch.nn.Linear:
    layer = torch.nn.Linear(features, features, bias)
    torch.nn.init.xavier_uniform_(layer.weight)
    if bias:
        torch.nn.init.zeros_(layer.bias)
    return layer
