"""The JAX adapter against the NumPy pair, and what JAX expects of a function."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from adapter_cases import (
    CASES,
    EACH,
    PLAIN,
    SECOND,
    assert_close,
    check_introduction,
    check_missing_attribute,
    check_tensors_by_position,
    expected,
)
from operator_case import HALVES, Case, Tensors

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


ATTRIBUTES = PLAIN.attributes


def tensors(case: Case = PLAIN, dtype: str = "float64") -> Tensors:
    return {name: None if t is None else jnp.asarray(t) for name, t in case.tensors(dtype).items()}


def to_jax(case: Case = PLAIN) -> list[Any]:
    return [*tensors(case).values()]


def convolve(*given: Any) -> Any:
    return cudcn.deform_conv2d(*given, **ATTRIBUTES)


def total(*given: Any) -> Any:
    return (convolve(*given) ** 2).sum()


def differentiable(case: Case, given: Tensors) -> Tensors:
    return {name: t for name, t in given.items() if t is not None and name not in case.op.constants}


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_numpy(case: Case, device: str) -> None:
    with jax.default_device(jax.devices(device)[0]):
        given, grad_output = tensors(case), jnp.asarray(case.grad_output())
        want, wants = expected(case, given, grad_output)
        variables = differentiable(case, given)
        out, vjp = jax.vjp(lambda t: case.forward({**given, **t}), variables)
        jitted = jax.jit(case.forward)(given)
        assert isinstance(jitted, jax.Array)
        assert_close(out, want)
        assert_close(jitted, want)
        raw = getattr(cudcn, f"{case.op.name}_backward")(grad_output, **given, **case.attributes)
        assert isinstance(raw, case.op.gradients)
        (grads,) = vjp(grad_output)
        for name in given:
            assert_close(grads.get(name), wants[name])
            assert_close(getattr(raw, name), wants[name])


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_dtypes(case: Case, dtype: str) -> None:
    given, grad_output = tensors(case, dtype), jnp.asarray(case.grad_output(dtype))
    want, wants = expected(case, given, grad_output)
    out, vjp = jax.vjp(lambda t: case.forward({**given, **t}), differentiable(case, given))
    assert out.dtype == dtype
    case.close(out, want, dtype)
    for name, got in vjp(grad_output)[0].items():
        assert got.dtype == dtype
        case.close(got, wants[name], dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_grads(case: Case) -> None:
    given = {name: None if t is None else jnp.asarray(t) for name, t in case.smooth(dict(case.tensors())).items()}

    def function(t: Tensors) -> Any:  # check_grads passes NumPy arrays
        return case.forward({**given, **jax.tree.map(jnp.asarray, t)})

    check_grads(function, (differentiable(case, given),), order=1, modes=["rev"])


@pytest.mark.parametrize("case", EACH, ids=str)
def test_gradients_of_all_tensors(case: Case) -> None:
    """Those that have none get zeros, if they are of floats, as JAX has it."""
    given = tensors(case)
    floats = {name: t for name, t in given.items() if t is not None and jnp.issubdtype(t.dtype, jnp.floating)}
    grads = jax.jit(jax.grad(lambda t: case.forward({**given, **t}).sum()))(floats)
    for name in case.op.constants:
        assert name not in floats or not grads[name].any()


@pytest.mark.parametrize("case", EACH, ids=str)
def test_vmap(case: Case) -> None:
    given = differentiable(case, tensors(case))
    batched = {name: jnp.stack([t, 2 * t]) for name, t in given.items()}
    constants = {name: t for name, t in tensors(case).items() if name not in given}

    def call(t: Tensors) -> Any:
        return case.forward({**constants, **t})

    def loss(t: Tensors) -> Any:
        return (call(t) ** 2).sum()

    for transform in (lambda f: f, jax.jit):
        outs, grads = transform(jax.vmap(call))(batched), transform(jax.vmap(jax.grad(loss)))(batched)
        for i in (0, 1):
            one = {name: t[i] for name, t in batched.items()}
            assert_close(outs[i], np.asarray(call(one)))
            for name, want in jax.grad(loss)(one).items():
                assert_close(grads[name][i], np.asarray(want))


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
    given = to_jax(replace(PLAIN, bias=False, mask=False))
    value, grads = jax.jit(jax.value_and_grad(total, (0, 2)))(*given)
    assert_close(value, np.asarray(total(*given)))
    assert [g.shape for g in grads] == [given[0].shape, given[2].shape]


def test_many_attributes() -> None:
    """jax-tvm-ffi frees long string attributes too early; ours must arrive, whatever their length."""
    given = to_jax()
    for padding in (0, 1, 12, 123, ((0, 1), (2, 3)), ((12, 34), (5, 67))):
        height, width = (
            np.add((6, 7), np.sum(np.broadcast_to(OP.canonical(padding=padding)["padding"], 4).reshape(2, 2), 1)) - 2
        )
        offset = jnp.zeros((2, 36, height, width))
        got = cudcn.deform_conv2d(given[0], offset, given[2], padding=padding)
        want = cudcn.deform_conv2d(*(np.asarray(t) for t in (given[0], offset, given[2])), padding=padding)
        assert_close(got, want)


def test_empty_batch() -> None:
    given = to_jax(replace(PLAIN, batch=0))
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
        cudcn.jax.deform_conv2d(*(torch.from_numpy(np.array(t)) for t in to_jax()), **ATTRIBUTES)
    with pytest.raises(ValueError, match="grad_output must have the output's shape and dtype"):
        cudcn.jax.deform_conv2d_backward(jnp.ones(3), *given, **ATTRIBUTES)


def test_reports_what_fails_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the reason")

    monkeypatch.setattr(Op, "forward", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the reason"):
        jax.block_until_ready(jax.jit(convolve)(*to_jax()))


def test_refuses_a_missing_attribute() -> None:
    check_missing_attribute(cudcn.jax, jnp.asarray)


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


@pytest.mark.parametrize("case", EACH, ids=str)
def test_functions_introduce_themselves(case: Case) -> None:
    check_introduction(cudcn.jax, case.op.name)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_tensors_by_position(case: Case) -> None:
    check_tensors_by_position(cudcn.jax, case, lambda t: None if t is None else jnp.asarray(t))
