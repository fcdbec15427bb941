"""The JAX adapter against the NumPy pair, and what JAX expects of a function."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import ADAPTED, EACH
from cases.case import HALVES, Case, Tensors
from frameworks.comparing import (
    PLAIN,
    SECOND,
    assert_close,
    check_introduction,
    check_missing_arguments,
    check_tensors_by_position,
    expected,
)

import cudcn
from cudcn import check
from cudcn.geometry import MOST_LEVELS
from cudcn.op import Op

jax = pytest.importorskip("jax")
jax_tvm_ffi = pytest.importorskip("jax_tvm_ffi")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import cudcn.jax  # noqa: E402
from cudcn.jax.bind import _device, _parsed, _pieces  # noqa: E402


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


def by_name(name: str) -> Case:
    return next(case for case in EACH if case.op.name == name)


def call(case: Case, given: Tensors, **attributes: Any) -> Any:
    return getattr(cudcn, case.op.name)(**given, **{**case.attributes, **attributes})


def differentiable(case: Case, given: Tensors) -> Tensors:
    return {name: t for name, t in given.items() if t is not None and name not in case.op.non_differentiable}


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ADAPTED, ids=str)
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


@pytest.mark.parametrize("case", ADAPTED, ids=str)
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
    for name in case.op.non_differentiable:
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


@pytest.mark.parametrize("case", [case for case in EACH if case.op.non_differentiable], ids=str)
@pytest.mark.parametrize("x64", [True, False])
def test_numpy_constants(case: Case, x64: bool) -> None:
    with jax.enable_x64(x64):
        dtype = "float64" if x64 else "float32"
        constants = {name: case.tensors(dtype)[name] for name in case.op.non_differentiable}
        constants = {name: t.astype(np.int64) if t.dtype.kind == "i" else t for name, t in constants.items()}
        given = {**tensors(case, dtype), **constants}
        grad_output = jnp.asarray(case.grad_output(dtype))
        want, wants = expected(case, given, grad_output)
        variables = differentiable(case, given)
        for transform in (lambda f: f, jax.jit):
            out, vjp = jax.vjp(transform(lambda t: case.forward({**given, **t})), variables)
            case.close(out, want, dtype)
            for grads in vjp(grad_output)[0], case.backward(given, grad_output):
                for name in variables:
                    case.close(grads[name], wants[name], dtype)
        batched = jax.vmap(lambda t: case.forward({**given, **t}))({n: t[None] for n, t in variables.items()})
        case.close(batched[0], want, dtype)


@pytest.mark.parametrize("case", [case for case in EACH if case.op.non_differentiable], ids=str)
def test_numpy_constants_of_another_byte_order(case: Case) -> None:
    given = tensors(case, "float32")
    swapped = {n: case.tensors("float32")[n] for n in case.op.non_differentiable}
    swapped = {n: t.astype(t.dtype.newbyteorder(">")) for n, t in swapped.items()}
    assert_close(case.forward({**given, **swapped}), np.asarray(case.forward(given)))


@pytest.mark.parametrize("dtype", [object, "U1", bool])
@pytest.mark.parametrize("case", [case for case in EACH if case.op.non_differentiable], ids=str)
def test_constants_are_numbers(case: Case, dtype: Any) -> None:
    name = case.op.non_differentiable[0]
    mixed = {**tensors(case, "float32"), name: np.zeros((2, 5), dtype)}
    for which, call in (
        (case.op.name, lambda: case.forward(mixed)),
        (f"{case.op.name}_backward", lambda: case.backward(mixed, jnp.asarray(case.grad_output("float32")))),
    ):
        with pytest.raises(TypeError, match=f"{which}: {name} must be of integers or floats, got {np.dtype(dtype)}"):
            call()


def test_numpy_integers_that_jax_would_cut() -> None:
    case = by_name("ms_deform_attn")
    with jax.enable_x64(False):
        given = tensors(case, "float32")
        given["level_start_index"] = case.tensors()["level_start_index"].astype(np.int64) + 2**32
        with pytest.raises(ValueError, match="level_start_index must fit int32, got 42949"):
            case.forward(given)


def test_ahead_of_time_compiled_and_exported() -> None:
    given = to_jax()
    want = np.asarray(convolve(*given))
    assert_close(jax.jit(convolve).lower(*given).compile()(*given), want)
    unchecked = [export.DisabledSafetyCheck.custom_call("cudcn.deform_conv2d")]
    exported = export.export(jax.jit(convolve), disabled_checks=unchecked)(*given)
    assert_close(export.deserialize(exported.serialize()).call(*given), want)


def test_buffers_in_any_order_and_donated() -> None:
    case = by_name("dcnv3")
    given, image = tensors(case), case.tensors()["input"]
    out, grad, twice = jax.jit(
        lambda turned: (
            case.forward({**given, "input": turned.transpose(3, 1, 0, 2)}),
            jax.grad(lambda x: case.forward({**given, "input": x.transpose(3, 1, 0, 2)}).sum())(turned),
            2 * turned,
        ),
        donate_argnums=0,
    )(jnp.asarray(image.transpose(2, 1, 3, 0)))
    want = case.forward(case.tensors())
    assert_close(out, want)
    assert_close(grad.transpose(3, 1, 0, 2), case.backward(case.tensors(), np.ones_like(want))["input"])
    assert_close(twice, 2 * image.transpose(2, 1, 3, 0))


def test_weak_types_and_float64_without_x64() -> None:
    case = by_name("roi_avg_pool")
    with jax.enable_x64(False):
        rois = case.tensors()["rois"]  # of float64, which is float32 here
        image = jnp.full(case.tensors()["input"].shape, 2.0)
        assert image.weak_type
        grad = jax.grad(lambda x: case.forward({"input": x, "rois": rois}).sum())(image)
    assert grad.dtype == "float32"
    plain = {"input": np.asarray(image, np.float64), "rois": rois}
    case.close(grad, case.backward(plain, np.ones_like(case.forward(plain)))["input"], "float32")


def test_value_and_grad_without_optional_tensors() -> None:
    given = to_jax(replace(PLAIN, bias=False, mask=False))
    value, grads = jax.jit(jax.value_and_grad(total, (0, 2)))(*given)
    assert_close(value, np.asarray(total(*given)))
    assert [g.shape for g in grads] == [given[0].shape, given[2].shape]


def test_many_attributes() -> None:
    """They travel in pieces, and must arrive whatever their length."""
    given = to_jax()
    for padding in (0, 1, 12, 123, ((0, 1), (2, 3)), ((12, 34), (5, 67))):
        top, bottom, left, right = check.padding("", padding)
        height, width = 6 + top + bottom - 2, 7 + left + right - 2
        offset = jnp.zeros((2, 36, height, width))
        got = cudcn.deform_conv2d(given[0], offset, given[2], padding=padding)
        want = cudcn.deform_conv2d(*(np.asarray(t) for t in (given[0], offset, given[2])), padding=padding)
        assert_close(got, want)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_the_longest_attributes_fit(case: Case) -> None:
    largest, float64 = 2**31 - 1, -1.2345678901234567e-300
    longest = {
        "Pair": (largest,) * 2, "Pair | None": (largest,) * 2, "Padding": (largest,) * 4,
        "int": largest, "float": float64, "bool": False, "str": "discrete",
        "Sequence[int] | None": (largest // MOST_LEVELS,) * MOST_LEVELS,
    }  # fmt: skip
    values = tuple(longest[kind] for kind in case.op.attributes.values())
    given = (1,) * len(case.op.backward_tensors)
    pieces = _pieces(values, given)
    assert max(map(len, pieces.values())) <= 7
    assert _parsed(tuple(pieces.values())) == (values, given)


def test_calls_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward calls of the adapter alone: what computes, and fills the outputs, is left out."""
    for name in "forward", "backward":
        monkeypatch.setattr(Op, name, lambda *_: None)
    case = by_name("dcnv3")
    given, grad_output = tensors(case), jnp.asarray(case.grad_output())
    forward, backward = jax.jit(case.forward), jax.jit(case.backward)

    def growth(count: int) -> int:
        before = resident()
        for _ in range(count):
            jax.block_until_ready(forward(given))
            jax.block_until_ready(backward(given, grad_output))
        return resident() - before

    growth(1000)
    assert min(growth(5000) for _ in range(2)) < 2 * 5000 * 40  # bytes a call; a leak is in both


