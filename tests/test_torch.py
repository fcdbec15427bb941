"""The torch adapter against the NumPy pair, and what torch expects of an operator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import (
    CASES,
    EACH,
    PLAIN,
    SECOND,
    assert_close,
    check_introduction,
    check_missing_arguments,
    check_tensors_by_position,
    double,
    expected,
)
from deform_conv2d_cases import IMAGES
from operator_case import HALVES, Case, Tensors

import cudcn
from cudcn.cpu import parallel
from cudcn.op import Op

torch = pytest.importorskip("torch")
import cudcn.torch  # noqa: E402

ATTRIBUTES = PLAIN.attributes
FORWARD_MODE = "must implement the jvp function"  # torch's own words
# by torch.func.jvp itself, the first time
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")


def to_torch(array: Any) -> Any:
    if array is None:
        return None
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def tensors(case: Case = PLAIN, dtype: str = "float64", device: str = "cpu", grad: bool = True) -> Tensors:
    """The case's tensors, requiring gradients where there are any."""
    given = {name: to_torch(t) for name, t in case.tensors(dtype).items()}
    return {
        name: None if t is None else t.to(device).requires_grad_(grad and name not in case.op.constants)
        for name, t in given.items()
    }


def flat(case: Case) -> list[Any]:
    """The attributes as the torch operators take them."""
    return [list(v) if isinstance(v, tuple) else v for v in case.op.canonical(**case.attributes).values()]


def overload(name: str) -> Any:
    return getattr(torch.ops.cudcn, name).default


def gradients(given: Tensors) -> Tensors:
    return {name: None if t is None else t.grad for name, t in given.items()}


def differentiable(case: Case) -> Tensors:
    """Those of the case's tensors that have a gradient, by name."""
    given = tensors(case, grad=False)
    flags = case.op.differentiable([*given.values()])
    return {name: t for (name, t), flag in zip(given.items(), flags, strict=True) if flag}


def forward_of(case: Case, names: Iterable[str]) -> Callable[..., Any]:
    """The operator as a function of these tensors alone."""
    rest = tensors(case, grad=False)
    return lambda *values: case.forward({**rest, **dict(zip(names, values, strict=True))})


