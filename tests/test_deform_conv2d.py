"""deform_conv2d on raw arrays: the CPU path, the emulated kernels, and the real ones where there is a GPU."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases.case import DTYPES, HALVES, error, widened
from cases.deform_conv2d import BY_NAME, CASES, IMAGES, PLAIN, SMALL, DeformConv2d
from engines import onnx_runtime, openvino
from every_case import EveryCase, EverySmallCase, agrees_with_float64, launched
from hypothesis import given, settings, strategies as st

import cudcn
from cudcn import emulator, launch
from cudcn.ops.deform_conv2d import OP

TILED = [
    DeformConv2d("tiles of pixels", batch=3, channels=3, size=(9, 10), out_channels=5),
    DeformConv2d("tiles of outs", channels=70, size=(3, 4), out_channels=260, offset_groups=5, groups=2, kernel=(2, 1)),
    DeformConv2d("many small groups", batch=3, channels=72, size=(6, 8), out_channels=36, groups=36, layout="NHWC"),
    DeformConv2d("more outs than channels", channels=70, size=(5, 4), out_channels=210, groups=70, offset_groups=2),
]


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
        """Two images of five fit the workspace, backward one."""
        case = replace(BY_NAME[f"groups {layout}"], batch=5)
        packed = math.prod(case.size) * case.channels * 2 * 8  # each channel is a part, with as much behind it
        monkeypatch.setattr(launch, "WORKSPACE", 2 * packed)
        seen: list[str] = []
        run = OP.cuda._Call._convolution

        def spy(self: Any, images: slice) -> Any:
            seen.append(f"{images.start}:{images.stop}")
            return run(self, images)

        monkeypatch.setattr(OP.cuda._Call, "_convolution", spy)
        agrees_with_float64(case, "float64")
        assert seen == ["0:2", "2:4", "4:5", *(f"{n}:{n + 1}" for n in range(5) for _ in range(3))]

    def test_too_many_blocks(self) -> None:
        """Of zeros that take no memory."""
        image, offset = (np.broadcast_to(np.zeros(1, np.float32), (1, n, 1 << 14, 1 << 15)) for n in (1, 514))
        tensors = image, offset, np.zeros((1, 1, 1, 257), np.float32), None, None
        geometry = OP.geometry(cudcn.op.specs(tensors), **OP.canonical(**{**PLAIN.attributes, "padding": (0, 128)}))
        with pytest.raises(ValueError, match=r"deform_conv2d: on CUDA one image must .* got 536870912 and 1077936128"):
            launch.run(OP.cuda.backward, geometry, (None, offset, None, None, None), (image, *tensors))

    def test_too_many_pixels(self) -> None:
        """The output is small, the input is not."""
        image = np.broadcast_to(np.zeros(1, np.float32), (1, 1, 1 << 15, 1 << 15))
        tensors = image, np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32), None, None
        geometry = OP.geometry(
            cudcn.op.specs(tensors), **OP.canonical(**{**PLAIN.attributes, "stride": 1 << 15, "padding": 0})
        )
        grad_output = np.zeros((1, 1, 1, 1), np.float32)
        with pytest.raises(ValueError, match=r"deform_conv2d: on CUDA one image must .* got 1073807361 and 8389121"):
            launch.run(OP.cuda.backward, geometry, (image, None, None, None, None), (grad_output, *tensors))

    def test_strided_input_is_read(self) -> None:
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
        # halves are packed, as all weights are; the bias has two, which float64 shares; and the sort four of any dtype
        assert len(seen) == 8 * len(DTYPES) + 2 + 7 + 4
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
        launch.run(lambda plan, _, outs, images: OP.cuda._sum_pixels(plan, images, *outs), None, [sums], [grad_output])
        assert (sums == grad_output[0, 0].size).all()

    @pytest.mark.parametrize("case", [BY_NAME["groups NCHW"], BY_NAME["depthwise NHWC"]], ids=str)
    @pytest.mark.parametrize("most", [1, 3])
    def test_the_weights_sums_are_taken_in_runs(
        self, case: DeformConv2d, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of 128 pixels, so that 1400 are eleven, one or three in a launch; `totals` has those before."""
        case = replace(case, size=(20, 35))
        elements = math.prod(case.tensors()["weight"].shape)
        monkeypatch.setattr(OP.cuda, "_RUN", 128)
        monkeypatch.setattr(launch, "WORKSPACE", most * elements * 4)
        seen: list[Any] = []
        splits = OP.cuda._SPLITS
        monkeypatch.setattr(OP.cuda, "_SPLITS", lambda **fields: (seen.append(fields), splits(**fields))[1])
        monkeypatch.setattr(OP.cuda._Call, "chunks", lambda *_: [slice(0, 2)])
        agrees_with_float64(case, "float32")
        assert [(f["first"], f["run"]) for f in seen] == [(n, 128) for n in range(0, 1400, most * 128)]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", TILED, ids=str)
    def test_more_than_one_tile(self, case: DeformConv2d, dtype: str) -> None:
        with emulator.settings(build="fast", order="random", seed=1):
            agrees_with_float64(case, dtype)

    @pytest.mark.parametrize("build", ["fast", "check"])
    def test_tf32(self, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """10 bits of each factor are left, rounded to nearest: 3e-4 of a sum, where truncation would leave 5e-4."""
        case = TILED[0] if build == "fast" else BY_NAME["plain v2 NCHW"]
        seen = launched(monkeypatch)
        tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
        with launch.allow_tf32(True), emulator.settings(build=build, order="random"):
            got = {"out": case.forward(tensors), **case.backward(tensors, grad_output)}
        assert seen <= set(OP.cuda.kernels())
        assert sum("Tf32" in kernel.expression for kernel in seen) == 4
        monkeypatch.setenv("CUDCN_DEVICE", "cpu")
        wanted = {"out": case.forward(widened(tensors)), **case.backward(widened(tensors), grad_output.astype(float))}
        for name in set(wanted) - {"bias"}:
            if wanted[name] is not None:
                assert 1e-5 < error(got[name], wanted[name]) < 4e-4, name

    def test_tf32_is_as_cupys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, allowed in ("", False), ("0", False), ("1", True):
            monkeypatch.setenv("CUPY_TF32", value)
            launch.forget()
            assert launch.tf32() is allowed

    @pytest.mark.parametrize("dtype", HALVES)
    def test_checking_build_of_the_largest_tile(self, dtype: str) -> None:
        case = DeformConv2d("large", batch=1, channels=40, size=(3, 4), out_channels=66, kernel=(2, 1), padding=0)
        with emulator.settings(build="check", order="random"):
            agrees_with_float64(case, dtype)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("case", [*TILED[:1], *TILED[2:], BY_NAME["far offsets NHWC"]], ids=str)
    def test_gradients_have_the_same_bits_in_every_order(self, case: DeformConv2d, dtype: str) -> None:
        tensors, grad_output = case.tensors(dtype), case.grad_output(dtype)
        runs = []
        for order in ("forward", "reverse", "random"):
            with emulator.settings(build="fast", order=order, seed=2):
                runs.append(case.backward(tensors, grad_output))
        for name in tensors:
            assert {None if run[name] is None else run[name].tobytes() for run in runs} == {
                None if runs[0][name] is None else runs[0][name].tobytes()
            }, name

    @pytest.mark.parametrize("build", ["fast", "check"])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("place", [(2.0, 3.0), (2.25, 3.75), (-0.5, 6.5)], ids=str)
    def test_all_samples_at_one_place(self, place: tuple[float, float], groups: int, build: str) -> None:
        """A hundred and ten of each tap: more than one thread sorts, and than one row's threads add."""
        case = DeformConv2d(
            "one place", batch=2, channels=6, size=(10, 11), kernel=(2, 1), padding=((1, 0), (0, 0)), groups=groups
        )
        tensors = {**case.tensors("float32"), "offset": np.empty_like(case.tensors("float32")["offset"])}
        for tap in range(2):
            tensors["offset"][:, 2 * tap] = place[0] + 1 - tap - np.arange(10)[:, None]
            tensors["offset"][:, 2 * tap + 1] = place[1] - np.arange(11)
        with emulator.settings(build=build, order="random"):
            grads = case.backward(tensors, case.grad_output("float32"))
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            wants = case.backward(widened(tensors), case.grad_output("float32").astype(np.float64))
        for name, want in wants.items():
            case.close(grads[name], want, "float32")

    @pytest.mark.parametrize("case", [BY_NAME["plain v2 NHWC"], BY_NAME["depthwise NCHW"]], ids=str)
    def test_a_nan_or_an_infinity_goes_where_the_cpu_has_it(self, case: DeformConv2d) -> None:
        """In a weight it meets the zeros of samples that are left out, too; in a mask, none of other channels."""
        case = replace(case, channels=6, out_channels=6, mask=True, reach=4.0)
        for name, bad in itertools.product(("input", "weight", "mask", "bias"), (np.nan, np.inf)):
            tensors = {key: None if t is None else t.copy() for key, t in case.tensors("float32").items()}
            if tensors[name] is None:
                continue
            tensors[name].reshape(-1)[7 % tensors[name].size] = bad
            out = case.forward(tensors)
            with pytest.MonkeyPatch.context() as cpu:
                cpu.setenv("CUDCN_DEVICE", "cpu")
                want = case.forward(tensors)
            np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4, err_msg=f"{name} {bad}")

    @pytest.mark.parametrize("outs", [3, 4, 8])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_an_infinite_mask_makes_infinite_gradients(self, dtype: str, outs: int) -> None:
        """Not NaN, where it meets the zeros behind a row of outs."""
        ones = functools.partial(np.ones, dtype=dtype)
        mask, offset = ones((1, 1, 4, 4)), np.full((1, 2, 4, 4), 0.25, dtype)
        mask[0, 0, 1, 1] = np.inf
        tensors = {"input": ones((1, 4, 4, 4)), "offset": offset, "weight": ones((outs, 4, 1, 1)), "mask": mask}
        got = cudcn.deform_conv2d_backward(ones((1, outs, 4, 4)), **tensors).input
        assert np.isinf(got).sum() == 4 * 4
        assert not np.isnan(got).any()

    @pytest.mark.parametrize(
        ("dtype", "channels", "outs", "rel"),
        [("float32", 1 << 16, 1, 5e-6), ("float32", 1 << 19, 1, 2e-5), ("float16", 1 << 17, 65, 2**-11)],
    )
    def test_a_long_sum_keeps_its_precision(self, dtype: str, channels: int, outs: int, rel: float) -> None:
        """Of equal terms, so that the rounding of a running float32 sum goes one way, off by 1e-3 and more."""
        tenth = DTYPES[dtype](0.1)
        image, offset = np.full((1, channels, 1, 1), tenth), np.zeros((1, 2, 1, 1), tenth.dtype)
        out = cudcn.deform_conv2d(image, offset, np.ones((outs, channels, 1, 1), tenth.dtype))
        assert out.astype(float) == pytest.approx(np.full((1, outs, 1, 1), float(tenth) * channels), rel=rel)

    @pytest.mark.parametrize("dtype", ["float32", *HALVES])
    def test_gradients_of_offset_and_mask_over_many_outs(self, dtype: str) -> None:
        tenth, outs = DTYPES[dtype](0.1), 100_000
        tensors = {
            "input": np.ones((1, 1, 1, 1), tenth.dtype), "offset": np.full((1, 2, 1, 1), 0.25, np.float32),
            "weight": np.full((outs, 1, 1, 1), tenth), "mask": np.ones((1, 1, 1, 1), np.float32),
        }  # fmt: skip
        grads = cudcn.deform_conv2d_backward(np.full((1, outs, 1, 1), tenth), **tensors)
        total = outs * float(tenth) ** 2
        assert grads.offset == pytest.approx(np.full((1, 2, 1, 1), -0.75 * total), rel=1e-4)
        assert grads.mask.item() == pytest.approx(0.75**2 * total, rel=1e-4)

    def test_many_small_taps(self) -> None:
        """Of a depthwise convolution, whose products are no tile's."""
        tenth, side = np.float32(0.1), 101
        image, offset = np.full((1, 2, side, side), tenth), np.zeros((1, 2 * side * side, 1, 1), np.float32)
        out = cudcn.deform_conv2d(image, offset, np.ones((2, 1, side, side), np.float32))
        assert out == pytest.approx(np.full((1, 2, 1, 1), float(tenth) * side**2), rel=3e-6)

    @pytest.mark.parametrize(("channels", "groups"), [(4, 1), (4, 4), (72, 1)])
    def test_sums_that_float16_does_not_hold(self, channels: int, groups: int) -> None:
        """32 rows of grad_output meet in a pixel; the gradient there is finite or infinite as on the CPU, and others'
        small gradients keep their precision."""
        y, x = np.mgrid[:8, :8]
        offset = np.stack([np.where(y < 4, 2 - y, 0), np.where(y < 4, 3 - x, 0)])[None].astype(np.float16)
        grad_output = np.where(y < 4, 6e4, 1e-3 * (1 + x)) * np.ones((1, 4, 1, 1))
        weight = np.full((4, channels // groups, 1, 1), 2.0**-12)
        weight[1 if groups > 1 else slice(None), -1] = 1
        image = np.zeros((1, channels, 8, 8), np.float16)
        tensors = image, offset, weight.astype(np.float16)
        got = cudcn.deform_conv2d_backward(grad_output.astype(np.float16), *tensors).input
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            wide = (tensor.astype(np.float64) for tensor in tensors)
            want = cudcn.deform_conv2d_backward(grad_output.astype(np.float16).astype(np.float64), *wide).input
        with np.errstate(over="ignore"):
            want = want.astype(np.float16)
        assert np.isinf(want).sum() == 1
        assert 100 < want[0, 0, 2, 3] < 1e4
        np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=1e-3, atol=2.0**-24)


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
    arranged = {name: last.arranged(t) if name in IMAGES else t for name, t in tensors.items()}
    np.testing.assert_allclose(last.planar(last.forward(arranged)), out, rtol=1e-12, atol=1e-12)
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


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_image_without_pixels(size: tuple[int, int], groups: int, layout: str) -> None:
    """All that is read is padding."""
    case = DeformConv2d("nothing", size=size, padding=2, groups=groups, layout=layout)
    tensors = case.tensors()
    out = case.planar(case.forward(tensors))
    np.testing.assert_array_equal(out, np.broadcast_to(tensors["bias"][:, None, None], out.shape))
    grads, grad_output = case.backward(tensors, case.grad_output()), case.planar(case.grad_output())
    assert grads["input"].shape == tensors["input"].shape
    assert not any(grads[name].any() for name in ("offset", "weight", "mask"))
    np.testing.assert_allclose(grads["bias"], grad_output.sum((0, 2, 3)), rtol=1e-12)