def test_new_shapes_cost_the_memory_of_plain_jax() -> None:
    rois = jnp.zeros((1, 5))

    def growth(function: Callable[[Any], Any]) -> int:
        def run(widths: range) -> None:
            for width in widths:
                jax.block_until_ready(function(jnp.asarray(np.ones((1, 1, 2, width)))))

        run(range(1, 10))
        before = resident()
        run(range(10, 40))
        return resident() - before

    plain = growth(jax.jit(lambda x: jnp.sin(x).sum((2, 3))))
    targets = jax_tvm_ffi.registered_count()
    ours = growth(jax.jit(lambda x: cudcn.roi_avg_pool(x, rois, output_size=1)))
    assert ours < 1.5 * plain
    assert jax_tvm_ffi.registered_count() == targets  # a process has 1024, for all its libraries


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_choice_of_numpys_strings() -> None:
    """They equal Python's, so that JAX takes the trace of one for the other's, but are written differently."""
    given = [*tensors(dtype="float32").values()]
    want = np.asarray(convolve(*map(np.asarray, given)))
    for layout in np.str_("NCHW"), "NCHW":
        got = cudcn.deform_conv2d(*given, **{**ATTRIBUTES, "layout": layout})
        assert_close(got, want, 1e-5)


def test_empty_batch() -> None:
    given = to_jax(replace(PLAIN, batch=0))
    assert convolve(*given).shape == (0, 6, 4, 3)
    grads = jax.grad(total, (0, 1, 2, 3, 4))(*given)
    assert [g.shape for g in grads] == [g.shape for g in given]
    assert not grads[2].any()


