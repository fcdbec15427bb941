"""The RoI pooling operators on raw arrays: the CPU path, the emulated kernels, and the real ones if there is a GPU."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from operator_case import DTYPES, HALVES, EveryCase, EverySmallCase, agrees_with_float64, error, launched, widened
from pooling_cases import BY_NAME, CASES, SMALL, DeformPSRoiPool, DeformRoiPool, PSRoiPool, RoiAvgPool, RoiPooling

import cudcn
from cudcn import emulator
from cudcn.cuda import pooling

PLAIN = [case for case in CASES if case.name == "plain"]  # one of each operator
f4 = np.float32


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCase(EveryCase):
    pass


@pytest.mark.parametrize("case", SMALL, ids=str)
class TestEverySmallCase(EverySmallCase):
    pass


# ---- the CPU path


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_bits_do_not_depend_on_the_run_nor_on_the_threads(case: RoiPooling, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(case, size=(90, 100), rois=300, channels=40, spatial_scale=0.25)
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    results = []
    for threads in ("1", "2", "7", "7"):
        monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
        results.append({"output": case.forward(tensors), **case.backward(tensors, grad_output)})
    for result in results[1:]:
        for name, array in result.items():
            assert array is None or np.array_equal(array, results[0][name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("limit", "value"), [("_PIECE", 1), ("_PIECE", 4000), ("_STRIP", 300), ("_BINS", 7), ("_CUT", 3)]
)
def test_pieces_of_any_size(case: RoiPooling, limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bin too: one that is cut is the sum of its pieces."""
    from cudcn.cpu import pooling

    tensors, grad_output = case.tensors(), case.grad_output()
    out, want = case.forward(tensors), case.backward(tensors, grad_output)
    monkeypatch.setattr(pooling, limit, value)
    case.close(case.forward(tensors), out, "float64")
    for tensor, grad in case.backward(tensors, grad_output).items():
        assert want[tensor] is None or error(grad, want[tensor]) < 1e-14


WHOLE = [
    ("psroi_pool", (1, 49, 256, 256), 300, {"output_size": 7}),
    ("roi_avg_pool", (1, 1, 2048, 2048), 1, {"output_size": 1}),
    ("roi_avg_pool", (1, 1, 8, 8), 10_000, {"output_size": 7}),
    ("deform_roi_pool", (1, 16, 200, 200), 100, {"output_size": 7}),
    ("deform_psroi_pool", (1, 49, 64, 64), 300, {"output_size": 7, "group_size": 7, "part_size": 7}),
    ("deform_psroi_pool", (1, 4, 64, 64), 300, {"output_size": 1, "group_size": 1, "part_size": 200}),
]


