"""The torch adapter under torch's transformations: autograd's checks, compile, export, torch.func, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import ADAPTED, EACH
from cases.case import Case, Tensors
from cases.deform_conv2d import IMAGES
from frameworks.comparing import PLAIN, assert_close, double

import cudcn

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import (  # noqa: E402
    differentiable,
    flat,
    forward_of,
    gradients,
    loss_of,
    overload,
    tensors,
    to_torch,
)

FORWARD_MODE = "forward-mode differentiation is not implemented"
# by torch.func.jvp itself, the first time
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_opcheck(case: Case) -> None:
    name, given = case.op.name, tensors(case, grad=False)
    torch.library.opcheck(overload(name), (*tensors(case).values(), *flat(case)))
    grad_output = torch.ones_like(case.forward(given))
    for needs in (case.op.differentiable([*given.values()]), [False] * len(given)):
        torch.library.opcheck(overload(f"{name}_backward"), (grad_output, *given.values(), *flat(case), needs))


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_gradcheck(case: Case) -> None:
    smooth = {name: to_torch(t) for name, t in case.smooth(dict(case.tensors())).items()}
    given = {
        name: t.requires_grad_()
        for name, t in smooth.items()
        if t is not None and name not in case.op.non_differentiable
    }
    assert torch.autograd.gradcheck(
        lambda *t: case.forward({**smooth, **dict(zip(given, t, strict=True))}), tuple(given.values()), fast_mode=True
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_compile(case: Case, public: bool, dynamic: bool) -> None:
    function = getattr(cudcn if public else cudcn.torch, case.op.name)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: function(**given, **case.attributes).square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    again = replace(case, name=case.name + " again")  # other numbers
    sizes = [case, again, replace(case, batch=1)] if dynamic else [case, again]
    for size in sizes:
        given, eager = tensors(size), tensors(size)
        compiled(given).backward()
        size.forward(eager).square().sum().backward()
        for name, got in gradients(given).items():
            assert_close(got, double(eager[name].grad) if got is not None else None)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_compile_the_raw_backward(case: Case) -> None:
    backward = getattr(cudcn.torch, f"{case.op.name}_backward")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda grad, given: tuple(backward(grad, **given, **case.attributes)), fullgraph=True, backend="aot_eager"
    )
    given, grad_output = tensors(case, grad=False), to_torch(case.grad_output())
    want = case.backward(given, grad_output)
    for got, name in zip(compiled(grad_output, given), want, strict=True):
        assert_close(got, double(want[name]))


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, given: Tensors) -> Any:
            return PLAIN.forward(given)

    batch = {0: torch.export.Dim.DYNAMIC}
    dynamic = {name: batch if name in IMAGES else None for name in PLAIN.tensors()}
    program = torch.export.export(Model(), (tensors(grad=False),), dynamic_shapes=(dynamic,))
    given = tensors(replace(PLAIN, batch=1), grad=False)
    assert_close(program.module()(given), double(PLAIN.forward(given)))


@jit_is_deprecated
@pytest.mark.parametrize("case", EACH, ids=str)
def test_refuses_forward_mode(case: Case) -> None:
    """With respect to each tensor, also where nothing is recorded for a backward pass."""
    for name, tensor in differentiable(case).items():
        loss = loss_of(case, [name])
        for function in loss, torch.func.grad(loss):
            with pytest.raises(NotImplementedError, match=f"{case.op.name}(_backward)?: {FORWARD_MODE}"):
                torch.func.jvp(function, (tensor,), (tensor,))
        with (
            torch.no_grad(),
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=FORWARD_MODE),
        ):
            loss(torch.autograd.forward_ad.make_dual(tensor, tensor))
    grad_output = to_torch(case.grad_output())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        case.backward(tensors(case, grad=False), torch.autograd.forward_ad.make_dual(grad_output, grad_output))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_func_grad(case: Case) -> None:
    given = differentiable(case)
    want = case.backward(tensors(case, grad=False), to_torch(case.grad_output()))

    loss = loss_of(case, given)

    def loss_twice(*values: Any) -> Any:
        value = loss(*values)
        return value, value.detach()

    transform = torch.func.grad(loss_twice, argnums=tuple(range(len(given))), has_aux=True)
    grads, value = transform(*given.values())
    assert_close(value, double(loss(*given.values())))
    for name, got in zip(given, grads, strict=True):
        assert_close(got, double(want[name]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_func_vjp(case: Case) -> None:
    given, grad_output = differentiable(case), to_torch(case.grad_output())
    want = case.backward(tensors(case, grad=False), grad_output)

    out, pull = torch.func.vjp(forward_of(case, given), *given.values())
    assert_close(out, double(case.forward(tensors(case))))
    for name, got in zip(given, pull(grad_output), strict=True):
        assert_close(got, double(want[name]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_func_jacrev(case: Case) -> None:
    """For three of the output's numbers, against one backward pass for each."""
    given, forward = differentiable(case), forward_of(case, differentiable(case))
    out = forward(*given.values())
    places = [0, out.numel() // 2, out.numel() - 1]
    some = lambda *values: forward(*values).flatten()[places]  # noqa: E731
    jacobians = torch.func.jacrev(some, argnums=tuple(range(len(given))))(*given.values())
    for row, place in enumerate(places):
        unit = torch.zeros(out.numel(), dtype=out.dtype)
        unit[place] = 1
        want = case.backward(tensors(case, grad=False), unit.reshape(out.shape))
        for name, jacobian in zip(given, jacobians, strict=True):
            assert_close(jacobian[row], double(want[name]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_autograd_records_outside_of_func(case: Case) -> None:
    given, grad_output = tensors(case), to_torch(case.grad_output())
    name = next(iter(given))
    out, _ = torch.func.vjp(lambda t: case.forward({**given, name: t}), given[name])
    out.backward(grad_output)
    want = case.backward(tensors(case, grad=False), grad_output)
    for name, got in gradients(given).items():
        assert_close(got, double(want[name]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_checkpointing(case: Case) -> None:
    from torch.utils.checkpoint import checkpoint

    given = differentiable(case)
    leaves = [t.detach().requires_grad_() for t in given.values()]
    checkpoint(loss_of(case, given), *leaves, use_reentrant=False).backward()
    want = case.backward(tensors(case, grad=False), to_torch(case.grad_output()))
    for name, leaf in zip(given, leaves, strict=True):
        assert_close(leaf.grad, double(want[name]))