def loss_of(case: Case, names: Iterable[str]) -> Callable[..., Any]:
    """A number whose gradient with respect to the output is `case.grad_output()`."""
    forward, grad_output = forward_of(case, names), to_torch(case.grad_output())
    return lambda *values: (forward(*values) * grad_output).sum()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Which gradients each call of the raw backward is asked for."""
    seen: list[list[bool]] = []
    original = Op.backward

    def spy(self: Op, plan: Any, grads: Any, *rest: Any) -> None:
        seen.append([grad is not None for grad in grads])
        original(self, plan, grads, *rest)

    monkeypatch.setattr(Op, "backward", spy)
    return seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_numpy(case: Case, device: str) -> None:
    given, grad_output = tensors(case, device=device), to_torch(case.grad_output()).to(device)
    want, wants = expected(case, given, grad_output)
    out = case.forward(given)
    assert out.is_contiguous()
    assert_close(out, want)
    out.backward(grad_output)
    raw = getattr(cudcn, f"{case.op.name}_backward")(grad_output, **tensors(case, device=device), **case.attributes)
    assert isinstance(raw, case.op.gradients)
    for name, got in gradients(given).items():
        assert_close(got, wants[name])
        assert_close(getattr(raw, name), wants[name])


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    given, grad_output = tensors(device="cuda"), to_torch(PLAIN.grad_output()).cuda()
    want, wants = expected(PLAIN, given, grad_output)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensor in given.values():
            torch.cuda._sleep(10_000_000)  # a call on another stream would overtake this
            tensor.data.mul_(2)
            tensor.data.div_(2)
        out = PLAIN.forward(given)
        out.backward(grad_output)
    stream.synchronize()
    assert_close(out, want)
    for name, got in gradients(given).items():
        assert_close(got, wants[name])


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_dtypes(case: Case, dtype: str) -> None:
    given, grad_output = tensors(case, dtype), to_torch(case.grad_output(dtype))
    want, wants = expected(case, given, grad_output)
    out = case.forward(given)
    assert out.dtype == getattr(torch, dtype)
    case.close(double(out), want, dtype)
    out.backward(grad_output)
    for name, got in gradients(given).items():
        if wants[name] is not None:
            assert got.dtype == out.dtype
            case.close(double(got), wants[name], dtype)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_takes_views_as_they_are(case: Case) -> None:
    given = tensors(case, grad=False)
    strided = {name: None if t is None else torch.stack([t, t], -1)[..., 0] for name, t in given.items()}
    first = next(iter(given))
    turned = given[first].permute(*reversed(range(given[first].ndim))).contiguous()
    strided[first] = turned.permute(*reversed(range(turned.ndim)))
    assert not strided[first].is_contiguous()
    grad_output = to_torch(case.grad_output())
    want, wants = expected(case, given, grad_output)
    assert_close(case.forward(strided), want)
    for name, got in case.backward(strided, grad_output).items():
        assert_close(got, wants[name])


@pytest.mark.parametrize("case", EACH, ids=str)
def test_takes_any_grad_output(case: Case) -> None:
    """With strides of 0, and negated lazily."""
    one = torch.tensor(0.5, dtype=torch.float64)
    turned = to_torch(case.grad_output())
    for grad_output in one.expand(case.output_shape()), torch.complex(turned, -turned).conj().imag:
        given = tensors(case)
        _, wants = expected(case, given, grad_output.resolve_neg())
        case.forward(given).backward(grad_output)
        for name, got in gradients(given).items():
            assert_close(got, wants[name])


@pytest.mark.parametrize("case", EACH, ids=str)
def test_notices_changes_in_place(case: Case) -> None:
    for name in differentiable(case):
        given = tensors(case)
        changed = given[name] * 1
        out = case.forward({**given, name: changed})
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_takes_lazy_negation() -> None:
    given = tensors(grad=False)
    negated = torch.complex(given["input"], -given["input"]).conj().imag
    assert negated.is_neg()
    assert_close(PLAIN.forward({**given, "input": negated}), double(PLAIN.forward(given)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    name, given = case.op.name, tensors(case, grad=False)
    torch.library.opcheck(overload(name), (*tensors(case).values(), *flat(case)))
    grad_output = torch.ones_like(case.forward(given))
    for needs in (case.op.differentiable([*given.values()]), [False] * len(given)):
        torch.library.opcheck(overload(f"{name}_backward"), (grad_output, *given.values(), *flat(case), needs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    smooth = {name: to_torch(t) for name, t in case.smooth(dict(case.tensors())).items()}
    given = {name: t.requires_grad_() for name, t in smooth.items() if t is not None and name not in case.op.constants}
    assert torch.autograd.gradcheck(
        lambda *t: case.forward({**smooth, **dict(zip(given, t, strict=True))}), tuple(given.values()), fast_mode=True
    )


@pytest.mark.parametrize("case", EACH, ids=str)
def test_computes_only_wanted_gradients(case: Case, computed: list[list[bool]]) -> None:
    grad_output = to_torch(case.grad_output())
    possible = {name for name, t in tensors(case).items() if t is not None and t.requires_grad}
    _, wants = expected(case, tensors(case), grad_output)
    for wanted in [*({name} for name in possible), possible - {next(iter(case.op.tensors))}]:
        if not wanted:
            continue
        given = tensors(case, grad=False)
        for name in wanted:
            given[name].requires_grad_()
        computed.clear()
        case.forward(given).backward(grad_output)
        assert computed == [[name in wanted for name in given]]
        for name, got in gradients(given).items():
            assert_close(got, wants[name] if name in wanted else None)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_constants_that_require_gradients_get_none(case: Case) -> None:
    given = tensors(case)
    for name in case.op.constants:
        if given[name].is_floating_point():
            given[name].requires_grad_()
    case.forward(given).sum().backward()
    assert all(given[name].grad is None for name in case.op.constants)


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


def test_without_gradients() -> None:
    with torch.no_grad():
        assert not PLAIN.forward(tensors()).requires_grad
    with torch.inference_mode():
        assert PLAIN.forward(tensors()).is_inference()


@jit_is_deprecated
@pytest.mark.parametrize("case", EACH, ids=str)
def test_refuses_the_second_derivative(case: Case) -> None:
    given = tensors(case)
    first = next(iter(given.values()))
    (grad,) = torch.autograd.grad(case.forward(given).sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{case.op.name}: {SECOND}"):
        grad.sum().backward()
    name, tensor = next(iter(differentiable(case).items()))
    gradient = torch.func.grad(loss_of(case, [name]))
    with pytest.raises(NotImplementedError, match=f"{case.op.name}: {SECOND}"):
        torch.func.grad(lambda t: gradient(t).sum())(tensor)
    grad_output = to_torch(case.grad_output())
    raw = lambda t: case.backward(tensors(case, grad=False), t)[name]  # noqa: E731
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        raw(torch.autograd.forward_ad.make_dual(grad_output, grad_output))


@jit_is_deprecated
@pytest.mark.parametrize("case", EACH, ids=str)
def test_refuses_forward_mode(case: Case) -> None:
    """Of each tensor, also where nothing is recorded for a backward pass."""
    for name, tensor in differentiable(case).items():
        loss = loss_of(case, [name])
        for function in loss, torch.func.grad(loss):
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                torch.func.jvp(function, (tensor,), (tensor,))
        with (
            torch.no_grad(),
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=FORWARD_MODE),
        ):
            loss(torch.autograd.forward_ad.make_dual(tensor, tensor))


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
    """Of three of the output's numbers, against one backward pass for each."""
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
def test_vmap(case: Case) -> None:
    """Over all tensors and over one, inside and outside of grad, and nested."""
    again = replace(case, name=case.name + " again")  # other numbers
    items = [tensors(case, grad=False), tensors(again, grad=False)]
    given = {name: t for name, t in items[0].items() if t is not None}
    stacked = {name: torch.stack([item[name] for item in items], -1) for name in given}
    outs = torch.vmap(case.forward, in_dims=(dict.fromkeys(given, -1),), out_dims=1)(stacked)
    for index, item in enumerate(items):
        assert_close(outs[:, index], double(case.forward(item)))

    name, tensor = next(iter(differentiable(case).items()))
    one = torch.stack([tensor, 2 * tensor, 3 * tensor])
    loss = loss_of(case, [name])
    want = torch.stack([torch.func.grad(loss)(item) for item in one])
    of_each = torch.vmap(torch.func.grad(loss))
    assert_close(of_each(one), double(want))
    assert_close(torch.vmap(of_each)(one[None])[0], double(want))
    assert_close(torch.func.grad(lambda items: torch.vmap(loss)(items).sum())(one), double(want))
    with pytest.raises(NotImplementedError, match=f"{case.op.name}: vmap over an axis of length 0"):
        torch.vmap(loss)(one[:0])


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
def test_meta(case: Case) -> None:
    given = {name: None if t is None else t.to("meta") for name, t in tensors(case, grad=False).items()}
    for name in differentiable(case):
        given[name].requires_grad_()
    out = case.forward(given)
    assert out.is_meta
    assert out.shape == case.output_shape()
    out.sum().backward()
    for name, grad in gradients(given).items():
        if name in differentiable(case):
            assert grad.is_meta
            assert grad.shape == given[name].shape
        else:
            assert grad is None


