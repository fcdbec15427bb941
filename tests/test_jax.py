"""The JAX adapter against the NumPy pair, and what JAX expects of a function."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from adapter_cases import (
    ATTRIBUTES,
    DTYPES,
    LAYOUTS,
    SECOND,
    VERSIONS,
    arrays,
    assert_close,
    check_introduction,
    check_tensors_by_name,
    reference,
)

import cudcn
from cudcn.op import Op
from cudcn.ops.deform_conv2d import OP

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")
import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import cudcn.jax  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _x64() -> Any:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def to_jax(*args: Any, **kwargs: Any) -> list[Any]:
    return [None if a is None else jnp.asarray(a) for a in arrays(*args, **kwargs)]


def convolve(*given: Any, layout: str = "NCHW") -> Any:
    return cudcn.deform_conv2d(*given, **ATTRIBUTES, layout=layout)


def total(*given: Any) -> Any:
    return (convolve(*given) ** 2).sum()


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_agrees_with_numpy(version: str, layout: str, device: str) -> None:
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
def test_dtypes(dtype: str, tolerance: float) -> None:
    given = to_jax(dtype=DTYPES[dtype])
    out, grad, _ = reference("NCHW", given)
    got, vjp = jax.vjp(convolve, *given)
    assert got.dtype == dtype
    assert_close(got, out, tolerance)
    assert [g.dtype for g in vjp(jnp.asarray(grad, dtype))] == [jnp.dtype(dtype)] * 5


@pytest.mark.parametrize("version", VERSIONS)
def test_check_grads(version: str) -> None:
    given = to_jax(version)
    present = [t for t in given if t is not None]

    def function(*t: Any) -> Any:
        rest = iter(t)
        return convolve(*(None if g is None else next(rest) for g in given))

    check_grads(function, present, order=1, modes=["rev"])


@pytest.mark.parametrize("order", [(0, 1, 4), (4, (1, 2), 0), ((0, 1, 2, 3, 4), 3, 2)])
def test_gradients_under_every_transformation(order: tuple[Any, ...]) -> None:
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


def test_value_and_grad_without_optional_tensors() -> None:
    given = to_jax("v1")
    value, grads = jax.jit(jax.value_and_grad(total, (0, 2)))(*given)
    assert_close(value, np.asarray(total(*given)))
    assert [g.shape for g in grads] == [given[0].shape, given[2].shape]


def test_many_attributes() -> None:
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


def test_empty_batch() -> None:
    given = to_jax(batch=0)
    assert convolve(*given).shape == (0, 6, 4, 3)
    grads = jax.grad(total, (0, 1, 2, 3, 4))(*given)
    assert [g.shape for g in grads] == [g.shape for g in given]
    assert not grads[2].any()


def test_refusals() -> None:
    given = to_jax()
    with pytest.raises(ValueError, match=r"offset must be \(N, 36, H_out, W_out\)"):
        jax.jit(cudcn.jax.deform_conv2d)(*given)
    with pytest.raises(NotImplementedError, match=SECOND):
        jax.grad(lambda x: jax.grad(total)(x, *given[1:]).sum())(given[0])
    with pytest.raises(TypeError, match="all tensors must be of one framework"):
        convolve(np.asarray(given[0]), *given[1:])
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"cudcn\.jax takes tensors of jax, got torch"):
        cudcn.jax.deform_conv2d(*(torch.from_numpy(a) for a in arrays()), **ATTRIBUTES)
    with pytest.raises(ValueError, match="grad_output must have the output's shape and dtype"):
        cudcn.jax.deform_conv2d_backward(jnp.ones(3), *given, **ATTRIBUTES)


def test_reports_what_fails_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the reason")

    monkeypatch.setattr(Op, "forward", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the reason"):
        jax.block_until_ready(jax.jit(convolve)(*to_jax()))


def test_threads() -> None:
    given = to_jax()
    want = np.asarray(convolve(*given))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: jax.jit(convolve)(*given), range(16)):
            assert_close(out, want)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_tvm_ffi", None)
    for name in ("cudcn.jax", "cudcn.jax.bind"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cudcn, "jax")
    with pytest.raises(ImportError, match=r'pip install "cudcn\[jax\]"'):
        convolve(*to_jax())


def test_functions_introduce_themselves() -> None:
    check_introduction(cudcn.jax)


def test_tensors_by_name() -> None:
    check_tensors_by_name(cudcn.jax, to_jax())
