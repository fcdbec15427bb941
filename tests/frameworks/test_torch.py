"""The torch adapter against the NumPy pair, and what torch expects of an operator."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import ADAPTED, EACH, deform_conv2d
from cases.case import HALVES, Case, error
from frameworks.comparing import (
    PLAIN,
    assert_close,
    check_introduction,
    check_missing_arguments,
    check_tensors_by_position,
    double,
    expected,
)

import cudcn
from cudcn.cpu import parallel
from cudcn.op import Op

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import differentiable, flat, gradients, overload, tensors, to_torch  # noqa: E402

import cudcn.torch  # noqa: E402

ATTRIBUTES = PLAIN.attributes


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Which gradients each call of the raw backward is asked for."""
    seen: list[list[bool]] = []
    original = Op.backward

    def spy(self: Op, geometry: Any, grads: Any, *rest: Any, **known: Any) -> None:
        seen.append([grad is not None for grad in grads])
        original(self, geometry, grads, *rest, **known)

    monkeypatch.setattr(Op, "backward", spy)
    return seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ADAPTED, ids=str)
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
    for name in case.op.non_differentiable:
        if given[name].is_floating_point():
            given[name].requires_grad_()
    case.forward(given).sum().backward()
    assert all(given[name].grad is None for name in case.op.non_differentiable)


def test_without_gradients() -> None:
    with torch.no_grad():
        assert not PLAIN.forward(tensors()).requires_grad
    with torch.inference_mode():
        assert PLAIN.forward(tensors()).is_inference()


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
        n: t.bfloat16() if t is not None and t.is_floating_point() and n not in case.op.may_be_float32 else t
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


WITH_CONSTANTS = [case for case in EACH if case.op.non_differentiable]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", WITH_CONSTANTS, ids=str)
def test_constants_of_numpy(case: Case, compiled: bool) -> None:
    given, grad_output = tensors(case), to_torch(case.grad_output())
    mixed = dict(given)
    for name in case.op.non_differentiable:
        constant = case.tensors()[name]
        mixed[name] = constant[::-1].astype(constant.dtype.newbyteorder(">"))[::-1]  # which torch takes no view of
        mixed[name].flags.writeable = False
    function = case.forward
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(case.forward, fullgraph=True, backend="aot_eager")
        for name in case.op.non_differentiable:
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


@pytest.mark.parametrize("dtype", [object, "U1", "M8[s]", bool, complex])
@pytest.mark.parametrize("case", WITH_CONSTANTS, ids=str)
def test_constants_are_numbers(case: Case, dtype: Any) -> None:
    mixed = {**tensors(case), case.op.non_differentiable[0]: np.zeros((2, 5), dtype)}
    rule = f"{case.op.non_differentiable[0]} must be of integers or floats, got {np.dtype(dtype)}"
    with pytest.raises(TypeError, match=re.escape(f"{case.op.name}: {rule}")):
        case.forward(mixed)
    with pytest.raises(TypeError, match=re.escape(f"{case.op.name}_backward: {rule}")):
        case.backward(mixed, to_torch(case.grad_output()))


def test_a_constant_of_bfloat16() -> None:
    case = next(case for case in WITH_CONSTANTS if "rois" in case.op.tensors)
    given = {n: None if t is None else to_torch(t) for n, t in case.tensors("bfloat16").items()}
    assert torch.equal(case.forward({**given, "rois": case.tensors("bfloat16")["rois"]}), case.forward(given))


@pytest.mark.usefixtures("emulated")
def test_tf32_is_torchs_choice() -> None:
    case = deform_conv2d.BY_NAME["plain v2 NCHW"]
    given = tensors(case, "float32", grad=False)
    exact = case.forward(given)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = case.forward(given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(case.forward(given), exact)
    assert 1e-5 < error(rounded, exact) < 1e-3


def test_a_first_call_may_be_compiled() -> None:
    """In a process that has not imported cudcn.torch yet, whose first call is traced."""
    code = (
        "import torch, cudcn; f = torch.compile(lambda *t: cudcn.deform_conv2d(*t), fullgraph=True, backend='eager'); "
        "print(f(torch.ones(1, 2, 4, 4), torch.zeros(1, 18, 2, 2), torch.ones(3, 2, 3, 3)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(4 * 3 * 18.0), done.stderr


@pytest.mark.parametrize("case", WITH_CONSTANTS, ids=str)
def test_only_constants_may_be_of_numpy(case: Case) -> None:
    given = tensors(case, grad=False)
    first = next(iter(given))
    for name in set(given) - {first, *case.op.non_differentiable}:
        if given[name] is not None:
            with pytest.raises(TypeError, match=f"{case.op.name}: all tensors must be of one framework"):
                case.forward({**given, name: double(given[name])})
    meta = {name: None if t is None else t.to("meta") for name, t in given.items()}
    for name in case.op.non_differentiable:
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