def test_empty_batch() -> None:
    given = tensors(replace(PLAIN, batch=0))
    out = PLAIN.forward(given)
    assert out.shape == (0, 6, 4, 3)
    out.sum().backward()
    assert [t.grad.shape for t in given.values()] == [t.shape for t in given.values()]
    assert not given["weight"].grad.any()


def test_refusals() -> None:
    given, (function, attributes) = [*tensors().values()], (cudcn.torch.deform_conv2d, ATTRIBUTES)
    with pytest.raises(ValueError, match="deform_conv2d: all tensors must be on one device, got input: meta"):
        function(given[0].to("meta"), *given[1:], **attributes)
    with pytest.raises(TypeError, match="all tensors must be of one framework, got input: torch, offset: numpy"):
        function(given[0], double(given[1]), *given[2:], **attributes)
    with pytest.raises(TypeError, match=r"cudcn\.torch takes tensors of torch, got numpy"):
        function(*map(double, given), **attributes)
    with pytest.raises(TypeError, match="weight is required, got None"):
        function(*given[:2], None)
    with pytest.raises(ValueError, match=r"offset must be \(N, 36, H_out, W_out\)"):
        function(*given)
    with pytest.raises(ValueError, match="grad_output must have the output's shape and dtype"):
        cudcn.torch.deform_conv2d_backward(torch.ones(3), *given, **attributes)
    with pytest.raises(TypeError, match=r"input must be float16, .*, got int64"):
        function(given[0].long(), *given[1:], **attributes)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_autocast(case: Case) -> None:
    given = tensors(case, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        out = case.forward(given)
        assert case.forward(tensors(case)).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    half = {
        n: t.bfloat16() if t is not None and t.is_floating_point() and n not in case.op.fine else t
        for n, t in given.items()
    }
    assert torch.equal(out, case.forward(half))  # the fine tensors kept their float32
    out.sum().backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(given).values() if grad is not None)


