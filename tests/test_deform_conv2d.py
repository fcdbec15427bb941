"""deform_conv2d on raw arrays: the CPU path, the emulated kernels, and the real ones where there is a GPU."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases.case import DTYPES, HALVES, widened
from cases.deform_conv2d import BY_NAME, CASES, IMAGES, PLAIN, SMALL, DeformConv2d
from engines import onnx_runtime, openvino
from every_case import EveryCase, EverySmallCase, agrees_with_float64, launched
from hypothesis import given, settings, strategies as st

import cudcn
from cudcn import emulator, launch
from cudcn.ops.deform_conv2d import OP


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCase(EveryCase):
    pass


@pytest.mark.parametrize("case", SMALL, ids=str)
class TestEverySmallCase(EverySmallCase):
    pass


# ---- the CPU path


def test_positions_of_half_data_are_float32() -> None:
    """At column 1000 a half has no room for a fraction."""
    row = np.arange(1200, dtype=np.float16).reshape(1, 1, 1, -1) % 2
    offset = np.full((1, 2, 1, 1200), 0.25, np.float16)
    offset[:, 0] = 0
    out = cudcn.deform_conv2d(row, offset, np.ones((1, 1, 1, 1), np.float16))
    assert np.array_equal(out[0, 0, 0, :-1], np.where(np.arange(1199) % 2, 0.75, 0.25).astype(np.float16))


def test_sums_do_not_depend_on_the_run() -> None:
    case = DeformConv2d("again", batch=3, channels=16, size=(30, 31))
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    first, second = case.backward(tensors, grad_output), case.backward(tensors, grad_output)
    assert all(np.array_equal(first[name], second[name]) for name in tensors)


# ---- the kernels


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize(
        "case", [BY_NAME[f"strides and dilations {layout}"] for layout in ("NCHW", "NHWC")], ids=str
    )
    @pytest.mark.parametrize("fine", [(), ("offset",), ("mask",), ("offset", "mask")], ids="-".join)
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_types(self, dtype: str, fine: tuple[str, ...], case: DeformConv2d) -> None:
        with emulator.settings(build="fast"):
            agrees_with_float64(case, dtype, fine)

    def test_checking_build_of_a_half_type(self) -> None:
        with emulator.settings(build="check", order="reverse"):
            agrees_with_float64(replace(BY_NAME["strides and dilations NHWC"], batch=1), "float16", ("offset",))

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    def test_a_chunk_at_a_time(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two images of five fit the workspace."""
        case = replace(BY_NAME[f"groups {layout}"], batch=5)
        product = 2 * math.prod(case.places()) * 8
        monkeypatch.setattr(launch, "WORKSPACE", (case.channels * 9 + case.out_channels) * product)
        agrees_with_float64(case, "float64")
        seen: list[slice] = []
        sample = OP.cuda._Columns.sample
        monkeypatch.setattr(
            OP.cuda._Columns, "sample", lambda self, images: (seen.append(images), sample(self, images))[1]
        )
        case.forward(case.tensors())
        assert len(seen) == 3

    def test_strided_input_is_read_where_it_lies(self) -> None:
        tensors = PLAIN.tensors()
        wide = np.zeros((2, 7, 6, 9))
        wide[..., 2:6] = tensors["input"].transpose(0, 2, 3, 1)
        out = PLAIN.forward({**tensors, "input": wide[..., 2:6].transpose(0, 3, 1, 2)})
        PLAIN.close(out, PLAIN.expected(), "float64")

    def test_every_launched_instance_is_in_the_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which the NVRTC gate compiles for every architecture."""
        seen = launched(monkeypatch)
        for dtype in DTYPES:
            agrees_with_float64(BY_NAME["strides and dilations NHWC"], dtype)
        assert len(seen) == 3 * len(DTYPES) + 7  # and the two of the bias, which float64 shares
        assert seen <= set(OP.cuda.kernels())

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_float32_offsets_get_float32_gradients(self, dtype: str, layout: str) -> None:
        """The columns' gradient is not rounded to half on its way to them."""
        case, fine = BY_NAME[f"plain v2 {layout}"], ("offset", "mask")
        tensors, grad_output = case.tensors(dtype, fine), case.grad_output(dtype)
        grads = case.backward(tensors, grad_output)
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            wants = case.backward(widened(tensors), grad_output.astype(np.float64))
        for name in fine:
            case.close(grads[name], wants[name], "float32")

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_the_output_is_rounded_once(self, dtype: str, layout: str) -> None:
        """The product and the bias nearly cancel: what a product rounded to half would leave is wrong."""
        image, weight = np.full((2, 1, 3, 3), 1.0), np.full((2, 1, 1, 1), 1.0)
        half = DTYPES[dtype]
        near = half(257 / 256) if dtype == "float16" else half(129 / 128)
        image, weight = (image * near).astype(half), (weight * near).astype(half)
        offset, bias = np.zeros((2, 2, 3, 3), half), np.full(2, -1, half)
        if layout == "NHWC":
            image, offset = image.transpose(0, 2, 3, 1), offset.transpose(0, 2, 3, 1)
        out = cudcn.deform_conv2d(image, offset, weight, bias, layout=layout)
        assert (out == half(float(near) ** 2 - 1)).all()

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    def test_the_bias_gets_the_sum_of_millions_of_pixels(self, layout: str) -> None:
        """2**24 ones are as far as a running float32 sum counts."""
        grad_output = np.ones((1, 1, 4200, 4200), np.float32)
        sums = np.zeros(1, np.float32)
        if layout == "NHWC":  # two channels, or its memory would be planar too
            grad_output, sums = np.ones((1, 3000, 3000, 2), np.float32).transpose(0, 3, 1, 2), np.zeros(2, np.float32)
        with launch.device(grad_output) as device:
            OP.cuda._sum_pixels(device, grad_output, sums)
        assert (sums == grad_output[0, 0].size).all()

    def test_the_weights_sums_are_taken_in_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OP.cuda, "_RUN", 50)
        seen: list[int] = []
        matmul = launch._Emulated.matmul

        def spy(self: Any, a: Any, b: Any, out: Any) -> None:
            seen.append(a.shape[1])
            matmul(self, a, b, out)

        monkeypatch.setattr(launch._Emulated, "matmul", spy)
        agrees_with_float64(BY_NAME["groups NCHW"], "float32")
        assert 50 in seen
        assert 2 * 42 % 50 in seen


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