def test_refusals() -> None:
    given = to_jax()
    with pytest.raises(TypeError, match="weight must be float64 like input, got float32"):
        jax.jit(convolve)(*given[:2], given[2].astype("float32"), *given[3:])
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


@pytest.mark.parametrize(
    "name", ["roi_avg_pool", "psroi_pool", "deform_roi_pool", "deform_psroi_pool", "ms_deform_attn"]
)
def test_reports_what_fails_at_run_time(name: str) -> None:
    """As JAX's error where it has just compiled the call, as a ValueError where it had compiled it before."""
    case = by_name(name)
    constant, reason = ("level_start_index", "each level") if name == "ms_deform_attn" else ("rois", "rois")
    given = tensors(case)
    bad = {**given, constant: given[constant] + 1000}
    message = rf"INTERNAL: {name}: {reason}.* must"
    function = jax.jit(case.forward)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(function(bad))
    jax.block_until_ready(function(given))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
        jax.block_until_ready(function(bad))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
        jax.block_until_ready(case.backward(bad, jnp.asarray(case.grad_output())))


def test_python_reports_missing_arguments() -> None:
    check_missing_arguments(cudcn.jax, jnp.asarray)


def test_threads() -> None:
    """Eight at once trace calls of their own attributes."""
    case = by_name("deform_roi_pool")
    given, start = tensors(case), Barrier(8)

    def work(thread: int) -> list[Any]:
        start.wait()
        return [jax.jit(lambda t, a=a: call(case, t, **a))(given) for a in attributes[thread]]

    attributes = [[{"gamma": 0.01 * (8 * i + thread)} for i in range(4)] for thread in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(work, range(8)))
    for thread in range(8):
        for a, out in zip(attributes[thread], outs[thread], strict=True):
            assert_close(out, call(case, case.tensors(), **a))


@pytest.mark.parametrize("module", ["jax", "jax_tvm_ffi", "tvm_ffi", "ml_dtypes"])
def test_says_what_to_install(module: str) -> None:
    package = {"jax_tvm_ffi": "jax-tvm-ffi", "tvm_ffi": "apache-tvm-ffi"}.get(module, module)
    script = f"import sys; sys.modules[{module!r}] = None; import cudcn.jax"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert f"cudcn.jax needs the package {package}, " in done.stderr


def test_says_that_gpus_need_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="arrays in GPU memory need CuPy"):
        _device(SimpleNamespace(type="cuda", index=0), 0).__enter__()


@pytest.mark.parametrize("case", EACH, ids=str)
def test_functions_introduce_themselves(case: Case) -> None:
    check_introduction(cudcn.jax, case.op.name)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_tensors_by_position(case: Case) -> None:
    check_tensors_by_position(cudcn.jax, case, lambda t: None if t is None else jnp.asarray(t))