@pytest.mark.parametrize(("name", "shape", "rois", "attributes"), WHOLE, ids=lambda value: str(value))
def test_scratch_memory_is_bounded(
    name: str, shape: tuple[int, ...], rois: int, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 64 MiB beyond an image in float32 and its gradient, however many samples and threads there are."""
    monkeypatch.setenv("CUDCN_NUM_THREADS", "32")
    image = np.ones(shape, f4)
    boxes = np.tile(np.array([[0, 0, 0, shape[3] - 1, shape[2] - 1]], f4), (rois, 1))
    part = attributes.get("part_size", 7)
    offset = [np.zeros((rois, 2, part, part), f4)] if name.startswith("deform") else []
    out, peak = peak_memory(lambda: getattr(cudcn, name)(image, boxes, *offset, **attributes))
    assert peak < out.nbytes + image.nbytes + (64 << 20)
    backward = getattr(cudcn, f"{name}_backward")
    grads, peak = peak_memory(lambda: backward(out, image, boxes, *offset, **attributes))
    own = sum(grad.nbytes for grad in grads if grad is not None)
    assert peak < own + 2 * image.nbytes + (64 << 20)


def peak_memory(call: Any) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_no_warning_of_numpy_escapes(case: RoiPooling, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this thread or another; pytest makes errors of them."""
    monkeypatch.setenv("CUDCN_NUM_THREADS", "2")
    case = replace(case, size=(60, 50), rois=120, channels=24)
    for value in (6e4, np.inf, np.nan):
        tensors = dict(case.tensors("float16", ("rois",)))
        tensors["input"] = np.full_like(tensors["input"], value)
        if tensors.get("mask") is not None:
            tensors["mask"] = np.full_like(tensors["mask"], 100)
            tensors["mask"][::2] = 0
        case.forward(tensors)
        case.backward(tensors, np.full_like(case.grad_output("float16"), value))


# ---- the kernels


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize("fine", [(), ("rois",), ("rois", "offset"), ("rois", "offset", "mask")], ids="-".join)
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("case", PLAIN, ids=str)
    def test_half_types(self, case: RoiPooling, dtype: str, fine: tuple[str, ...]) -> None:
        if set(fine) <= set(case.op.tensors):
            with emulator.settings(build="fast"):
                agrees_with_float64(case, dtype, fine)

    def test_checking_build_of_a_half_type(self) -> None:
        with emulator.settings(build="check", order="reverse"):
            agrees_with_float64(BY_NAME["deform_psroi_pool plain"], "float16", ("rois",))

    @pytest.mark.parametrize("case", PLAIN, ids=str)
    def test_strided_tensors(self, case: RoiPooling) -> None:
        """Whatever the memory order of the tensors and of the output's gradient."""
        tensors, grad_output = case.tensors(), case.grad_output()
        strided = {name: np.stack([t, t], -1)[..., 1] for name, t in tensors.items()}
        strided["input"] = np.asfortranarray(tensors["input"])
        case.close(case.forward(strided), case.expected(), "float64")
        want = case.backward(tensors, grad_output)
        for name, grad in case.backward(strided, np.asfortranarray(grad_output)).items():
            assert want[name] is None or error(grad, want[name]) < 1e-12

    def test_every_launched_instance_is_in_the_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which the NVRTC gate compiles for every architecture."""
        seen = launched(monkeypatch)
        for dtype in DTYPES:
            for case in PLAIN:
                agrees_with_float64(case, dtype)
        assert seen == set(pooling.kernels())

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


LONG: list[RoiPooling] = [
    RoiAvgPool("long", batch=1, channels=1, size=(600, 700), rois=1, output_size=1, spatial_scale=1.0),
    PSRoiPool("long", batch=1, channels=1, size=(600, 700), rois=1, output_size=(1, 2), spatial_scale=1.0),
    DeformRoiPool("long", batch=1, size=(400, 300), channels=1, rois=1, output_size=1, sampling_ratio=0),
    DeformRoiPool("long, one pixel", batch=1, size=(2, 2), channels=2, rois=1, output_size=1, sampling_ratio=300),
    DeformPSRoiPool("long", batch=1, size=(20, 30), channels=1, rois=1, output_size=1, sample_per_part=300),
]


@pytest.mark.usefixtures("fast_device")
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sums_keep_their_precision(case: RoiPooling) -> None:
    """Of a ramp, whose slopes are all alike. Single weights and slopes have the rounding of positions in float32."""
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
    case = PSRoiPool("openvino", size=(20, 30), rois=20, output_size=3, spatial_scale=scale)
    tensors = case.tensors("float32")
    want = openvino(
        lambda ops, input, rois: ops.psroi_pooling(input, rois, case.channels, 3, scale, 1, 1, "average"), tensors
    )
    case.close(case.forward(tensors), want, "float32")


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("parts", "classes"), [(3, 1), (3, 2), (2, 4)])
def test_openvino_deformable_psroi_pooling(offset: bool, parts: int, classes: int) -> None:
    case = DeformPSRoiPool(
        "openvino", size=(20, 30), rois=20, output_size=3, group_size=3, part_size=parts, classes=classes, channels=4,
        sample_per_part=4, spatial_scale=0.25, mask=False, offset=offset,
    )  # fmt: skip
    tensors = case.tensors("float32")

    def build(ops: Any, input: Any, rois: Any, *offsets: Any) -> Any:
        given = {"offsets": offsets[0]} if offsets else {}
        return ops.deformable_psroi_pooling(
            input, rois, case.channels, 0.25, 3, "bilinear_deformable", 4, 4, 0.1, parts, **given
        )

    case.close(case.forward(tensors), openvino(build, tensors), "float32")


def openvino(build: Any, tensors: dict[str, Any]) -> np.ndarray:
    import openvino
    from openvino import opset8

    given = [t for t in tensors.values() if t is not None]
    parameters = [opset8.parameter(t.shape, np.float32) for t in given]
    model = openvino.Model([build(opset8, *parameters)], parameters)
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given)[0]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_onnx_runtime_roi_align(sampling_ratio: int, scale: float) -> None:
    """Without offsets it is RoIAlign, aligned."""
    import onnxruntime
    from onnx import TensorProto, helper

    case = DeformRoiPool(
        "roi align", size=(20, 30), rois=20, output_size=(3, 4), spatial_scale=scale, sampling_ratio=sampling_ratio,
        offset=False, mask=False,
    )  # fmt: skip
    tensors = case.tensors("float32")
    rois = tensors["rois"].copy()
    rois[:, 3:] = np.maximum(rois[:, 3:], rois[:, 1:3])
    feed = {"x": tensors["input"], "rois": rois[:, 1:].copy(), "index": rois[:, 0].astype(np.int64)}
    node = helper.make_node(
        "RoiAlign", list(feed), ["y"], output_height=3, output_width=4, spatial_scale=scale,
        sampling_ratio=sampling_ratio, coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
    values = [helper.make_tensor_value_info(n, k, a.shape) for (n, a), k in zip(feed.items(), kinds, strict=True)]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, feed)
    for offset in (None, np.zeros((20, 2, 3, 4), f4)):
        case.close(case.forward({**tensors, "rois": rois, "offset": offset}), want, "float32")


# ---- properties

sizes = st.integers(1, 5)
pairs = st.tuples(sizes, sizes)


@st.composite
def any_case(draw: st.DrawFn) -> RoiPooling:
    kind = draw(st.sampled_from([RoiAvgPool, PSRoiPool, DeformRoiPool, DeformPSRoiPool]))
    sensitive = {"group_size": draw(pairs)} if kind in (PSRoiPool, DeformPSRoiPool) else {}
    deformable = {"offset": draw(st.booleans()), "mask": draw(st.booleans()), "reach": draw(st.sampled_from([0.5, 9]))}
    classes = draw(st.integers(1, 3))
    own: dict[Any, dict[str, Any]] = {
        DeformRoiPool: {**deformable, "sampling_ratio": draw(st.integers(0, 3))},
        DeformPSRoiPool: {
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
def test_linear_in_the_input(case: RoiPooling) -> None:
    """The gradient is the adjoint: <grad_input, v> = <grad_output, f(v)>."""
    tensors, grad_output = case.tensors(), case.grad_output()
    product = (grad_output * case.forward(tensors)).sum()
    grads = case.backward(tensors, grad_output)
    assert (grads["input"] * tensors["input"]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)
    if tensors.get("mask") is not None:
        assert (grads["mask"] * tensors["mask"]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(any_case(), st.randoms(use_true_random=False))
def test_rois_are_independent(case: RoiPooling, random: Any) -> None:
    tensors, out = case.tensors(), case.forward(case.tensors())
    order = random.sample(range(case.rois), random.randint(0, case.rois))
    chosen = {n: t if n == "input" or t is None else t[order] for n, t in tensors.items()}
    np.testing.assert_allclose(case.forward(chosen), out[order], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(any_case())
def test_values_are_between_the_pixels(case: RoiPooling) -> None:
    """A mean is: at least where a bin's samples all count, and 0 otherwise draws it there."""
    out = case.forward({**case.tensors(), **({"mask": None} if "mask" in case.op.tensors else {})})
    assert (np.abs(out) <= np.abs(case.tensors()["input"]).max() * (1 + 1e-12)).all()


def test_one_group_is_the_plain_average() -> None:
    tensors = RoiAvgPool("again", channels=5).tensors()
    out = cudcn.roi_avg_pool(**tensors, output_size=(3, 2), spatial_scale=0.5)
    assert np.array_equal(cudcn.psroi_pool(**tensors, output_size=(3, 2), group_size=1, spatial_scale=0.5), out)


def test_halves_are_rounded_away_from_zero() -> None:
    """The first bin of [2.5, 3.5] starts at column 3, that of [-0.5, 0.5] at column -1."""
    columns = np.arange(8.0).reshape(1, 1, 1, 8)
    rois = np.array([[0, 2.5, 0, 3.5, 0], [0, -0.5, 0, 0.5, 0], [0, 0.49999997, 0, 1, 0]])
    out = cudcn.roi_avg_pool(columns, rois, output_size=1)
    assert out.ravel().tolist() == [3.5, 0.5, 0.5]


# ---- the edges


BAD_COORDINATES = [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**33)]
ADAPTIVE = BY_NAME["deform_roi_pool adaptive"]  # which takes no bins of more than 2**23 pixels


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("case", "bad"),
    [*itertools.product(PLAIN, BAD_COORDINATES), *itertools.product([ADAPTIVE], BAD_COORDINATES[:3])],
    ids=str,
)
def test_rois_that_lie_nowhere(case: RoiPooling, bad: float) -> None:
    """NaN and infinity give 0 and no gradient; whatever the number, it is quick, and the others are undisturbed."""
    case = replace(case, rois=4)
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    out, want = (
        case.forward(tensors),
        case.backward(tensors, np.where(np.arange(4).reshape(4, 1, 1, 1), grad_output, 0)),
    )
    for coordinate in range(1, 5):
        rois = tensors["rois"].copy()
        rois[0, coordinate] = bad
        start = time.perf_counter()
        got = case.forward({**tensors, "rois": rois})
        grads = case.backward({**tensors, "rois": rois}, grad_output)
        assert time.perf_counter() - start < 20
        assert np.array_equal(got[1:], out[1:])
        assert all(np.isfinite(grad).all() for grad in grads.values() if grad is not None)
        if not np.isfinite(bad):
            assert not got[0].any()
            for name, grad in grads.items():
                assert grad is None or error(grad, want[name]) < 1e-5, name


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("bad", BAD_COORDINATES)
@pytest.mark.parametrize("case", [case for case in PLAIN if "offset" in case.op.tensors], ids=str)
def test_offsets_that_point_nowhere(case: RoiPooling, bad: float) -> None:
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    offset = tensors["offset"].copy()
    offset[1, 0, 2, 1] = bad
    out, got = case.forward(tensors), case.forward({**tensors, "offset": offset})
    assert not got[1, :, 2, 1].any()
    got[1, :, 2, 1] = out[1, :, 2, 1]
    assert np.array_equal(got, out)
    silent = grad_output.copy()
    silent[1, :, 2, 1] = 0
    grads, want = case.backward({**tensors, "offset": offset}, grad_output), case.backward(tensors, silent)
    for name, grad in grads.items():
        assert grad is None or error(grad, want[name]) < 1e-5, name


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("case", "half"),
    [*itertools.product(PLAIN, [1e4, 1e7, 1e15, 1e30]), *itertools.product([ADAPTIVE], [1e4, 1e7])],
    ids=str,
)
def test_rois_around_everything(case: RoiPooling, half: float) -> None:
    """Their work is that of the image, and what is far too small for a number is 0."""
    tensors = dict(case.tensors("float32"))
    tensors["rois"] = np.tile(np.array([0, -half, -half, half, half], f4), (len(tensors["rois"]), 1))
    start = time.perf_counter()
    results = [case.forward(tensors), *case.backward(tensors, case.grad_output("float32")).values()]
    assert time.perf_counter() - start < 20
    assert all(np.isfinite(result).all() for result in results if result is not None)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 2.0**25), ("float64", 4e9), ("float64", 1e300)])