def test_python_reports_missing_arguments() -> None:
    check_missing_arguments(cudcn.torch, to_torch)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("count", [1, 2])
def test_as_many_threads_as_torch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; afterwards, and for other frameworks, the limit is gone."""
    monkeypatch.delenv("CUDCN_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)), raising=False)
    before, seen = parallel.threads(), []
    for name in "forward", "backward":
        original = getattr(Op, name)
        monkeypatch.setattr(
            Op, name, lambda *args, original=original: (seen.append(parallel.threads()), original(*args))[1]
        )
    torch.set_num_threads(count)
    PLAIN.forward(tensors()).sum().backward()
    assert seen == [min(count, before)] * 2
    assert parallel.threads() == before


def test_threads() -> None:
    want = double(PLAIN.forward(tensors()))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: PLAIN.forward(tensors()), range(16)):
            assert_close(out, want)


def test_module() -> None:
    module = cudcn.torch.DeformConv2d(4, 6, 3, padding=((2, 0), (0, 1)), stride=(1, 2), dilation=(2, 1), groups=2)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "weight": (6, 2, 3, 3),
        "bias": (6,),
    }
    input, offset, _, _, mask = tensors(dtype="float32", grad=False).values()
    want = cudcn.deform_conv2d(input, offset, module.weight, module.bias, mask, **ATTRIBUTES)
    assert torch.equal(module(input, offset, mask), want)
    assert module(input, offset).shape == want.shape
    assert cudcn.torch.DeformConv2d(4, 6, 3, bias=False).bias is None
    assert "4, 6, kernel_size=(3, 3)" in repr(module)
    with pytest.raises(ValueError, match="DeformConv2d: groups must divide"):
        cudcn.torch.DeformConv2d(4, 6, 3, groups=4)


def test_modulated_module() -> None:
    settings = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    module = cudcn.torch.ModulatedDeformConv2d(4, 6, (3, 2), offset_groups=2, **settings)
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    assert shapes == {
        "weight": (6, 2, 3, 2), "bias": (6,), "conv_offset.weight": (36, 4, 3, 2), "conv_offset.bias": (36,)
    }  # fmt: skip
    input = torch.randn(2, 4, 7, 8)
    plain = torch.nn.functional.conv2d(input, module.weight / 2, module.bias, **settings)
    torch.testing.assert_close(module(input), plain)  # half: the sigmoid's start
    module(input).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert "offset_groups=2" in repr(module)
    with pytest.raises(ValueError, match="offset_groups must divide"):
        cudcn.torch.ModulatedDeformConv2d(4, 6, 3, offset_groups=3)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_functions_introduce_themselves(case: Case) -> None:
    check_introduction(cudcn.torch, case.op.name)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_tensors_by_position(case: Case) -> None:
    check_tensors_by_position(cudcn.torch, case, to_torch)


def test_only_bfloat16_needs_ml_dtypes() -> None:
    script = """
import sys
sys.modules["ml_dtypes"] = None
import torch, cudcn.torch
x, rois = torch.ones(1, 2, 3, 3), torch.tensor([[0, 0, 0, 2, 2.0]])
print(cudcn.torch.roi_avg_pool(x, rois, output_size=1).flatten().tolist())
try:
    cudcn.torch.roi_avg_pool(x.bfloat16(), rois, output_size=1)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    values, error = run.stdout.splitlines()
    assert values == "[1.0, 1.0]"
    assert error.startswith("bfloat16 tensors need ml_dtypes: pip install ml_dtypes (")


