"""The RoI pooling operators on raw arrays: the CPU path, the emulated kernels, and the real ones if there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases.case import DTYPES, error, widened
from cases.pooling import (
    BY_NAME,
    CASES,
    PLAIN,
    SMALL,
    WIDE,
    DeformPSRoIPool,
    DeformRoIPool,
    PSRoIPool,
    RoIAvgPool,
    RoIPooling,
)
from engines import onnx_runtime, openvino
from every_case import EveryCase, EverySmallCase, agrees_with_float64, launched
from hypothesis import HealthCheck, given, settings, strategies as st

import cudcn
from cudcn import emulator, launch
from cudcn.cuda import pooling
from cudcn.cuda.sort import Segments

f4 = np.float32


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
class TestEveryCase(EveryCase):
    pass


@pytest.mark.parametrize("case", [*SMALL, *WIDE], ids=str)
class TestEverySmallCase(EverySmallCase):
    pass


# ---- the CPU path


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("limit", "value"), [("_PIECE", 1), ("_PIECE", 4000), ("_STRIP", 300), ("_BINS", 7), ("_CUT", 3)]
)
def test_pieces_of_any_size(case: RoIPooling, limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a bin too: one that is cut is the sum of its pieces."""
    from cudcn.cpu import pooling

    tensors, grad_output = case.tensors(), case.grad_output()
    out, want = case.forward(tensors), case.backward(tensors, grad_output)
    monkeypatch.setattr(pooling, limit, value)
    case.close(case.forward(tensors), out, "float64")
    for tensor, grad in case.backward(tensors, grad_output).items():
        assert want[tensor] is None or error(grad, want[tensor]) < 1e-14


# ---- the kernels

