"""The torch adapter against the NumPy pair, and what torch expects of an operator."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import (
    ATTRIBUTES,
    DTYPES,
    LAYOUTS,
    NAMES,
    SECOND,
    VERSIONS,
    arrays,
    assert_close,
    check_introduction,
    check_tensors_by_name,
    double,
    reference,
)

import cudcn
from cudcn.op import Op
from cudcn.ops.deform_conv2d import OP

torch = pytest.importorskip("torch")
import cudcn.torch  # noqa: E402

TORCH_OPS = torch.ops.cudcn


def tensors(*args: Any, device: str = "cpu", grad: bool = True, **kwargs: Any) -> list[Any]:
    return [None if a is None else to_torch(a).to(device).requires_grad_(grad) for a in arrays(*args, **kwargs)]


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def flat(**attributes: Any) -> list[Any]:
    """The attributes as the torch operators take them."""
    return [list(v) if isinstance(v, tuple) else v for v in OP.canonical(**attributes).values()]


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
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_agrees_with_numpy(version: str, layout: str, device: str) -> None:
    given = tensors(version, layout, device=device)
    out, grad, grads = reference(layout, given)
    got = cudcn.deform_conv2d(*given, **ATTRIBUTES, layout=layout)
    assert_close(got, out)
    assert got.is_contiguous()
    got.backward(torch.from_numpy(grad).to(device))
    for tensor, want in zip(given, grads, strict=True):
        assert_close(None if tensor is None else tensor.grad, want)
    again = cudcn.deform_conv2d_backward(
        torch.from_numpy(grad).to(device),
        *tensors(version, layout, device=device),
        **ATTRIBUTES,
        layout=layout,
    )
    assert isinstance(again, OP.gradients)
    for got_grad, want in zip(again, grads, strict=True):
        assert_close(got_grad, want)


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    given = tensors("v2", device="cuda")
    out, grad, grads = reference("NCHW", given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensor in given:
            torch.cuda._sleep(10_000_000)  # a call on another stream would overtake this
            tensor.data.mul_(2)
            tensor.data.div_(2)
        got = cudcn.deform_conv2d(*given, **ATTRIBUTES)
        got.backward(torch.from_numpy(grad).cuda())
    stream.synchronize()
    assert_close(got, out)
    for tensor, want in zip(given, grads, strict=True):
        assert_close(tensor.grad, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", 3e-2), ("float32", 1e-5)])
def test_dtypes(dtype: str, tolerance: float) -> None:
    given = tensors("v2", dtype=DTYPES[dtype])
    out, grad, _ = reference("NCHW", given)
    got = cudcn.deform_conv2d(*given, **ATTRIBUTES)
    assert got.dtype == getattr(torch, dtype)
    assert_close(got, out, tolerance)
    got.backward(torch.from_numpy(grad).to(got.dtype))
    assert [t.grad.dtype for t in given] == [got.dtype] * 5


def test_takes_views_as_they_are() -> None:
    given = tensors("v2", grad=False)
    strided = [torch.stack([t, t], -1)[..., 0] for t in given]
    strided[0] = given[0].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    assert not any(t.is_contiguous() for t in strided)
    out, grad, grads = reference("NCHW", given)
    assert_close(cudcn.deform_conv2d(*strided, **ATTRIBUTES), out)
    got = cudcn.deform_conv2d_backward(torch.from_numpy(grad), *strided, **ATTRIBUTES)
    for got_grad, want in zip(got, grads, strict=True):
        assert_close(got_grad, want)
    negated = torch.complex(given[0], -given[0]).conj().imag  # negation that torch has only noted down
    assert negated.is_neg()
    assert_close(cudcn.deform_conv2d(negated, *given[1:], **ATTRIBUTES), out)


@pytest.mark.parametrize("version", VERSIONS)
def test_opcheck(version: str) -> None:
    torch.library.opcheck(TORCH_OPS.deform_conv2d.default, (*tensors(version), *flat(**ATTRIBUTES)))
    given = tensors(version, grad=False)
    grad = torch.ones_like(cudcn.deform_conv2d(*given, **ATTRIBUTES))
    needs = [t is not None and name != "offset" for name, t in zip(NAMES, given, strict=True)]
    torch.library.opcheck(TORCH_OPS.deform_conv2d_backward.default, (grad, *given, *flat(**ATTRIBUTES), needs))


@pytest.mark.parametrize("version", VERSIONS)
def test_gradcheck(version: str) -> None:
    given = tensors(version)
    assert torch.autograd.gradcheck(
        lambda *t: cudcn.torch.deform_conv2d(*t, **ATTRIBUTES), given, fast_mode=version != "v2"
    )


@pytest.mark.parametrize("wanted", [("input",), ("offset", "mask"), ("weight", "bias"), NAMES])
def test_computes_only_wanted_gradients(wanted: tuple[str, ...], computed: list[list[bool]]) -> None:
    given = tensors("v2")
    _, grad, grads = reference("NCHW", given)
    computed.clear()
    for name, tensor in zip(NAMES, given, strict=True):
        tensor.requires_grad_(name in wanted)
    cudcn.deform_conv2d(*given, **ATTRIBUTES).backward(torch.from_numpy(grad))
    assert computed == [[name in wanted for name in NAMES]]
    for name, tensor, want in zip(NAMES, given, grads, strict=True):
        assert_close(tensor.grad, want if name in wanted else None)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [cudcn.deform_conv2d, cudcn.torch.deform_conv2d])
def test_compile(function: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: function(*t, **ATTRIBUTES).square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for batch in (2, 1):
        given, again = tensors(batch=batch), tensors(batch=batch)
        compiled(*given).backward()
        cudcn.torch.deform_conv2d(*again, **ATTRIBUTES).square().sum().backward()
        for a, b in zip(given, again, strict=True):
            assert_close(a.grad, b.grad.numpy())


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *t: torch.Tensor) -> Any:
            return cudcn.deform_conv2d(*t, **ATTRIBUTES)

    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Model(), tuple(tensors(grad=False)), dynamic_shapes={"t": (batch, batch, None, None, batch)}
    )
    given = tensors(batch=1, grad=False)
    assert_close(program.module()(*given), double(cudcn.deform_conv2d(*given, **ATTRIBUTES)))


def test_without_gradients() -> None:
    with torch.no_grad():
        assert not cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).requires_grad
    with torch.inference_mode():
        assert cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).is_inference()


def test_refuses_the_second_derivative() -> None:
    given = tensors()
    (grad,) = torch.autograd.grad(cudcn.deform_conv2d(*given, **ATTRIBUTES).sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        grad.sum().backward()


def test_empty_batch() -> None:
    given = tensors(batch=0)
    out = cudcn.deform_conv2d(*given, **ATTRIBUTES)
    assert out.shape == (0, 6, 4, 3)
    out.sum().backward()
    assert [t.grad.shape for t in given] == [t.shape for t in given]
    assert not given[2].grad.any()


def test_refusals() -> None:
    given = tensors()
    with pytest.raises(ValueError, match="deform_conv2d: all tensors must be on one device, got input: meta"):
        cudcn.torch.deform_conv2d(given[0].to("meta"), *given[1:], **ATTRIBUTES)
    with pytest.raises(TypeError, match="all tensors must be of one framework, got input: numpy, offset: torch"):
        cudcn.torch.deform_conv2d(arrays()[0], *given[1:], **ATTRIBUTES)
    with pytest.raises(TypeError, match=r"cudcn\.torch takes tensors of torch, got numpy"):
        cudcn.torch.deform_conv2d(*arrays(), **ATTRIBUTES)
    with pytest.raises(TypeError, match="weight is required"):
        cudcn.torch.deform_conv2d(*given[:2])
    with pytest.raises(TypeError, match="takes 5 tensors by position, got 6"):
        cudcn.torch.deform_conv2d(*given, given[0])
    with pytest.raises(ValueError, match=r"offset must be \(N, 36, H_out, W_out\)"):
        cudcn.torch.deform_conv2d(*given)
    with pytest.raises(ValueError, match="grad_output must have the output's shape and dtype"):
        cudcn.torch.deform_conv2d_backward(torch.ones(3), *given, **ATTRIBUTES)
    with pytest.raises(TypeError, match=r"input must be float16, .*, got int64"):
        cudcn.torch.deform_conv2d(given[0].long(), *given[1:], **ATTRIBUTES)


def test_autocast() -> None:
    given = [t.detach().float().requires_grad_() for t in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        out = cudcn.deform_conv2d(*given, **ATTRIBUTES)
        assert cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    half = [t if name in OP.fine else t.bfloat16() for name, t in zip(NAMES, given, strict=True)]
    assert torch.equal(out, cudcn.deform_conv2d(*half, **ATTRIBUTES))  # offset and mask kept their float32
    out.sum().backward()
    assert [t.grad.dtype for t in given] == [torch.float32] * 5


def test_threads() -> None:
    want = double(cudcn.deform_conv2d(*tensors(), **ATTRIBUTES))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: cudcn.deform_conv2d(*tensors(), **ATTRIBUTES), range(16)):
            assert_close(out, want)


def test_module() -> None:
    module = cudcn.torch.DeformConv2d(4, 6, 3, padding=((2, 0), (0, 1)), stride=(1, 2), dilation=(2, 1), groups=2)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "weight": (6, 2, 3, 3),
        "bias": (6,),
    }
    input, offset, _, _, mask = (t.float() for t in tensors(grad=False))
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


def test_functions_introduce_themselves() -> None:
    check_introduction(cudcn.torch)


def test_tensors_by_name() -> None:
    check_tensors_by_name(cudcn.torch, tensors())


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(sys.modules, "cudcn.torch.bind")
    with pytest.raises(ImportError, match=r'pip install "cudcn\[torch\]"'):
        importlib.import_module("cudcn.torch.bind")
