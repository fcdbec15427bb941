"""The torch and JAX adapters against the NumPy pair, and what each framework expects of a citizen."""

from __future__ import annotations

import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import cudcn
import cudcn.jax
import cudcn.torch
from cudcn.op import Op
from cudcn.ops.deform_conv2d import OP

NAMES = tuple(OP.tensors)
TORCH_OPS = torch.ops.cudcn
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# groups and offset groups, asymmetric padding, and the two pairs unequal
ATTRIBUTES = {"stride": (1, 2), "padding": ((2, 0), (0, 1)), "dilation": (2, 1)}
SHAPES = {
    "input": (2, 4, 6, 7),
    "offset": (2, 36, 4, 3),
    "weight": (6, 2, 3, 3),
    "bias": (6,),
    "mask": (2, 18, 4, 3),
}
VERSIONS = {
    "v1": ("input", "offset", "weight"),
    "v1_bias": NAMES[:4],
    "v2": NAMES,
    "v2_no_bias": (*NAMES[:3], "mask"),
}
LAYOUTS = ("NCHW", "NHWC")
SECOND = "deform_conv2d: the second derivative is not implemented"


@pytest.fixture(autouse=True, scope="module")
def _x64() -> Any:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def arrays(version: str = "v2", layout: str = "NCHW", dtype: Any = np.float64, batch: int = 2) -> list[Any]:
    rng = np.random.default_rng(0)
    result: list[Any] = []
    for name, shape in SHAPES.items():
        data = rng.standard_normal(shape)
        if name in ("input", "offset", "mask"):
            data = data[:batch]
            data = np.ascontiguousarray(data.transpose(0, 2, 3, 1)) if layout == "NHWC" else data
        result.append(data.astype(dtype) if name in VERSIONS[version] else None)
    return result


def tensors(*args: Any, device: str = "cpu", grad: bool = True, **kwargs: Any) -> list[Any]:
    return [None if a is None else to_torch(a).to(device).requires_grad_(grad) for a in arrays(*args, **kwargs)]


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_jax(*args: Any, **kwargs: Any) -> list[Any]:
    return [None if a is None else jnp.asarray(a) for a in arrays(*args, **kwargs)]


def double(tensor: Any) -> Any:
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().cpu().double().numpy()
    return None if tensor is None else np.asarray(tensor).astype(np.float64)


def reference(layout: str, given: list[Any]) -> tuple[np.ndarray, np.ndarray, Any]:
    """Output, its gradient and the tensors' gradients, in float64 from the tensors' own values."""
    given = [double(t) for t in given]
    out = cudcn.deform_conv2d(*given, **ATTRIBUTES, layout=layout)
    grad = np.random.default_rng(1).standard_normal(out.shape)
    return out, grad, cudcn.deform_conv2d_backward(grad, *given, **ATTRIBUTES, layout=layout)


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    if want is None:
        assert got is None
    else:
        got = double(got)
        assert got.shape == want.shape
        assert np.abs(got - want).max(initial=0) <= tolerance * max(1, np.abs(want).max(initial=0))


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


# ---- torch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_torch_agrees_with_numpy(version: str, layout: str, device: str) -> None:
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
def test_torch_cuda_runs_on_the_current_stream() -> None:
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
def test_torch_dtypes(dtype: str, tolerance: float) -> None:
    given = tensors("v2", dtype=DTYPES[dtype])
    out, grad, _ = reference("NCHW", given)
    got = cudcn.deform_conv2d(*given, **ATTRIBUTES)
    assert got.dtype == getattr(torch, dtype)
    assert_close(got, out, tolerance)
    got.backward(torch.from_numpy(grad).to(got.dtype))
    assert [t.grad.dtype for t in given] == [got.dtype] * 5


def test_torch_takes_views_as_they_are() -> None:
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
def test_torch_opcheck(version: str) -> None:
    torch.library.opcheck(TORCH_OPS.deform_conv2d.default, (*tensors(version), *flat(**ATTRIBUTES)))
    given = tensors(version, grad=False)
    grad = torch.ones_like(cudcn.deform_conv2d(*given, **ATTRIBUTES))
    needs = [t is not None and name != "offset" for name, t in zip(NAMES, given, strict=True)]
    torch.library.opcheck(TORCH_OPS.deform_conv2d_backward.default, (grad, *given, *flat(**ATTRIBUTES), needs))


@pytest.mark.parametrize("version", VERSIONS)
def test_torch_gradcheck(version: str) -> None:
    given = tensors(version)
    assert torch.autograd.gradcheck(
        lambda *t: cudcn.torch.deform_conv2d(*t, **ATTRIBUTES), given, fast_mode=version != "v2"
    )


@pytest.mark.parametrize("wanted", [("input",), ("offset", "mask"), ("weight", "bias"), NAMES])
def test_torch_computes_only_wanted_gradients(wanted: tuple[str, ...], computed: list[list[bool]]) -> None:
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
def test_torch_compile(function: Any, dynamic: bool) -> None:
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