_SIZES: dict[str, Any] = {"batch": 2, "size": (50, 75), "rois": 60, "channels": 3, "spatial_scale": 1.0}
SPREAD: list[RoIPooling] = [
    RoIAvgPool("spread", **_SIZES, output_size=(1, 3)),
    PSRoIPool("spread", **_SIZES, output_size=(4, 3), group_size=(2, 3)),
    DeformRoIPool("spread", **{**_SIZES, "channels": 35}, output_size=(2, 1), sampling_ratio=0),
    DeformRoIPool("few samples", **_SIZES, output_size=(2, 1), sampling_ratio=2, channels_last=True),
    DeformPSRoIPool("spread", **_SIZES, output_size=1),
    DeformRoIPool("crowded", **{**_SIZES, "size": (9, 3), "rois": 400, "channels": 1}, output_size=(2, 1)),
]


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    def test_every_instance_in_the_list_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = launched(monkeypatch)
        for dtype in DTYPES:
            for case in (*PLAIN, *WIDE):
                agrees_with_float64(case, dtype)
        assert seen == set(pooling.kernels())

    @pytest.mark.parametrize("case", WIDE, ids=str)
    @pytest.mark.parametrize(("view", "width"), [
        ("whole", 4), ("a part of the channels", 4), ("every other pixel", 4), ("rows of odd length", 1),
        ("not aligned", 1), ("planar", 1),
    ])  # fmt: skip
    def test_channels_are_read_16_bytes_at_a_time_where_all_are_aligned(
        self, case: RoIPooling, view: str, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors, grad_output = dict(case.tensors("float32")), case.grad_output("float32")
        image = tensors["input"].transpose(0, 2, 3, 1)
        n, h, w, c = image.shape
        room = {
            "whole": np.zeros(image.shape, f4),
            "a part of the channels": np.zeros((n, h, w, c + 8), f4)[..., 4 : 4 + c],
            "every other pixel": np.zeros((n, h, 2 * w, c), f4)[:, :, ::-2],
            "rows of odd length": np.zeros((n, h, w * c + 1), f4)[..., :-1].reshape(n, h, w, c),
            "not aligned": np.zeros((n, h, w, c + 4), f4)[..., 1 : 1 + c],
            "planar": np.zeros((n, c, h, w), f4).transpose(0, 2, 3, 1),
        }[view]
        room[...] = image
        tensors["input"] = room.transpose(0, 3, 1, 2)
        seen = launched(monkeypatch)
        out, grads = case.forward(tensors), case.backward(tensors, grad_output)
        expressions = [kernel.expression for kernel in seen if kernel.source == "pooling"]
        assert expressions
        assert all(expression.endswith(f", {width}>") for expression in expressions)
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            want, want_grads = case.forward(tensors), case.backward(tensors, grad_output)
        case.close(out, want, "float32")
        for name, grad in want_grads.items():
            assert grad is None or error(grads[name], grad) < 1e-5, name

    @pytest.mark.parametrize("name", ["deform_roi_pool many channels", "deform_psroi_pool more parts"])
    def test_the_offset_s_gradient_is_deterministic(self, name: str) -> None:
        """As bits, in whatever order the threads run."""
        case = BY_NAME[name]
        tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
        first, second = [], []
        for order, grads in (("forward", first), ("reverse", second)):
            with emulator.settings(build="fast", order=order):
                grads.append(case.backward(tensors, grad_output))
        assert np.array_equal(first[0]["offset"], second[0]["offset"])
        assert np.array_equal(first[0]["mask"], second[0]["mask"])

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("case", SPREAD, ids=str)
    def test_bins_of_all_sizes(self, case: RoIPooling, dtype: str) -> None:
        """In all grids that they are sorted into, with lists that a block sorts; and two slabs of channels."""
        with emulator.settings(build="fast", order="random"):
            got = case.backward(case.tensors(dtype), case.grad_output(dtype))["input"]
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            want = case.backward(widened(case.tensors(dtype)), case.grad_output(dtype).astype(np.float64))["input"]
        case.close(got, want, dtype)

    def test_a_class_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = BY_NAME["deform_psroi_pool more parts"]  # of three classes
        seen: list[tuple[int, int]] = []
        made = pooling._PLANES
        monkeypatch.setattr(Segments, "at_a_time", lambda *_: 2)
        monkeypatch.setattr(
            pooling, "_PLANES", lambda **f: (seen.append((f["first_class"], f["classes"])), made(**f))[1]
        )
        agrees_with_float64(case, "float64")
        assert seen == [(0, 2), (2, 1)]

    def test_too_many_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the input's gradient: 2 images of 2 tiles."""
        case = BY_NAME["roi_avg_pool plain"]
        monkeypatch.setattr(launch, "LARGEST_GRID", 3)
        with pytest.raises(ValueError, match=r"roi_avg_pool: the input's gradient needs 4 blocks, CUDA takes 3"):
            case.backward(case.tensors(), case.grad_output())


coordinates = st.floats(-30, 60, width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.1, 0.3, 1 / 3, 1 / 16]), st.integers(1, 7), st.integers(0, 3),
)  # fmt: skip
def test_bins_are_the_same_on_every_device(boxes: Any, scale: float, bins: int, samples: int) -> None:
    """In float32 as bits: a border that is rounded otherwise would take or leave a whole row."""
    rois = np.column_stack([np.zeros(len(boxes)), boxes]).astype(f4)
    image = np.random.default_rng(0).standard_normal((1, 1, 9, 11)).astype(f4)
    common = {"output_size": bins, "spatial_scale": scale}
    calls = [
        lambda: cudcn.roi_avg_pool(image, rois, **common),
        lambda: cudcn.deform_roi_pool(image, rois, **common, sampling_ratio=samples),
        lambda: cudcn.deform_psroi_pool(image, rois, **common, group_size=1),
    ]
    for call in calls:
        want = call()
        with pytest.MonkeyPatch.context() as device, emulator.settings(build="fast"):
            device.setenv("CUDCN_DEVICE", "emulator")
            np.testing.assert_allclose(call(), want, rtol=1e-4, atol=1e-5)


# ---- sums


@pytest.fixture(params=["cpu", "fast"])
def fast_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUDCN_DEVICE", "cpu" if request.param == "cpu" else "emulator")
    with emulator.settings(build="fast"):
        yield


LONG: list[RoIPooling] = [
    RoIAvgPool("long", batch=1, channels=1, size=(600, 700), rois=1, output_size=1, spatial_scale=1.0),
    PSRoIPool("long", batch=1, channels=1, size=(600, 700), rois=1, output_size=(1, 2), spatial_scale=1.0),
    DeformRoIPool("long", batch=1, size=(400, 300), channels=1, rois=1, output_size=1, sampling_ratio=0),
    DeformRoIPool("long, one pixel", batch=1, size=(2, 2), channels=2, rois=1, output_size=1, sampling_ratio=300),
    DeformPSRoIPool("long", batch=1, size=(20, 30), channels=1, rois=1, output_size=1, sample_per_part=300),
]