@pytest.mark.parametrize("case", EACH, ids=str)
def test_torch_ops_refuse_tensors_of_two_devices(case: Case) -> None:
    """Also where the dispatcher picks the meta kernel, whose result nobody fills."""
    given = {"grad_output": to_torch(case.grad_output()), **tensors(case, grad=False)}
    needs = case.op.differentiable([*given.values()][1:])
    for name in given:
        if given[name] is not None:
            grad_output, *mixed = {**given, name: given[name].to("meta")}.values()
            rule = f"all tensors must be on one device, got .*{name}: meta"
            if name != "grad_output":
                with pytest.raises(ValueError, match=f"{case.op.name}: {rule}"):
                    overload(case.op.name)(*mixed, *flat(case))
            with pytest.raises(ValueError, match=f"{case.op.name}_backward: {rule}"):
                overload(f"{case.op.name}_backward")(grad_output, *mixed, *flat(case), needs)


WITH_CONSTANTS = [case for case in EACH if case.op.constants]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", WITH_CONSTANTS, ids=str)
def test_constants_of_numpy(case: Case, compiled: bool) -> None:
    given, grad_output = tensors(case), to_torch(case.grad_output())
    mixed = dict(given)
    for name in case.op.constants:
        mixed[name] = case.tensors()[name][::-1].copy()[::-1]  # which torch takes no view of
        mixed[name].flags.writeable = False
    function = case.forward
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(case.forward, fullgraph=True, backend="aot_eager")
        for name in case.op.constants:
            mixed[name] = case.tensors()[name].copy()  # as torch.compile wants its inputs
    want, wants = expected(case, given, grad_output)
    out = function(mixed)
    assert_close(out, want)
    out.backward(grad_output)
    for name, got in gradients(given).items():
        assert_close(got, wants[name])
    raw = case.backward({n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in mixed.items()}, grad_output)
    for name, got in raw.items():
        assert_close(got, wants[name])


@pytest.mark.parametrize("case", WITH_CONSTANTS, ids=str)
def test_only_constants_may_be_of_numpy(case: Case) -> None:
    given = tensors(case, grad=False)
    first = next(iter(given))
    for name in set(given) - {first, *case.op.constants}:
        if given[name] is not None:
            with pytest.raises(TypeError, match=f"{case.op.name}: all tensors must be of one framework"):
                case.forward({**given, name: double(given[name])})
    meta = {name: None if t is None else t.to("meta") for name, t in given.items()}
    for name in case.op.constants:
        assert case.forward({**meta, name: np.asarray(given[name])}).is_meta
        with pytest.raises(ValueError, match=f"{case.op.name}: all tensors must be on one device"):
            case.forward({**meta, name: given[name]})


@pytest.mark.parametrize(
    "convert", [lambda t: t.to_sparse(), lambda t: t.detach().float().to_mkldnn()], ids=["sparse", "mkldnn"]
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_refuses_other_kinds_of_tensors(case: Case, grad: bool, convert: Any) -> None:
    given, grad_output = tensors(case, grad=grad), to_torch(case.grad_output())
    name = next(iter(given))
    other = {**given, name: convert(given[name])}
    message = (
        f"tensors must be dense ones on a CPU or CUDA device, got .*{name}: {other[name].dtype}, {other[name].layout}"
    )
    with pytest.raises(TypeError, match=f"{case.op.name}: {message}"):
        case.forward(other)
    with pytest.raises(TypeError, match=f"{case.op.name}_backward: {message}"):
        case.backward(other, grad_output)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_checkpointing(case: Case) -> None:
    from torch.utils.checkpoint import checkpoint

    given = differentiable(case)
    leaves = [t.detach().requires_grad_() for t in given.values()]
    checkpoint(loss_of(case, given), *leaves, use_reentrant=False).backward()
    want = case.backward(tensors(case, grad=False), to_torch(case.grad_output()))
    for name, leaf in zip(given, leaves, strict=True):
        assert_close(leaf.grad, double(want[name]))