def test_torch_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *t: torch.Tensor) -> Any:
            return cudcn.deform_conv2d(*t, **ATTRIBUTES)

    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Model(), tuple(tensors(grad=False)), dynamic_shapes={"t": (batch, batch, None, None, batch)}
    )
    given = tensors(batch=1, grad=False)
    assert_close(program.module()(*given), double(cudcn.deform_conv2d(*given, **ATTRIBUTES)))


def test_torch_without_gradients() -> None:
    with torch.no_grad():
        assert not cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).requires_grad
    with torch.inference_mode():
        assert cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).is_inference()


def test_torch_refuses_the_second_derivative() -> None:
    given = tensors()
    (grad,) = torch.autograd.grad(cudcn.deform_conv2d(*given, **ATTRIBUTES).sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        grad.sum().backward()


def test_torch_empty_batch() -> None:
    given = tensors(batch=0)
    out = cudcn.deform_conv2d(*given, **ATTRIBUTES)
    assert out.shape == (0, 6, 4, 3)
    out.sum().backward()
    assert [t.grad.shape for t in given] == [t.shape for t in given]
    assert not given[2].grad.any()


def test_torch_refusals() -> None:
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


def test_torch_autocast() -> None:
    given = [t.detach().float().requires_grad_() for t in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        out = cudcn.deform_conv2d(*given, **ATTRIBUTES)
        assert cudcn.deform_conv2d(*tensors(), **ATTRIBUTES).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    half = [t if name in OP.fine else t.bfloat16() for name, t in zip(NAMES, given, strict=True)]
    assert torch.equal(out, cudcn.deform_conv2d(*half, **ATTRIBUTES))  # offset and mask kept their float32
    out.sum().backward()
    assert [t.grad.dtype for t in given] == [torch.float32] * 5


def test_torch_threads() -> None:
    want = double(cudcn.deform_conv2d(*tensors(), **ATTRIBUTES))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: cudcn.deform_conv2d(*tensors(), **ATTRIBUTES), range(16)):
            assert_close(out, want)


def test_torch_module() -> None:
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


def test_torch_modulated_module() -> None:
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


# ---- JAX


def convolve(*given: Any, layout: str = "NCHW") -> Any:
    return cudcn.deform_conv2d(*given, **ATTRIBUTES, layout=layout)


def total(*given: Any) -> Any:
    return (convolve(*given) ** 2).sum()


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_jax_agrees_with_numpy(version: str, layout: str, device: str) -> None:
    with jax.default_device(jax.devices(device)[0]):
        given = to_jax(version, layout)
        out, grad, grads = reference(layout, given)
        got, vjp = jax.vjp(lambda *t: convolve(*t, layout=layout), *given)
        jitted = jax.jit(convolve, static_argnames="layout")(*given, layout=layout)
        assert isinstance(jitted, jax.Array)
        assert_close(got, out)
        assert_close(jitted, out)
        backward = cudcn.deform_conv2d_backward(jnp.asarray(grad), *given, **ATTRIBUTES, layout=layout)
        assert isinstance(backward, OP.gradients)
        for a, b, want in zip(vjp(jnp.asarray(grad)), backward, grads, strict=True):
            assert_close(a, want)
            assert_close(b, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", 3e-2), ("float32", 1e-5)])
def test_jax_dtypes(dtype: str, tolerance: float) -> None:
    given = to_jax(dtype=DTYPES[dtype])
    out, grad, _ = reference("NCHW", given)
    got, vjp = jax.vjp(convolve, *given)
    assert got.dtype == dtype
    assert_close(got, out, tolerance)
    assert [g.dtype for g in vjp(jnp.asarray(grad, dtype))] == [jnp.dtype(dtype)] * 5


@pytest.mark.parametrize("version", VERSIONS)
def test_jax_check_grads(version: str) -> None:
    given = to_jax(version)
    present = [t for t in given if t is not None]

    def function(*t: Any) -> Any:
        rest = iter(t)
        return convolve(*(None if g is None else next(rest) for g in given))

    check_grads(function, present, order=1, modes=["rev"])


@pytest.mark.parametrize("order", [(0, 1, 4), (4, (1, 2), 0), ((0, 1, 2, 3, 4), 3, 2)])
def test_jax_gradients_under_every_transformation(order: tuple[Any, ...]) -> None:
    """In changing order: what one differentiation needs must not stick to the next."""
    given = to_jax()
    images = jnp.stack([given[0], 2 * given[0]])
    each = [jax.grad(total, (0, 1, 2, 3, 4))(image, *given[1:]) for image in images]

    def batched(*t: Any) -> Any:
        return jax.vmap(total, in_axes=(0, None, None, None, None))(jnp.stack([t[0], 2 * t[0]]), *t[1:]).sum()

    def looped(*t: Any) -> Any:
        return jax.lax.map(lambda image: total(image, *t[1:]), jnp.stack([t[0], 2 * t[0]])).sum()

    def chosen(*t: Any) -> Any:
        return jax.lax.cond(t[0].sum() < 1e9, total, lambda *t: t[0].sum(), *t)

    double_want = [a + (2 * b if i == 0 else b) for i, (a, b) in enumerate(zip(*each, strict=True))]
    for function, want in [
        (total, each[0]), (jax.jit(total), each[0]), (jax.checkpoint(total), each[0]), (chosen, each[0]),
        (batched, double_want), (jax.jit(batched), double_want), (looped, double_want),
    ]:  # fmt: skip
        for argnums in order:
            for transform in (lambda f: f, jax.jit):
                got = transform(jax.grad(function, argnums))(*given)
                for i, g in zip(np.atleast_1d(argnums), got if isinstance(argnums, tuple) else [got], strict=True):
                    assert_close(g, np.asarray(want[i]))


def test_jax_value_and_grad_without_optional_tensors() -> None:
    given = to_jax("v1")
    value, grads = jax.jit(jax.value_and_grad(total, (0, 2)))(*given)
    assert_close(value, np.asarray(total(*given)))
    assert [g.shape for g in grads] == [given[0].shape, given[2].shape]


def test_jax_many_attributes() -> None:
    """jax-tvm-ffi frees long string attributes too early; ours must arrive, whatever their length."""
    given = to_jax("v1")
    for padding in (0, 1, 12, 123, ((0, 1), (2, 3)), ((12, 34), (5, 67))):
        height, width = (
            np.add((6, 7), np.sum(np.broadcast_to(OP.canonical(padding=padding)["padding"], 4).reshape(2, 2), 1)) - 2
        )
        offset = jnp.zeros((2, 36, height, width))
        got = cudcn.deform_conv2d(given[0], offset, given[2], padding=padding)
        want = cudcn.deform_conv2d(*(np.asarray(t) for t in (given[0], offset, given[2])), padding=padding)
        assert_close(got, want)


def test_jax_empty_batch() -> None:
    given = to_jax(batch=0)
    assert convolve(*given).shape == (0, 6, 4, 3)
    grads = jax.grad(total, (0, 1, 2, 3, 4))(*given)
    assert [g.shape for g in grads] == [g.shape for g in given]
    assert not grads[2].any()


def test_jax_refusals() -> None:
    given = to_jax()
    with pytest.raises(ValueError, match=r"offset must be \(N, 36, H_out, W_out\)"):
        jax.jit(cudcn.jax.deform_conv2d)(*given)
    with pytest.raises(NotImplementedError, match=SECOND):
        jax.grad(lambda x: jax.grad(total)(x, *given[1:]).sum())(given[0])
    with pytest.raises(TypeError, match="all tensors must be of one framework"):
        convolve(np.asarray(given[0]), *given[1:])
    with pytest.raises(TypeError, match=r"cudcn\.jax takes tensors of jax, got torch"):
        cudcn.jax.deform_conv2d(*tensors(), **ATTRIBUTES)
    with pytest.raises(ValueError, match="grad_output must have the output's shape and dtype"):
        cudcn.jax.deform_conv2d_backward(jnp.ones(3), *given, **ATTRIBUTES)


def test_jax_reports_what_fails_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the reason")

    monkeypatch.setattr(Op, "forward", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the reason"):
        jax.block_until_ready(jax.jit(convolve)(*to_jax()))


def test_jax_threads() -> None:
    given = to_jax()
    want = np.asarray(convolve(*given))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: jax.jit(convolve)(*given), range(16)):
            assert_close(out, want)


def test_jax_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_tvm_ffi", None)
    for name in ("cudcn.jax", "cudcn.jax.bind"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cudcn, "jax")
    with pytest.raises(ImportError, match=r'pip install "cudcn\[jax\]"'):
        convolve(*to_jax())


# ---- both


@pytest.mark.parametrize("adapter", [cudcn.torch, cudcn.jax])
def test_functions_introduce_themselves(adapter: Any) -> None:
    assert adapter.deform_conv2d.__name__ == "deform_conv2d"
    assert adapter.deform_conv2d_backward.__name__ == "deform_conv2d_backward"
    assert inspect.signature(adapter.deform_conv2d) == inspect.signature(cudcn.deform_conv2d)
    got = inspect.signature(adapter.deform_conv2d_backward)
    assert str(got) == str(inspect.signature(cudcn.deform_conv2d_backward))
    assert adapter.deform_conv2d.__doc__ == cudcn.deform_conv2d.__doc__
    assert adapter.deform_conv2d_backward.__doc__


@pytest.mark.parametrize("convert", [tensors, to_jax])
def test_tensors_by_name(convert: Any) -> None:
    given = convert()
    adapter = cudcn.torch if convert is tensors else cudcn.jax
    want = double(adapter.deform_conv2d(*given, **ATTRIBUTES))
    by_name = dict(zip(NAMES, given, strict=True))
    assert_close(adapter.deform_conv2d(**by_name, **ATTRIBUTES), want)
    assert_close(adapter.deform_conv2d(given[0], **dict(list(by_name.items())[1:]), **ATTRIBUTES), want)