@pytest.mark.usefixtures("fast_device")
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sums_keep_their_precision(case: RoIPooling) -> None:
    """On a ramp, whose slopes are all alike. Single weights and slopes have the rounding of positions in float32."""
    (height, width), scale = case.size, case.spatial_scale
    tensors = dict(case.tensors("float32"))
    ramp = 1.1 + 0.1 * np.arange(width) / width + 0.3 * np.arange(height)[:, None] / height
    tensors["input"] = np.broadcast_to(ramp, tensors["input"].shape).astype(f4)
    tensors["rois"] = np.array([[0, 0, 0, (width - 1) / scale, (height - 1) / scale]], f4)
    if "offset" in tensors:
        tensors["offset"] = np.full_like(tensors["offset"], 0.003)
    grad_output = np.full(case.output_shape(), 0.7, f4)
    got = {"output": case.forward(tensors), **case.backward(tensors, grad_output)}
    with pytest.MonkeyPatch.context() as cpu:
        cpu.setenv("CUDCN_DEVICE", "cpu")
        wide = widened(tensors)
        want = {"output": case.forward(wide), **case.backward(wide, grad_output.astype(np.float64))}
    for name, array in want.items():
        assert array is None or error(got[name], array) < (1e-6 if name in ("output", "mask") else 5e-6), name


@pytest.mark.usefixtures("fast_device")
def test_ones_over_many_pixels() -> None:
    """More than float32 counts."""
    ones = np.ones((1, 1, 4700, 4700), f4)
    assert cudcn.roi_avg_pool(ones, np.array([[0, 0, 0, 4699, 4699]], f4), output_size=1).item() == 1
    ones = ones[..., :800, :800]
    pooled = cudcn.deform_roi_pool(ones, np.array([[0, 0, 0, 800, 800]], f4), output_size=1).item()
    assert pooled == pytest.approx(1, abs=2e-7)


