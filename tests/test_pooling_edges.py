"""RoI pooling at the edges: rois and offsets that lie nowhere or everywhere, NaN, infinity, nothing at all."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases.case import error
from cases.pooling import BY_NAME, PLAIN, DeformPSRoIPool, DeformRoIPool, PSRoIPool, RoIAvgPool, RoIPooling

import cudcn
from cudcn import emulator

f4 = np.float32
BAD_COORDINATES = [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**33)]
ADAPTIVE = BY_NAME["deform_roi_pool adaptive"]  # which takes no bins of more than 2**23 pixels


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("case", "bad"),
    [*itertools.product(PLAIN, BAD_COORDINATES), *itertools.product([ADAPTIVE], BAD_COORDINATES[:3])],
    ids=str,
)
def test_rois_that_lie_nowhere(case: RoIPooling, bad: float) -> None:
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
def test_offsets_that_point_nowhere(case: RoIPooling, bad: float) -> None:
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
def test_rois_around_everything(case: RoIPooling, half: float) -> None:
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
def test_a_bin_without_samples_is_0_whatever_its_mask_and_gradient_are(case: RoIPooling) -> None:
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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_nan_or_an_infinity_goes_where_the_cpu_has_it(
    case: RoIPooling, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From grad_output and mask to the pixels that the bin touches, those of weight 0 too."""
    tensors = dict(case.tensors("float32"))
    tensors["rois"] = np.array([[0, 2, 2, 6, 6], [0, 1, 2, 5, 10], [1, 0, 4, 16, 8], [1, 9, 9, 30, 30]], f4)
    for name in {"offset"} & tensors.keys():
        tensors[name] = np.zeros_like(tensors[name])  # so that samples lie on pixels
    for spoiled in {"grad_output", "mask"} & {"grad_output", *tensors}:
        for position in range(0, 20, 3):
            grad_output = case.grad_output("float32")
            given = {"grad_output": grad_output, **{name: t.copy() for name, t in tensors.items()}}
            given[spoiled].reshape(-1)[position] = bad
            got = []
            for device in ("cpu", "emulator"):
                monkeypatch.setenv("CUDCN_DEVICE", device)
                got.append(getattr(cudcn, f"{case.op.name}_backward")(**given, **case.attributes).input)
            np.testing.assert_allclose(got[1], got[0], rtol=1e-4, atol=1e-5, err_msg=f"{spoiled} {position}")


MANY_SAMPLES = [
    RoIAvgPool("many samples", size=(30, 40)),
    PSRoIPool("many samples", size=(30, 40)),
    DeformRoIPool("many samples", sampling_ratio=9),
    DeformPSRoIPool("many samples", sample_per_part=9),
]


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("case", MANY_SAMPLES, ids=str)
def test_the_sum_over_infinite_pixels_is_infinite(case: RoIPooling, value: float) -> None:
    tensors = dict(case.tensors("float32"))
    plain = case.forward({**tensors, "input": np.ones_like(tensors["input"])})
    got = case.forward({**tensors, "input": np.full_like(tensors["input"], value)})
    assert np.array_equal(got, np.where(plain == 0, 0, f4(value)))


@pytest.mark.parametrize("bad", [-1, 2, 0.5, np.nan, np.inf, -0.25, 1e30])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_batch_index_out_of_range(case: RoIPooling, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_nan_pixel_stays_where_it_is(case: RoIPooling) -> None:
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
def test_no_rois(case: RoIPooling, batch: int) -> None:
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


@pytest.mark.gpu
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_batch_index_out_of_range_on_the_gpu(case: RoIPooling) -> None:
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