def test_bins_of_too_many_samples(dtype: str, width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error on the CPU; on CUDA the roi yields 0 and gets no gradient."""
    case = replace(ADAPTIVE, rois=3, spatial_scale=1.0, mask=True)
    tensors, grad_output = dict(case.tensors(dtype)), case.grad_output(dtype)
    tensors["rois"] = np.array([[0, 1, 1, 5, 5], [0, 0, 1, width, 5], [1, 1, 1, 5, 5]], dtype)
    message = r"deform_roi_pool: with sampling_ratio 0 a bin must be at most 2\*\*23 pixels .* those of rois\[1\] are"
    with pytest.raises(ValueError, match=message):
        case.forward(tensors)
    with pytest.raises(ValueError, match=message):
        case.backward(tensors, grad_output)

    others = {n: t if n == "input" else t[[0, 2]] for n, t in tensors.items()}
    out, want = case.forward(others), case.backward(others, grad_output[[0, 2]])
    monkeypatch.setenv("CUDCN_DEVICE", "emulator")
    for build in ("fast", "check"):
        with emulator.settings(build=build):
            got, grads = case.forward(tensors), case.backward(tensors, grad_output)
        assert not got[1].any()
        assert error(got[[0, 2]], out) < 1e-5
        assert error(grads["input"], want["input"]) < 1e-5
        for name in ("offset", "mask"):
            assert not grads[name][1].any()
            assert error(grads[name][[0, 2]], want[name]) < 1e-5


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("size", [2.0**22, 3e6])
def test_bins_of_many_samples_of_which_few_lie_in_the_image(size: float) -> None:
    """Only these are visited, and all count."""
    roi = np.array([[0, -size, 0.5, size, 4.5]])
    out = cudcn.deform_roi_pool(np.ones((1, 1, 6, 8)), roi, output_size=1)
    assert out.item() == pytest.approx(10 / (2 * size), rel=1e-6)  # those at -1 to 8


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_bin_without_samples_is_0_whatever_its_mask_and_gradient_are(case: RoiPooling) -> None:
    """NaN where coordinates, or offsets, lead out of the image."""
    tensors, grad_output = dict(case.tensors("float32")), case.grad_output("float32").copy()
    for name, tensor in tensors.items():
        tensors[name] = tensor.copy()
    tensors["rois"][0, 1:] = [100, 100, 110, 110]
    tensors["rois"][1, 3] = np.nan
    silent = np.where(np.arange(4).reshape(4, 1, 1, 1) < 2, 0, grad_output)
    out, want = case.forward(tensors), case.backward(tensors, silent)
    grad_output[:2] = np.nan
    if "mask" in tensors:
        tensors["mask"][:2] = np.nan
    got, grads = case.forward(tensors), case.backward(tensors, grad_output)
    assert not got[:2].any()
    assert np.array_equal(got, out)
    for name, grad in grads.items():
        assert grad is None or error(grad, want[name]) < 1e-6, name
    for name in ("offset", "mask"):
        assert name not in grads or not grads[name][:2].any()


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("where", [(2, 3), (3, 2), (3, 3)])
def test_a_sample_on_a_pixel_reads_its_neighbours_too(where: tuple[int, int]) -> None:
    """Those below and to the right, of weight 0: NaN there is NaN. In other pixels it is not seen."""
    image = np.random.default_rng(0).standard_normal((1, 1, 6, 6))
    deform_roi = {"rois": np.array([[0, 2.0, 2, 3, 3]]), "output_size": 1, "sampling_ratio": 1}
    deform_psroi = {"rois": np.array([[0, 2.0, 2, 2, 2]]), "output_size": 1, "group_size": 1, "sample_per_part": 1}
    half = {"offset": np.full((1, 2, 1, 1), 0.5), "trans_std": 1.0}  # from the pixel's edge to its middle
    for call in (
        lambda x: cudcn.deform_roi_pool(x, **deform_roi), lambda x: cudcn.deform_psroi_pool(x, **deform_psroi, **half),
    ):  # fmt: skip
        assert call(image).item() == image[0, 0, 2, 2]
        bad = np.full_like(image, np.nan)
        bad[0, 0, 2:4, 2:4] = image[0, 0, 2:4, 2:4]
        assert call(bad).item() == image[0, 0, 2, 2]
        bad[0, 0][where] = np.nan
        assert np.isnan(call(bad).item())


MANY_SAMPLES = [
    RoiAvgPool("many samples", size=(30, 40)),
    PSRoiPool("many samples", size=(30, 40)),
    DeformRoiPool("many samples", sampling_ratio=9),
    DeformPSRoiPool("many samples", sample_per_part=9),
]


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("case", MANY_SAMPLES, ids=str)
def test_the_sum_over_infinite_pixels_is_infinite(case: RoiPooling, value: float) -> None:
    tensors = dict(case.tensors("float32"))
    plain = case.forward({**tensors, "input": np.ones_like(tensors["input"])})
    got = case.forward({**tensors, "input": np.full_like(tensors["input"], value)})
    assert np.array_equal(got, np.where(plain == 0, 0, f4(value)))


@pytest.mark.parametrize("bad", [-1, 2, 0.5, np.nan, np.inf, -0.25, 1e30])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_batch_index_out_of_range(case: RoiPooling, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error on the CPU; on CUDA the roi yields 0 and gets no gradient, and nothing is read."""
    tensors, grad_output = dict(case.tensors("float32")), case.grad_output("float32")
    tensors["rois"] = tensors["rois"].copy()
    tensors["rois"][2, 0] = bad
    message = rf"{case.op.name}: rois\[2, 0\] must be an image's index, a whole number in \[0, 2\), got"
    with pytest.raises(ValueError, match=message):
        case.forward(tensors)
    with pytest.raises(ValueError, match=message):
        case.backward(tensors, grad_output)

    good, others = {**tensors, "rois": case.tensors("float32")["rois"]}, [0, 1, 3]
    out, want = case.forward(good), case.backward(good, np.where(np.eye(4)[2].reshape(4, 1, 1, 1), 0, grad_output))
    monkeypatch.setenv("CUDCN_DEVICE", "emulator")
    for build in ("fast", "check"):
        with emulator.settings(build=build):
            got, grads = case.forward(tensors), case.backward(tensors, grad_output)
        assert not got[2].any()
        np.testing.assert_allclose(got[others], out[others], rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            assert grad is None or error(grad, want[name]) < 1e-5, name


@pytest.mark.usefixtures("any_device")
def test_end_before_start() -> None:
    """The least size is 0.1 where coordinates are whole pixels; deform_roi_pool has none, and goes backwards."""
    columns = np.arange(8.0).reshape(1, 1, 1, 8)
    rois = np.array([[0, 5.0, 0, 2, 0]])
    assert cudcn.roi_avg_pool(columns, rois, output_size=1).item() == 5
    assert cudcn.deform_psroi_pool(columns, rois, output_size=1, group_size=1).item() == pytest.approx(4.5375)
    assert cudcn.deform_roi_pool(columns, rois, output_size=1).item() == 0
    ratio = {"output_size": (1, 3), "sampling_ratio": 1}
    assert cudcn.deform_roi_pool(columns, rois, **ratio).ravel().tolist() == pytest.approx([4, 3, 2])
    for edge, value in ((-0.5, 1), (-0.75, 0), (3.25, 3.75), (8.5, 8), (8.75, 0)):  # no size at all
        point = np.array([[0, edge, 0.5, edge, 0.5]])
        assert cudcn.deform_roi_pool(columns + 1, point, **ratio).ravel().tolist() == [value] * 3


@pytest.mark.usefixtures("any_device")
def test_the_slope_is_0_where_a_position_is_clamped() -> None:
    """On a ramp, with one sample a bin: the true derivative, from the right at whole numbers."""
    ramp = np.arange(5.0).reshape(1, 1, 1, 5) ** 2
    positions = np.array([-1.25, -1.0, -0.5, 0.0, 1.5, 3.0, 4.0, 4.5, 5.0, 5.25])
    values = [0, 0, 0, 0, 2.5, 9, 16, 16, 16, 0]
    slopes = [0, 0, 0, 1, 3, 7, 0, 0, 0, 0]
    attributes = {"output_size": 1, "sampling_ratio": 1, "gamma": 1.0}
    rois = np.array([[0, 0.0, 0, 1, 1]])  # the sample lies at the middle of pixel 0
    for position, value, slope in zip(positions, values, slopes, strict=True):
        offset = np.array([position, 0.0]).reshape(1, 2, 1, 1)
        assert cudcn.deform_roi_pool(ramp, rois, offset, **attributes).item() == value
        grads = cudcn.deform_roi_pool_backward(np.ones((1, 1, 1, 1)), ramp, rois, offset, **attributes)
        assert grads.offset.ravel().tolist() == [slope, 0]

    values, slopes = [0, 0, 0, 0, 2.5, 9, 16, 16, 0, 0], [0, 0, 0, 1, 3, 7, 0, 0, 0, 0]
    attributes = {"output_size": 1, "group_size": 1, "sample_per_part": 1, "trans_std": 1.0}
    rois = np.array([[0, 0.0, 0, 0, 0]])  # one pixel, whose edge is at -0.5
    for position, value, slope in zip(positions, values, slopes, strict=True):
        offset = np.array([position + 0.5, 0.5]).reshape(1, 2, 1, 1)
        assert cudcn.deform_psroi_pool(ramp, rois, offset, **attributes).item() == value
        grads = cudcn.deform_psroi_pool_backward(np.ones((1, 1, 1, 1)), ramp, rois, offset, **attributes)
        assert grads.offset.ravel().tolist() == [slope, 0]


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_nan_pixel_stays_where_it_is(case: RoiPooling) -> None:
    tensors = case.tensors("float32")
    image = tensors["input"].copy()
    image[1] = np.nan
    first = tensors["rois"][:, 0] == 0
    assert first.any()
    assert not first.all()
    got, want = case.forward({**tensors, "input": image}), case.forward(tensors)
    assert np.array_equal(got[first], want[first])
    grads = case.backward({**tensors, "input": image}, case.grad_output("float32"))
    if "offset" in grads:
        assert np.isfinite(grads["offset"][first]).all()


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_no_rois(case: RoiPooling, batch: int) -> None:
    case = replace(case, rois=0)
    tensors = case.tensors()
    tensors = {**tensors, "input": tensors["input"][:batch]}
    assert case.forward(tensors).shape == (0, 3, 3, 2)
    grads = case.backward(tensors, case.grad_output())
    assert grads.pop("rois") is None
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape
        assert not grad.any()


@pytest.mark.usefixtures("emulated")
def test_an_empty_batch_with_rois_yields_0() -> None:
    out = cudcn.roi_avg_pool(np.zeros((0, 2, 3, 4), f4), np.zeros((5, 5), f4), output_size=2)
    assert out.shape == (5, 2, 2, 2)
    assert not out.any()


@pytest.mark.parametrize("size", [3, (3, 2), [3, 2], (np.int64(3), 2)])
def test_output_sizes(size: Any) -> None:
    tensors = BY_NAME["roi_avg_pool plain"].tensors()
    assert cudcn.roi_avg_pool(**tensors, output_size=size).shape == (4, 3, 3, 3 if size == 3 else 2)


# ---- bad input


def zeros(*shape: int, dtype: Any = f4) -> np.ndarray:
    return np.zeros(shape, dtype)


IMAGE = {"input": zeros(2, 12, 7, 6), "rois": zeros(5, 5), "output_size": (3, 2)}
GOOD: dict[str, dict[str, Any]] = {
    "roi_avg_pool": IMAGE,
    "psroi_pool": {**IMAGE, "group_size": 2},
    "deform_roi_pool": {**IMAGE, "offset": zeros(5, 2, 3, 2), "mask": zeros(5, 3, 2)},
    "deform_psroi_pool": {
        **IMAGE, "offset": zeros(5, 6, 2, 4), "mask": zeros(5, 3, 3, 2), "group_size": 2, "part_size": (2, 4),
    },
}  # fmt: skip
OF_ALL = [
    ({"input": zeros(12, 7, 6)}, ValueError, r"input must be \(N, C, H, W\), got shape \(12, 7, 6\)"),
    ({"input": zeros(2, 12, 0, 6)}, ValueError, r"input's channels, height and width must not be empty, got \(2, 12"),
    ({"input": zeros(2, 0, 7, 6)}, ValueError, r"input's channels, height and width must not be empty, got \(2, 0"),
    (
        {"input": np.broadcast_to(zeros(1), (2, 12, 1, 2**23 + 1))},
        ValueError,
        r"input's height and width must be at most",
    ),
    ({"input": zeros(2, 12, 7, 6, dtype=np.int32)}, TypeError, r"input must be float16, .* got int32"),
    ({"rois": zeros(5)}, ValueError, r"rois must be \(R, 5\), got shape \(5,\)"),
    ({"rois": zeros(5, 4)}, ValueError, r"rois must be \(R, 5\) = \(5, 5\), got \(5, 4\)"),
    ({"rois": zeros(5, 5, dtype=np.float64)}, TypeError, r"rois must be float32 like input, got float64"),
    ({"rois": zeros(5, 5, dtype=np.int64)}, TypeError, r"rois must be float32 like input, got int64"),
    ({"rois": None}, TypeError, r"rois is required, got None"),
    ({"rois": [[0, 1, 1, 2, 2]]}, TypeError, r"rois must be an array of NumPy, .* got list"),
    ({"output_size": 0}, ValueError, r"output_size must be at least 1 .* got 0"),
    ({"output_size": (1, 2, 3)}, ValueError, r"output_size must be an int or a pair \(h, w\), got \(1, 2, 3\)"),
    ({"output_size": 2.0}, TypeError, r"output_size must be made of integers, got 2.0"),
    ({"output_size": (2**15, 2**14)}, ValueError, r"there must be fewer than 2\*\*30 bins and parts, got 5 rois"),
    ({"spatial_scale": np.inf}, ValueError, r"spatial_scale must be finite in float64, got inf"),
    ({"spatial_scale": np.nan}, ValueError, r"spatial_scale must be finite in float64, got nan"),
    ({"spatial_scale": True}, TypeError, r"spatial_scale must be a number, got True"),
    ({"spatial_scale": "1"}, TypeError, r"spatial_scale must be a number, got '1'"),
]
OF_EACH = [
    ("psroi_pool", {"group_size": (5, 1)}, ValueError, r"group_size \(5, 1\) must divide .* 5 equal groups, got 12"),
    ("psroi_pool", {"group_size": 0}, ValueError, r"group_size must be at least 1 .* got 0"),
    ("deform_roi_pool", {"offset": zeros(5, 2, 3, 3)}, ValueError, r"offset must be .* = \(5, 2, 3, 2\), got \(5, 2"),
    ("deform_roi_pool", {"offset": zeros(4, 2, 3, 2)}, ValueError, r"offset must be .* = \(5, 2, 3, 2\), got \(4"),
    ("deform_roi_pool", {"offset": zeros(5, 2, 3, 2, dtype=np.float16)}, TypeError, r"offset must be float32 like"),
    ("deform_roi_pool", {"mask": zeros(5, 1, 3, 2)}, ValueError, r"mask must be .* = \(5, 3, 2\), got \(5, 1, 3, 2\)"),
    ("deform_roi_pool", {"mask": zeros(5, 3, 2, dtype=np.float64)}, TypeError, r"mask must be float32 like input"),
    ("deform_roi_pool", {"sampling_ratio": 2.0}, TypeError, r"sampling_ratio must be made of integers, got 2.0"),
    ("deform_roi_pool", {"sampling_ratio": 2**23 + 1}, ValueError, r"sampling_ratio must be at most 2\*\*23, got 838"),
    ("deform_roi_pool", {"sampling_ratio": 2**30}, ValueError, r"sampling_ratio must be at most 2\*\*23, got 10737"),
    ("deform_roi_pool", {"gamma": -np.inf}, ValueError, r"gamma must be finite in float64, got -inf"),
    ("deform_psroi_pool", {"group_size": 5}, ValueError, r"group_size \(5, 5\) must divide .* 25 equal groups, got 12"),
    ("deform_psroi_pool", {"offset": zeros(5, 4, 2, 4)}, ValueError, r"the classes .* the output's 3 channels, got 2"),
    ("deform_psroi_pool", {"offset": zeros(5, 1, 2, 4)}, ValueError, r"the classes .* the output's 3 channels, got 0"),
    ("deform_psroi_pool", {"offset": zeros(5, 7, 2, 4)}, ValueError, r"offset must be .* = \(5, 6, 2, 4\), got \(5, 7"),
    ("deform_psroi_pool", {"offset": zeros(5, 6, 3, 2)}, ValueError, r"offset must be .* = \(5, 6, 2, 4\), got \(5, 6"),
    ("deform_psroi_pool", {"offset": zeros(6, 2, 4)}, ValueError, r"offset must be \(R, 2 \* classes, Ph, Pw\), got"),
    ("deform_psroi_pool", {"mask": zeros(5, 1, 3, 2)}, ValueError, r"mask must be .* = \(5, 3, 3, 2\), got \(5, 1"),
    ("deform_psroi_pool", {"mask": zeros(5, 3, 2), "offset": None}, ValueError, r"mask must be \(R, classes, PH, PW\)"),
    ("deform_psroi_pool", {"part_size": 0}, ValueError, r"part_size must be at least 1 .* got 0"),
    ("deform_psroi_pool", {"part_size": 2**20, "offset": None}, ValueError, r"there must be fewer than 2\*\*30 bins"),
    ("deform_psroi_pool", {"sample_per_part": 0}, ValueError, r"sample_per_part must be at least 1 .* got 0"),
    ("deform_psroi_pool", {"sample_per_part": 2**30}, ValueError, r"sample_per_part must be at most 2\*\*23, got 107"),
    ("deform_psroi_pool", {"trans_std": np.nan}, ValueError, r"trans_std must be finite in float64, got nan"),
]  # fmt: skip
BAD = [(name, *row) for name in GOOD for row in OF_ALL] + OF_EACH


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD, ids=[f"{n} {m[:40]}" for n, _, _, m in BAD])
@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_bad_input(
    name: str, change: dict[str, Any], kind: type, message: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", device)
    with pytest.raises(kind, match=f"{name}: {message}"):
        getattr(cudcn, name)(**{**GOOD[name], **change})


@pytest.mark.parametrize("name", GOOD)
def test_bad_grad_output(name: str) -> None:
    for grad_output in (zeros(5, 3, 3, 3), zeros(5, 12, 3, 2, dtype=np.float64)):
        with pytest.raises(ValueError, match=rf"{name}_backward: grad_output must have .* got \(5, "):
            getattr(cudcn, f"{name}_backward")(grad_output, **GOOD[name])


@pytest.mark.parametrize("name", GOOD)
def test_attributes_by_name_only(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(cudcn, name)(IMAGE["input"], IMAGE["rois"], None, None, 3)
    with pytest.raises(TypeError, match="output_size"):
        getattr(cudcn, name)(IMAGE["input"], IMAGE["rois"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_batch_index_out_of_range_on_the_gpu(case: RoiPooling) -> None:
    import cupy

    tensors = {n: cupy.asarray(t) for n, t in case.tensors("float32").items()}
    tensors["rois"][2, 0] = 1e30
    assert not case.forward(tensors)[2].get().any()


@pytest.mark.usefixtures("any_device")
def test_many_samples_at_one_place_outside_take_no_time() -> None:
    """A roi of size 0: a step a sample, from its first on, would take minutes."""
    rois = np.array([[0, 100, 100, 100, 100]], np.float32)
    image = np.ones((1, 1, 8, 8), np.float32)
    start = time.process_time()
    out = cudcn.deform_roi_pool(image, rois, output_size=1, sampling_ratio=2**20)
    assert out[0, 0, 0, 0] == 0
    assert time.process_time() - start < 5
