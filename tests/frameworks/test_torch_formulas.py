"""The formulas in torch's operations, and the second derivatives that are made of them."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import ADAPTED, EACH
from cases.case import HALVES, Case, Tensors
from frameworks.comparing import assert_close, double

import cudcn

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import differentiable, flat, gradients, loss_of, tensors, to_torch  # noqa: E402

from cudcn.torch import formulas  # noqa: E402

ALL = [*ADAPTED, *(case for family in cases._FAMILIES for case in getattr(family, "CASES", ()))]


def smooth(case: Case) -> Tensors:
    given = {name: to_torch(t) for name, t in case.smooth(dict(case.tensors())).items()}
    for name in differentiable(case):
        given[name].requires_grad_()
    return given


def formula(case: Case, given: Tensors) -> Any:
    return formulas.compute(case.op, *given.values(), *flat(case))


@pytest.mark.parametrize("case", ALL, ids=repr)
def test_formulas_are_the_operators(case: Case) -> None:
    """And so are their derivatives."""
    given, plain = tensors(case), tensors(case)
    out, grad_output = formula(case, given), to_torch(case.grad_output())
    want = case.forward(plain)
    assert_close(out, double(want))
    out.backward(grad_output)
    want.backward(grad_output)
    for name, got in gradients(given).items():
        assert_close(got, double(gradients(plain)[name]))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_formulas_of_half_types_calculate_in_float32(case: Case, dtype: str) -> None:
    given = tensors(case, dtype)
    out = formula(case, given)
    assert out.dtype == getattr(torch, dtype)
    assert_close(out, double(case.forward(given)), tolerance={"float16": 1e-3, "bfloat16": 8e-3}[dtype])


@pytest.mark.parametrize("case", EACH, ids=str)
def test_at_the_borders_of_cells(case: Case) -> None:
    """Positions are whole numbers, those at -1 among them: the slopes are those of the cells that follow."""
    given = tensors(case, grad=False)
    for name in {"offset", "offset_mask"} & given.keys():
        given[name] = given[name].round()
    if "sampling_locations" in given:
        size = given["spatial_shapes"][:, None].flip(-1)
        given["sampling_locations"] = ((given["sampling_locations"] * size - 0.5).round() + 0.5) / size
    plain = {name: t if t is None else t.clone() for name, t in given.items()}
    for name in differentiable(case):
        given[name].requires_grad_()
        plain[name].requires_grad_()
    grad_output = to_torch(case.grad_output())
    formula(case, given).backward(grad_output)
    case.forward(plain).backward(grad_output)
    for name, got in gradients(given).items():
        assert_close(got, double(gradients(plain)[name]))


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_gradgradcheck(case: Case) -> None:
    given = smooth(case)
    wanted = {name: given[name] for name in differentiable(case)}
    function = lambda *t: case.forward({**given, **dict(zip(wanted, t, strict=True))})  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tuple(wanted.values()), fast_mode=True)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_second_derivative_of_some(case: Case) -> None:
    """Of one tensor's gradient with respect to each other one, against the formula's own."""
    for name in differentiable(case):
        given = smooth(case)
        for other in differentiable(case):
            given[other].requires_grad_(other == name)
        found = []
        for compute in case.forward, lambda given: formula(case, given):
            (grad,) = torch.autograd.grad(compute(given).square().sum(), given[name], create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), given[name])[0])
        assert_close(found[0], double(found[1]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_third_derivative(case: Case) -> None:
    """The second derivative has a derivative: it is made of torch's operations."""
    found = []
    for function in case.forward, lambda given: formula(case, given):
        given = smooth(case)
        wanted = [given[name] for name in differentiable(case)]
        value = function(given).pow(3).sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, wanted, create_graph=True)) * 1e-6
        found.append(torch.autograd.grad(value, wanted))
    for got, want in zip(*found, strict=True):
        assert_close(got, double(want), tolerance=1e-9)
        assert want.any()


@pytest.mark.parametrize("case", EACH, ids=str)
def test_second_derivative_by_torch_func(case: Case) -> None:
    """grad of grad, and vmap of it, as autograd has it."""
    given = smooth(case)
    name = next(iter(differentiable(case)))
    loss = lambda t: case.forward({**given, name: t}).pow(3).sum()  # noqa: E731
    slope = lambda t: torch.func.grad(loss)(t).square().sum()  # noqa: E731

    def want(tensor: Any) -> Any:
        leaf = tensor.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    one = given[name].detach()
    assert_close(torch.func.grad(slope)(one), double(want(one)))
    many = torch.stack([one, 2 * one])
    for got, item in zip(torch.vmap(torch.func.grad(slope))(many), many, strict=True):
        assert_close(got, double(want(item)))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_the_raw_backward_is_differentiable(case: Case) -> None:
    given, grad_output = tensors(case), to_torch(case.grad_output()).requires_grad_()
    raw = [g for g in case.backward(given, grad_output).values() if g is not None]
    wanted = [grad_output, *(given[name] for name in differentiable(case))]
    firsts = torch.autograd.grad(formula(case, given), wanted[1:], grad_output, create_graph=True)
    # roi_avg_pool's and psroi_pool's do not depend on the input
    got, want = (
        torch.autograd.grad(sum(g.square().sum() for g in grads), wanted, materialize_grads=True)
        for grads in (raw, firsts)
    )
    for one, other in zip(got, want, strict=True):
        assert_close(one, double(other))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_the_compiled_backward_is_differentiable(case: Case) -> None:
    torch._dynamo.reset()
    backward = getattr(cudcn, f"{case.op.name}_backward")
    square = lambda grad_output, given: sum(  # noqa: E731
        g.square().sum() for g in backward(grad_output, **given, **case.attributes) if g is not None
    )
    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    found = []
    for function in compiled, square:
        given, grad_output = tensors(case), to_torch(case.grad_output()).requires_grad_()
        function(grad_output, given).backward()
        found.append({"grad_output": grad_output.grad, **gradients(given)})
    for name, want in found[1].items():
        assert_close(found[0][name], double(want))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_the_first_derivative_runs_no_formula(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "compute", lambda *_: pytest.fail("the formula ran"))
    torch._dynamo.reset()
    for function in case.forward, torch.compile(case.forward, fullgraph=True, backend="aot_eager"):
        function(tensors(case)).sum().backward()
    name, tensor = next(iter(differentiable(case).items()))
    torch.func.grad(loss_of(case, [name]))(tensor)
