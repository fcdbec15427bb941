"""What tests of modules share: random parameters and tensors, and comparisons in float64."""

from __future__ import annotations

from typing import Any

import torch  # a test file that takes these is skipped where there is none


def shaken(module: Any) -> Any:
    """In float64 with random parameters: as made, many are zero, or memory as it was found."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return module.double()


def rand(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def results(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The output, and the gradients of all that has one."""
    torch.manual_seed(2)  # dropout's
    out = module(**inputs)
    wanted = {**{name: t for name, t in inputs.items() if getattr(t, "requires_grad", False)}}
    wanted.update(module.named_parameters())
    shares = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    grads = torch.autograd.grad((out * shares).sum(), list(wanted.values()))
    return {"output": out, **dict(zip(wanted, grads, strict=True))}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.any(), name
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
