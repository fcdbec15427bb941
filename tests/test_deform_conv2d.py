"""deform_conv2d on raw arrays: the CPU path, the emulated kernels, and the real ones where there is a GPU."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import cudcn
from cudcn import emulator, launch
from cudcn.cpu import parallel
from cudcn.ops.deform_conv2d import OP

NAMES = ("input", "offset", "weight", "bias", "mask")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
# of a result's norm. Halves: the columns, the products and the sum are each rounded to 11 or 8 bits.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5, "float64": 1e-12}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (7, 6)
    out_channels: int = 4
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    groups: int = 1
    offset_groups: int = 1
    bias: bool = True
    mask: bool = True
    reach: float = 2.0  # of the offsets, in pixels

    def __str__(self) -> str:
        return self.name

    @property
    def attributes(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def canonical(self) -> dict[str, Any]:
        """As the slow loop takes them: pairs, and padding with its ends."""
        a = OP.canonical(**self.attributes, layout="NCHW")
        top, bottom, left, right = a["padding"]
        return {"stride": a["stride"], "padding": ((top, bottom), (left, right)), "dilation": a["dilation"]}

    def output_size(self) -> tuple[int, int]:
        a = self.canonical
        return tuple(
            (self.size[i] + sum(a["padding"][i]) - a["dilation"][i] * (self.kernel[i] - 1) - 1) // a["stride"][i] + 1
            for i in (0, 1)
        )

    @functools.lru_cache  # noqa: B019
    def tensors(self, dtype: str = "float64", fine: tuple[str, ...] = ()) -> tuple[Any, ...]:
        """Input, offset, weight, bias, mask, and a gradient of the output; those in `fine` are float32."""
        random = np.random.default_rng(len(self.name))
        taps, places = math.prod(self.kernel), self.output_size()
        shapes = {
            "input": (self.batch, self.channels, *self.size),
            "offset": (self.batch, 2 * self.offset_groups * taps, *places),
            "weight": (self.out_channels, self.channels // self.groups, *self.kernel),
            "bias": (self.out_channels,),
            "mask": (self.batch, self.offset_groups * taps, *places),
            "grad_output": (self.batch, self.out_channels, *places),
        }
        values = {name: random.standard_normal(shape) for name, shape in shapes.items()}
        values["offset"] *= self.reach
        values["mask"] = random.random(shapes["mask"])
        arrays = {n: v.astype("float32" if n in fine else DTYPES[dtype]) for n, v in values.items()}
        return tuple(
            None if (n == "bias" and not self.bias) or (n == "mask" and not self.mask) else arrays[n] for n in arrays
        )


CASES = [
    Case("plain v2"),
    Case("v1", bias=False, mask=False),
    Case("one pixel", batch=1, channels=1, size=(1, 1), out_channels=1, kernel=(1, 1), padding=0),
    Case("strides and dilations", size=(9, 8), kernel=(2, 3), stride=(2, 1), dilation=(1, 2), padding=(0, 2)),
    Case("uneven padding", kernel=(2, 2), padding=((1, 0), (2, 1)), bias=False),
    Case("groups", channels=6, out_channels=4, groups=2, offset_groups=3),
    Case("depthwise", channels=6, out_channels=6, groups=6, offset_groups=2, mask=False),
    Case("offset groups", channels=6, out_channels=3, offset_groups=6, kernel=(1, 2)),
    Case("far offsets", reach=8.0, batch=3),
    Case("many channels", batch=1, channels=40, out_channels=8, size=(3, 4), bias=False),
    Case("large kernel", batch=1, channels=2, out_channels=2, kernel=(5, 4), padding=2),
]
SMALL = [replace(case, batch=1) for case in CASES[1:4] + CASES[5:7]]


def nhwc(array: Any) -> Any:
    return None if array is None else np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def forward(case: Case, tensors: tuple[Any, ...], layout: str = "NCHW") -> Any:
    if layout == "NCHW":
        return cudcn.deform_conv2d(*tensors[:5], **case.attributes)
    input, offset, weight, bias, mask = tensors[:5]
    out = cudcn.deform_conv2d(nhwc(input), nhwc(offset), weight, bias, nhwc(mask), **case.attributes, layout="NHWC")
    return out.transpose(0, 3, 1, 2)


def backward(case: Case, tensors: tuple[Any, ...], layout: str = "NCHW") -> dict[str, Any]:
    input, offset, weight, bias, mask, grad_output = tensors
    if layout == "NCHW":
        return cudcn.deform_conv2d_backward(grad_output, *tensors[:5], **case.attributes)._asdict()
    grads = cudcn.deform_conv2d_backward(
        nhwc(grad_output),
        nhwc(input),
        nhwc(offset),
        weight,
        bias,
        nhwc(mask),
        **case.attributes,
        layout="NHWC",
    )._asdict()
    for name in ("input", "offset", "mask"):
        if grads[name] is not None:
            grads[name] = grads[name].transpose(0, 3, 1, 2)
    return grads


@functools.cache
def expected(case: Case) -> np.ndarray:
    return reference.deform_conv2d(*case.tensors()[:5], **case.canonical)


def error(got: Any, want: Any) -> float:
    """Relative to the norm of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