@pytest.mark.parametrize("case", [c for c in CASES[::2] if c.name != "far offsets"], ids=str)
def test_onnx_runtime(case: DeformConv2d) -> None:
    input, offset, weight, bias, mask = case.tensors("float32").values()
    bias = np.zeros(case.out_channels, np.float32) if bias is None else bias
    mask = np.ones((case.batch, offset.shape[1] // 2, *offset.shape[2:]), np.float32) if mask is None else mask
    feed = {"x": input, "w": weight, "offset": offset, "b": bias, "mask": mask}
    (top, bottom), (left, right) = case.canonical["padding"]
    want = onnx_runtime(
        "DeformConv", 19, feed, kernel_shape=case.kernel, pads=[top, left, bottom, right],
        strides=case.canonical["stride"], dilations=case.canonical["dilation"], group=case.groups,
        offset_group=case.offset_groups,
    )  # fmt: skip
    case.close(case.forward(case.tensors("float32")), want, "float32")


def test_openvino() -> None:
    case = DeformConv2d("openvino", channels=6, out_channels=4, groups=2, offset_groups=3, bias=False)
    input, offset, weight, _, mask = case.tensors("float32").values()

    def build(ops: Any, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
        grouped = ops.reshape(weight, np.array((4, 3, 3, 3)), False)
        return ops.deformable_convolution(
            input, offset, grouped, [1, 1], [1, 1], [1, 1], [1, 1], mask,
            group=2, deformable_group=3, bilinear_interpolation_pad=True,
        )  # fmt: skip

    case.close(case.forward(case.tensors("float32")), openvino(build, input, offset, weight, mask), "float32")


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_without_offsets_it_is_a_convolution(case: DeformConv2d) -> None:
    import torch

    input, offset, weight, bias, _ = case.tensors().values()
    (top, bottom), (left, right) = case.canonical["padding"]
    padded = np.pad(input, ((0, 0), (0, 0), (top, bottom), (left, right)))
    want = torch.nn.functional.conv2d(
        torch.from_numpy(padded), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        case.canonical["stride"], 0, case.canonical["dilation"], case.groups,
    )  # fmt: skip
    out = case.forward({**case.tensors(), "offset": np.zeros_like(offset), "mask": None})
    case.close(out, want.numpy(), "float64")


# ---- properties

sizes = st.integers(1, 5)


@st.composite
def any_case(draw: st.DrawFn) -> DeformConv2d:
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((reach, draw(st.integers(0, 3))) for reach in (dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    return DeformConv2d(
        f"drawn {draw(st.integers(0, 99))}", batch=draw(sizes),
        channels=math.lcm(groups, offset_groups) * draw(st.integers(1, 2)),
        size=(draw(sizes), draw(sizes)), out_channels=groups * draw(st.integers(1, 3)), kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))), padding=padding, dilation=dilation,
        groups=groups, offset_groups=offset_groups, bias=draw(st.booleans()), mask=draw(st.booleans()),
        reach=draw(st.sampled_from([0.0, 0.5, 3.0, 100.0])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(any_case())
def test_linear_in_the_input(case: DeformConv2d) -> None:
    """The gradient is the adjoint: <grad_input, v> = <grad_output, f(v)>, and the same for the weight."""
    tensors, grad_output = {**case.tensors(), "bias": None}, case.grad_output()
    grads = case.backward(tensors, grad_output)
    product = (grad_output * case.forward(tensors)).sum()
    for name in ("input", "weight"):
        assert (grads[name] * tensors[name]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(any_case())
def test_layouts_and_images_are_independent(case: DeformConv2d) -> None:
    tensors = case.tensors()
    out = case.forward(tensors)
    last = replace(case, layout="NHWC")
    np.testing.assert_allclose(last.planar(last.forward(last.tensors())), out, rtol=1e-12, atol=1e-12)
    image = {name: t[-1:] if name in IMAGES and t is not None else t for name, t in tensors.items()}
    np.testing.assert_allclose(case.forward(image), out[-1:], rtol=1e-12, atol=1e-12)


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


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**33)])
def test_offsets_that_point_nowhere(bad: float, layout: str) -> None:
    """They sample 0, give the input, themselves and their mask no gradient, and disturb no other sample."""
    case = DeformConv2d("nowhere", batch=1, channels=2, size=(4, 4), out_channels=2, bias=False, layout=layout)
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    spoiled = {**tensors, "offset": tensors["offset"].copy()}
    silent = {**tensors, "mask": tensors["mask"].copy()}
    case.planar(spoiled["offset"])[0, 4, 1, 2] = bad  # the third tap's dy
    case.planar(silent["mask"])[0, 2, 1, 2] = 0  # the same tap switched off
    np.testing.assert_allclose(case.forward(spoiled), case.forward(silent), rtol=1e-5, atol=1e-5)
    grads, want = case.backward(spoiled, grad_output), case.backward(silent, grad_output)
    case.planar(want["mask"])[0, 2, 1, 2] = 0
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
    case = DeformConv2d("empty", batch=0)
    assert case.forward(case.tensors()).shape == (0, 4, 7, 6)
    grads = case.backward(case.tensors(), case.grad_output())
    assert grads["input"].shape == (0, 4, 7, 6)
    assert np.array_equal(grads["weight"], np.zeros((4, 4, 3, 3)))
    no_channels = DeformConv2d("no channels", out_channels=0)
    assert no_channels.forward(no_channels.tensors()).size == 0