@pytest.mark.usefixtures("fast_device")
@pytest.mark.parametrize("located", [1 << 13, 16])
def test_many_bins_read_one_pixel(located: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few or many times as many as the CPU path locates at a time."""
    from cudcn.cpu import pooling

    monkeypatch.setattr(pooling, "_BINS", located)
    grad_output, pixel = np.full((30_000, 1, 1, 1), 0.1, f4), np.ones((1, 1, 1, 1), f4)
    grads = cudcn.roi_avg_pool_backward(grad_output, pixel, np.zeros((30_000, 5), f4), output_size=1)
    assert grads.input.item() == pytest.approx(30_000 * float(f4(0.1)), rel=2e-7)


@pytest.mark.usefixtures("fast_device")
def test_many_bins_of_one_part() -> None:
    ramp = np.broadcast_to(0.1 * np.arange(64, dtype=f4), (1, 1, 64, 64))
    offset = np.zeros((1, 2, 1, 1), f4)
    tensors = ramp, np.array([[0, 1, 1, 61, 61]], f4), offset
    attributes = {"output_size": 200, "group_size": 1, "part_size": 1, "sample_per_part": 1}
    grad_output = np.full((1, 1, 200, 200), 0.1, f4)
    got = cudcn.deform_psroi_pool_backward(grad_output, *tensors, **attributes).offset
    want = 200 * 200 * 0.1 * 0.1 * 61 * 0.1  # bins, gradient, trans_std, size, slope
    assert got[0, 0].item() == pytest.approx(want, rel=5e-7)
    assert got[0, 1].item() == pytest.approx(0, abs=1e-3)


# ---- other libraries


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0625])
def test_openvino_psroi_pooling(scale: float) -> None:
    case = PSRoIPool("openvino", size=(20, 30), rois=20, output_size=3, spatial_scale=scale)
    tensors = case.tensors("float32")
    want = openvino(
        lambda ops, input, rois: ops.psroi_pooling(input, rois, case.channels, 3, scale, 1, 1, "average"),
        *tensors.values(),
    )
    case.close(case.forward(tensors), want, "float32")


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("parts", "classes"), [(3, 1), (3, 2), (2, 4)])
def test_openvino_deformable_psroi_pooling(offset: bool, parts: int, classes: int) -> None:
    case = DeformPSRoIPool(
        "openvino", size=(20, 30), rois=20, output_size=3, group_size=3, part_size=parts, classes=classes, channels=4,
        sample_per_part=4, spatial_scale=0.25, mask=False, offset=offset,
    )  # fmt: skip
    tensors = case.tensors("float32")

    def build(ops: Any, input: Any, rois: Any, *offsets: Any) -> Any:
        given = {"offsets": offsets[0]} if offsets else {}
        return ops.deformable_psroi_pooling(
            input, rois, case.channels, 0.25, 3, "bilinear_deformable", 4, 4, 0.1, parts, **given
        )

    want = openvino(build, *[t for t in tensors.values() if t is not None])
    case.close(case.forward(tensors), want, "float32")


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_onnx_runtime_roi_align(sampling_ratio: int, scale: float) -> None:
    """Without offsets it is RoIAlign, aligned."""
    case = DeformRoIPool(
        "roi align", size=(20, 30), rois=20, output_size=(3, 4), spatial_scale=scale, sampling_ratio=sampling_ratio,
        offset=False, mask=False,
    )  # fmt: skip
    tensors = case.tensors("float32")
    rois = tensors["rois"].copy()
    rois[:, 3:] = np.maximum(rois[:, 3:], rois[:, 1:3])
    want = onnx_runtime(
        "RoiAlign", 16, {"x": tensors["input"], "rois": rois[:, 1:].copy(), "index": rois[:, 0].astype(np.int64)},
        output_height=3, output_width=4, spatial_scale=scale, sampling_ratio=sampling_ratio,
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    for offset in (None, np.zeros((20, 2, 3, 4), f4)):
        case.close(case.forward({**tensors, "rois": rois, "offset": offset}), want, "float32")


# ---- properties

sizes = st.integers(1, 5)
pairs = st.tuples(sizes, sizes)


@st.composite
def any_case(draw: st.DrawFn) -> RoIPooling:
    kind = draw(st.sampled_from([RoIAvgPool, PSRoIPool, DeformRoIPool, DeformPSRoIPool]))
    sensitive = {"group_size": draw(pairs)} if kind in (PSRoIPool, DeformPSRoIPool) else {}
    deformable = {"offset": draw(st.booleans()), "mask": draw(st.booleans()), "reach": draw(st.sampled_from([0.5, 9]))}
    classes = draw(st.integers(1, 3))
    own: dict[Any, dict[str, Any]] = {
        DeformRoIPool: {**deformable, "sampling_ratio": draw(st.integers(0, 3))},
        DeformPSRoIPool: {
            **deformable, "part_size": draw(pairs), "sample_per_part": draw(st.integers(1, 4)), "classes": classes,
        },
    }  # fmt: skip
    return kind(
        f"drawn {draw(st.integers(0, 99))}", batch=draw(sizes), channels=classes * draw(st.integers(1, 2)),
        size=draw(pairs), rois=draw(st.integers(0, 6)), output_size=draw(pairs),
        spatial_scale=draw(st.sampled_from([1.0, 0.5, 0.1])), **sensitive, **own.get(kind, {}),
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(any_case())
def test_linear_in_the_input(case: RoIPooling) -> None:
    """The gradient is the adjoint: <grad_input, v> = <grad_output, f(v)>."""
    tensors, grad_output = case.tensors(), case.grad_output()
    product = (grad_output * case.forward(tensors)).sum()
    grads = case.backward(tensors, grad_output)
    assert (grads["input"] * tensors["input"]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)
    if tensors.get("mask") is not None:
        assert (grads["mask"] * tensors["mask"]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(any_case(), st.randoms(use_true_random=False))
def test_rois_are_independent(case: RoIPooling, random: Any) -> None:
    tensors, out = case.tensors(), case.forward(case.tensors())
    order = random.sample(range(case.rois), random.randint(0, case.rois))
    chosen = {n: t if n == "input" or t is None else t[order] for n, t in tensors.items()}
    np.testing.assert_allclose(case.forward(chosen), out[order], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(any_case())
def test_values_are_between_the_pixels(case: RoIPooling) -> None:
    """A mean is: at least where a bin's samples all count, and 0 otherwise draws it there."""
    out = case.forward({**case.tensors(), **({"mask": None} if "mask" in case.op.tensors else {})})
    assert (np.abs(out) <= np.abs(case.tensors()["input"]).max() * (1 + 1e-12)).all()


def test_one_group_is_the_plain_average() -> None:
    tensors = RoIAvgPool("again", channels=5).tensors()
    out = cudcn.roi_avg_pool(**tensors, output_size=(3, 2), spatial_scale=0.5)
    assert np.array_equal(cudcn.psroi_pool(**tensors, output_size=(3, 2), group_size=1, spatial_scale=0.5), out)


def test_halves_are_rounded_away_from_zero() -> None:
    """The first bin of [2.5, 3.5] starts at column 3, that of [-0.5, 0.5] at column -1."""
    columns = np.arange(8.0).reshape(1, 1, 1, 8)
    rois = np.array([[0, 2.5, 0, 3.5, 0], [0, -0.5, 0, 0.5, 0], [0, 0.49999997, 0, 1, 0]])
    out = cudcn.roi_avg_pool(columns, rois, output_size=1)
    assert out.ravel().tolist() == [3.5, 0.5, 0.5]