def close(got: Any, want: Any, dtype: str) -> None:
    assert error(got, want) <= TOLERANCE[dtype]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", "emulator")


# ---- the CPU path


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_slow_loop(case: Case, layout: str) -> None:
    close(forward(case, case.tensors(), layout), expected(case), "float64")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_finite_differences(case: Case, layout: str) -> None:
    """Along random directions. The loss is only piecewise smooth, so offsets near whole numbers move away first."""
    tensors = list(case.tensors())
    base = np.floor(tensors[1])
    tensors[1] = base + 0.1 + 0.8 * (tensors[1] - base)
    grads = backward(case, tuple(tensors), layout)
    random, step = np.random.default_rng(0), 1e-6
    for index, name in enumerate(NAMES):
        if tensors[index] is None:
            assert grads[name] is None
            continue
        for _ in range(3):
            direction = random.standard_normal(tensors[index].shape)
            ends = []
            for sign in (1, -1):
                moved = list(tensors)
                moved[index] = tensors[index] + sign * step * direction
                ends.append((forward(case, tuple(moved), layout) * tensors[5]).sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (grads[name] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_smaller_types(case: Case, dtype: str) -> None:
    tensors = case.tensors(dtype)
    wide = tuple(None if t is None else t.astype(np.float64) for t in tensors)
    out = forward(case, tensors)
    assert out.dtype == DTYPES[dtype]
    close(out, forward(case, wide), dtype)
    grads, want = backward(case, tensors), backward(case, wide)
    for name, grad in grads.items():
        if grad is not None:
            assert grad.dtype == DTYPES[dtype]
            close(grad, want[name], dtype)


def test_positions_of_half_data_are_float32() -> None:
    """At column 1000 a half has no room for a fraction."""
    row = np.arange(1200, dtype=np.float16).reshape(1, 1, 1, -1) % 2
    offset = np.full((1, 2, 1, 1200), 0.25, np.float16)
    offset[:, 0] = 0
    out = cudcn.deform_conv2d(row, offset, np.ones((1, 1, 1, 1), np.float16))
    assert np.array_equal(out[0, 0, 0, :-1], np.where(np.arange(1199) % 2, 0.75, 0.25).astype(np.float16))


def test_sums_do_not_depend_on_the_run() -> None:
    case = Case("again", batch=3, channels=16, size=(30, 31))
    tensors = case.tensors("float32")
    first, second = backward(case, tensors), backward(case, tensors)
    assert all(np.array_equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_any_number_of_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
    case = CASES[5]
    close(forward(case, case.tensors()), expected(case), "float64")


def test_blas_gets_its_threads_back() -> None:
    """From several callers at once too, and after an error."""
    blas = parallel._openblas()
    if blas is None:
        pytest.skip("NumPy's BLAS is not OpenBLAS")
    get, set_ = blas
    before = get()
    set_(2)
    try:
        with parallel.single_threaded_blas(), parallel.single_threaded_blas():
            assert get() == 1
        assert get() == 2
        with pytest.raises(RuntimeError), parallel.single_threaded_blas():
            raise RuntimeError
        assert get() == 2
    finally:
        set_(before)


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_thread_count(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"CUDCN_NUM_THREADS must be a positive number, got '{value}'"):
        forward(CASES[0], CASES[0].tensors())


# ---- the kernels


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize("order", ["forward", "reverse"])
    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_every_case(self, case: Case, layout: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with emulator.settings(build="fast", order=order):
            self._agrees(case, "float64", layout, monkeypatch)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("fine", [(), ("offset",), ("mask",), ("offset", "mask")], ids="-".join)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_types(self, dtype: str, fine: tuple[str, ...], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with emulator.settings(build="fast"):
            self._agrees(CASES[3], dtype, layout, monkeypatch, fine)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_float32(self, case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with emulator.settings(build="fast"):
            self._agrees(case, "float32", layout, monkeypatch)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("case", SMALL, ids=str)
    def test_checking_build(self, case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with emulator.settings(build="check"):
            self._agrees(case, "float32", layout, monkeypatch)

    def test_checking_build_of_a_half_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with emulator.settings(build="check", order="reverse"):
            self._agrees(SMALL[1], "float16", "NHWC", monkeypatch, ("offset",))

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    def test_a_chunk_at_a_time(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two images of five fit the workspace."""
        case = replace(CASES[5], batch=5)
        product = 2 * math.prod(case.output_size()) * 8
        monkeypatch.setattr(launch, "WORKSPACE", (case.channels * 9 + case.out_channels) * product)
        self._agrees(case, "float64", layout, monkeypatch)
        assert len(list(_chunks_seen(monkeypatch, case))) == 3

    def test_strided_input_is_read_where_it_lies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = CASES[0]
        input, *others = case.tensors()
        wide = np.zeros((2, 7, 6, 9))
        wide[..., 2:6] = input.transpose(0, 2, 3, 1)
        out = forward(case, (wide[..., 2:6].transpose(0, 3, 1, 2), *others))
        close(out, expected(case), "float64")

    def _agrees(
        self, case: Case, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch, fine: tuple[str, ...] = ()
    ) -> None:
        """Kernels against the float64 CPU path on the same numbers."""
        tensors = case.tensors(dtype, fine)
        wide = tuple(None if t is None else t.astype(np.float64) for t in tensors)
        with monkeypatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            want, want_grads = forward(case, wide), backward(case, wide)
        close(forward(case, tensors, layout), want, dtype)
        for name, grad in backward(case, tensors, layout).items():
            if grad is not None:
                assert grad.dtype == tensors[NAMES.index(name)].dtype
                close(grad, want_grads[name], dtype)

    def test_every_launched_instance_is_in_the_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which the NVRTC gate compiles for every architecture."""
        launched: set[launch.Kernel] = set()
        run = launch._Emulated.launch

        def spy(self: Any, kernel: launch.Kernel, *args: Any) -> None:
            launched.add(kernel)
            run(self, kernel, *args)

        monkeypatch.setattr(launch._Emulated, "launch", spy)
        for dtype in DTYPES:
            self._agrees(CASES[3], dtype, "NHWC", monkeypatch)
        assert len(launched) == 3 * len(DTYPES)
        assert launched <= set(OP.cuda.kernels())


def _chunks_seen(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[slice]:
    seen: list[slice] = []
    sample = OP.cuda._Columns.sample
    monkeypatch.setattr(OP.cuda._Columns, "sample", lambda self, images: (seen.append(images), sample(self, images))[1])
    forward(case, case.tensors())
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_gpu(case: Case, dtype: str, layout: str) -> None:
    import cupy

    tensors = case.tensors(dtype)
    wide = tuple(None if t is None else t.astype(np.float64) for t in tensors)
    arrays = [None if t is None else cupy.asarray(t) for t in tensors]
    order = (0, 2, 3, 1) if layout == "NHWC" else (0, 1, 2, 3)

    def arranged(array: Any) -> Any:
        return None if array is None else cupy.ascontiguousarray(array.transpose(order))

    input, offset, weight, bias, mask, grad_output = arrays
    given = (arranged(input), arranged(offset), weight, bias, arranged(mask))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = cudcn.deform_conv2d(*given, **case.attributes, layout=layout)
        grads = cudcn.deform_conv2d_backward(arranged(grad_output), *given, **case.attributes, layout=layout)
        stream.synchronize()
    close(out.get().transpose(np.argsort(order)), forward(case, wide), dtype)
    for name, grad in grads._asdict().items():
        if grad is not None:
            got = grad.get()
            got = got.transpose(np.argsort(order)) if name in ("input", "offset", "mask") else got
            close(got, backward(case, wide)[name], dtype)


# ---- other libraries


def test_onnx_cases() -> None:
    """ONNX's own examples of DeformConv. They are short decimals, stored as float32: read back as such."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' examples
        cases = collect_testcases("DeformConv")
    assert len(cases) >= 3
    for case in cases:
        attributes = {a.name: list(a.ints) for a in case.model.graph.node[0].attribute}
        (inputs, outputs), *_ = case.data_sets
        input, weight, offset, *rest = (np.asarray(a, np.float64).round(4) for a in inputs)
        bias, mask = [*rest, None, None][:2]
        top, left, bottom, right = attributes.get("pads", [0] * 4)
        out = cudcn.deform_conv2d(
            input, offset, weight, bias, mask,
            stride=attributes.get("strides", 1), padding=((top, bottom), (left, right)),
            dilation=attributes.get("dilations", 1),
        )  # fmt: skip
        want = np.asarray(outputs[0], np.float64).round(4)
        np.testing.assert_allclose(out, want, rtol=1e-12, err_msg=case.name)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "far offsets"], ids=str)
def test_onnx_runtime(case: Case) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    input, offset, weight, bias, mask, _ = case.tensors("float32")
    bias = np.zeros(case.out_channels, np.float32) if bias is None else bias
    mask = np.ones((case.batch, offset.shape[1] // 2, *offset.shape[2:]), np.float32) if mask is None else mask
    feed = {"x": input, "w": weight, "offset": offset, "b": bias, "mask": mask}
    (top, bottom), (left, right) = case.canonical["padding"]
    node = helper.make_node(
        "DeformConv", list(feed), ["y"], kernel_shape=case.kernel, pads=[top, left, bottom, right],
        strides=case.canonical["stride"], dilations=case.canonical["dilation"], group=case.groups,
        offset_group=case.offset_groups,
    )  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in feed.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, feed)
    close(forward(case, (input, offset, weight, bias, mask)), want, "float32")


def test_openvino() -> None:
    import openvino
    from openvino import opset8

    case = Case("openvino", channels=6, out_channels=4, groups=2, offset_groups=3, bias=False)
    input, offset, weight, _, mask, _ = case.tensors("float32")
    parameters = [opset8.parameter(a.shape, np.float32) for a in (input, offset, weight, mask)]
    grouped = opset8.reshape(parameters[2], np.array((4, 3, 3, 3)), False)
    node = opset8.deformable_convolution(
        parameters[0], parameters[1], grouped, [1, 1], [1, 1], [1, 1], [1, 1], parameters[3],
        group=2, deformable_group=3, bilinear_interpolation_pad=True,
    )  # fmt: skip
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU")
    want = compiled([input, offset, weight, mask])[0]
    close(forward(case, (input, offset, weight, None, mask)), want, "float32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_offsets_it_is_a_convolution(case: Case) -> None:
    import torch

    input, offset, weight, bias, *_ = case.tensors()
    (top, bottom), (left, right) = case.canonical["padding"]
    padded = np.pad(input, ((0, 0), (0, 0), (top, bottom), (left, right)))
    want = torch.nn.functional.conv2d(
        torch.from_numpy(padded), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        case.canonical["stride"], 0, case.canonical["dilation"], case.groups,
    )  # fmt: skip
    close(forward(case, (input, np.zeros_like(offset), weight, bias, None)), want.numpy(), "float64")


# ---- properties

sizes = st.integers(1, 5)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((reach, draw(st.integers(0, 3))) for reach in (dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    return Case(
        f"drawn {draw(st.integers(0, 99))}", batch=draw(sizes),
        channels=math.lcm(groups, offset_groups) * draw(st.integers(1, 2)),
        size=(draw(sizes), draw(sizes)), out_channels=groups * draw(st.integers(1, 3)), kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))), padding=padding, dilation=dilation,
        groups=groups, offset_groups=offset_groups, bias=draw(st.booleans()), mask=draw(st.booleans()),
        reach=draw(st.sampled_from([0.0, 0.5, 3.0, 100.0])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(any_case())
def test_linear_in_the_input(case: Case) -> None:
    """The gradient is the adjoint: <grad_input, v> = <grad_output, f(v)>, and the same for the weight."""
    input, offset, weight, _, mask, grad_output = case.tensors()
    grads = backward(case, (input, offset, weight, None, mask, grad_output))
    product = (grad_output * forward(case, (input, offset, weight, None, mask))).sum()
    assert (grads["input"] * input).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)
    assert (grads["weight"] * weight).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(any_case())
def test_layouts_and_images_are_independent(case: Case) -> None:
    tensors = case.tensors()
    out = forward(case, tensors)
    np.testing.assert_allclose(forward(case, tensors, "NHWC"), out, rtol=1e-12, atol=1e-12)
    input, offset, weight, bias, mask, _ = tensors
    last = forward(case, (input[-1:], offset[-1:], weight, bias, None if mask is None else mask[-1:]))
    np.testing.assert_allclose(last, out[-1:], rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(-3, 3), st.integers(-3, 3))
def test_whole_offsets_shift_the_image(dy: int, dx: int) -> None:
    image = np.random.default_rng(0).standard_normal((1, 1, 6, 7))
    offset = np.broadcast_to(np.array([dy, dx], float).reshape(1, 2, 1, 1), (1, 2, 6, 7))
    out = cudcn.deform_conv2d(image, offset, np.ones((1, 1, 1, 1)))
    want = np.zeros_like(image)
    rows, columns = slice(max(0, -dy), min(6, 6 - dy)), slice(max(0, -dx), min(7, 7 - dx))
    want[0, 0, rows, columns] = image[0, 0, max(0, dy) : 6 + min(0, dy), max(0, dx) : 7 + min(0, dx)]
    assert np.array_equal(out, want)


# ---- the edges


@pytest.fixture(params=["cpu", "fast", "check"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "cpu":
        yield
    else:
        monkeypatch.setenv("CUDCN_DEVICE", "emulator")
        with emulator.settings(build=request.param):
            yield


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**33)])
def test_offsets_that_point_nowhere(bad: float, layout: str) -> None:
    """They sample 0, give the input, themselves and their mask no gradient, and disturb no other sample."""
    case = Case("nowhere", batch=1, channels=2, size=(4, 4), out_channels=2, bias=False)
    input, offset, weight, bias, mask, grad_output = case.tensors("float32")
    spoiled, silent = offset.copy(), mask.copy()
    spoiled[0, 4, 1, 2] = bad  # the third tap's dy
    silent[0, 2, 1, 2] = 0  # the same tap switched off
    out = forward(case, (input, spoiled, weight, bias, mask), layout)
    np.testing.assert_allclose(out, forward(case, (input, offset, weight, bias, silent)), rtol=1e-5, atol=1e-5)
    grads = backward(case, (input, spoiled, weight, bias, mask, grad_output), layout)
    want = backward(case, (input, offset, weight, bias, silent, grad_output))
    want["mask"][0, 2, 1, 2] = 0
    for name in ("input", "offset", "weight", "mask"):
        np.testing.assert_allclose(grads[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("any_device")
def test_the_border_cell() -> None:
    """On an image of ones: 0 at -1 and at H, linear between; the slope at exactly -1 is the right-hand one."""
    positions = np.array([-1.5, -1.0, -0.25, 0.0, 2.0, 2.75, 3.0, 3.5])
    values = [0, 0, 0.75, 1, 1, 0.25, 0, 0]
    slopes = [0, 1, 1, 0, -1, -1, 0, 0]
    image, ones = np.ones((1, 1, 3, 3)), np.ones((1, 1, 1, 1))
    for position, value, slope in zip(positions, values, slopes, strict=True):
        for axis in (0, 1):
            offset = np.ones((1, 2, 1, 1))
            offset[0, axis] = position
            attributes = {"stride": 3}
            assert cudcn.deform_conv2d(image, offset, ones, **attributes)[0, 0, 0, 0] == value
            grads = cudcn.deform_conv2d_backward(np.ones((1, 1, 1, 1)), image, offset, ones, **attributes)
            assert grads.offset[0, axis, 0, 0] == slope


@pytest.mark.usefixtures("any_device")
def test_a_nan_pixel_stays_where_it_is() -> None:
    image = np.ones((1, 1, 5, 5), np.float32)
    image[0, 0, 0, 0] = np.nan
    out = cudcn.deform_conv2d(image, np.full((1, 2, 5, 5), 7.5, np.float32), np.ones((1, 1, 1, 1), np.float32))
    assert np.array_equal(out, np.zeros_like(out))


@pytest.mark.usefixtures("any_device")
def test_empty_batch_and_no_output_channels() -> None:
    case = Case("empty", batch=0)
    assert forward(case, case.tensors()).shape == (0, 4, 7, 6)
    grads = backward(case, case.tensors())
    assert grads["input"].shape == (0, 4, 7, 6)
    assert np.array_equal(grads["weight"], np.zeros((4, 4, 3, 3)))
    assert forward(replace(case, batch=2, out_channels=0), replace(case, batch=2, out_channels=0).tensors()).size == 0


def test_an_object_with_dlpack() -> None:
    class Exporter:
        def __init__(self, array: np.ndarray) -> None:
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    case = CASES[0]
    out = forward(case, tuple(map(Exporter, case.tensors())))
    assert type(out) is np.ndarray
    close(out, expected(case), "float64")


# ---- bad input

f4 = np.float32


def zeros(*shape: int, dtype: Any = f4) -> np.ndarray:
    return np.zeros(shape, dtype)


GOOD = {
    "input": zeros(2, 4, 7, 6), "offset": zeros(2, 18, 7, 6), "weight": zeros(4, 4, 3, 3),
    "bias": zeros(4), "mask": zeros(2, 9, 7, 6), "padding": 1,
}  # fmt: skip
BAD = [
    ({"input": zeros(4, 7, 6)}, ValueError, r"input must be \(N, C, H, W\), got shape \(4, 7, 6\)"),
    ({"offset": zeros(18, 7, 6)}, ValueError, r"offset must be \(N, C, H, W\), got shape"),
    ({"weight": zeros(4, 4, 9)}, ValueError, r"weight must be .*, got shape \(4, 4, 9\)"),
    ({"offset": zeros(2, 9, 7, 6)}, ValueError, r"offset must have .* a multiple of 18 .* got 9"),
    ({"offset": zeros(2, 54, 7, 6)}, ValueError, r".*offset_groups divide input's 4 channels, got 54"),
    ({"offset": zeros(2, 18, 7, 5)}, ValueError, r"offset must be .* = \(2, 18, 7, 6\), got \(2, 18, 7, 5\)"),
    ({"offset": zeros(1, 18, 7, 6)}, ValueError, r"offset must be .* = \(2, 18, 7, 6\), got \(1, 18, 7, 6\)"),
    ({"mask": zeros(2, 18, 7, 6)}, ValueError, r"mask must be .* = \(2, 9, 7, 6\), got \(2, 18, 7, 6\)"),
    ({"bias": zeros(5)}, ValueError, r"bias must be \(C_out,\) = \(4,\), got \(5,\)"),
    ({"weight": zeros(4, 3, 3, 3)}, ValueError, r"weight .* input's 4 channels into groups .* got \(4, 3, 3, 3\)"),
    ({"weight": zeros(5, 2, 3, 3)}, ValueError, r".*groups that divide C_out, got \(5, 2, 3, 3\)"),
    ({"weight": zeros(4, 0, 3, 3)}, ValueError, r".*must not be empty, got .*\(4, 0, 3, 3\)"),
    ({"weight": zeros(4, 4, 10, 3)}, ValueError, r"the output's height would be empty: .* spans 10, .* 9"),
    ({"dilation": (1, 4)}, ValueError, r"the output's width would be empty: .* spans 9, .* 8"),
    ({"stride": 0}, ValueError, r"stride must be at least 1 .* got 0"),
    ({"stride": (1, -2)}, ValueError, r"stride must be at least 1 .* got -2"),
    ({"stride": 1.5}, TypeError, r"stride must be made of integers, got 1.5"),
    ({"stride": (1, 1, 1)}, ValueError, r"stride must be an int or a pair \(h, w\), got \(1, 1, 1\)"),
    ({"dilation": 0}, ValueError, r"dilation must be at least 1 .* got 0"),
    ({"padding": -1}, ValueError, r"padding must be at least 0 .* got -1"),
    ({"padding": 2**31}, ValueError, r"padding must be .* below 2\*\*31, got 2147483648"),
    ({"layout": "CHWN"}, ValueError, r"layout must be 'NCHW' or 'NHWC', got 'CHWN'"),
    ({"input": zeros(2, 4, 7, 6, dtype=np.int32)}, TypeError, r"input must be float16, .* got int32"),
    ({"weight": zeros(4, 4, 3, 3, dtype=np.float64)}, TypeError, r"weight must be float32 like input, got float64"),
    ({"offset": zeros(2, 18, 7, 6, dtype=np.float64)}, TypeError, r"offset must be float32 like input, got float64"),
    ({"mask": zeros(2, 9, 7, 6, dtype=np.float16)}, TypeError, r"mask must be float32 like input, got float16"),
    ({"bias": zeros(4, dtype=np.float64)}, TypeError, r"bias must be float32 like input, got float64"),
    ({"input": [[1.0]]}, TypeError, r"input must be an array of NumPy, .* got list"),
    ({"weight": None}, TypeError, r"weight is required, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_bad_input(
    change: dict[str, Any], kind: type, message: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", device)
    with pytest.raises(kind, match="deform_conv2d: " + message):
        cudcn.deform_conv2d(**{**GOOD, **change})


def test_bad_grad_output() -> None:
    tensors = {k: v for k, v in GOOD.items() if k != "padding"}
    for grad_output in (zeros(2, 4, 7, 5), zeros(2, 4, 7, 6, dtype=np.float64)):
        with pytest.raises(ValueError, match=r"deform_conv2d_backward: grad_output must have .* got \(2, 4, 7"):
            cudcn.deform_conv2d_backward(grad_output, **tensors, padding=1)


def test_bad_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", "tpu")
    with pytest.raises(ValueError, match=r"CUDCN_DEVICE must be 'cpu' or 'emulator'.* got 'tpu'"):
        cudcn.deform_conv2d(**GOOD)
