"""The CPU path of deform_conv2d, dcnv3, dcnv4 and ms_deform_attn: exact sums, borders and NaN, memory, threads.

What the kernels must do alike runs on the emulator too.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from cases.aggregate import Attention, DCNv3
from cases.case import Case, widened
from cases.deform_conv2d import DeformConv2d

import cudcn
from cudcn.cpu import sampling

NAN, INF = np.nan, np.inf


@dataclass
class Gradients:
    image: np.ndarray  # (H, W)
    places: np.ndarray  # (Q, 2), y and x, in pixels
    weights: np.ndarray  # (Q,)


@dataclass
class OneSample:
    """Each of Q = H * W queries takes one weighted sample of an image (H, W), at `places` (Q, 2), y and x in pixels."""

    image: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    softmax: bool = False
    name: ClassVar[str]

    def shifts(self) -> np.ndarray:
        """(1, H, W, 2), from each query's own pixel."""
        own = np.stack(np.mgrid[: self.image.shape[0], : self.image.shape[1]], axis=-1)
        return (self.places.reshape(own.shape) - own)[None].astype(np.float32)

    def tensors(self) -> dict[str, Any]:
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {"kernel_size": 1, "padding": 0, "group": 1, "softmax": self.softmax}

    def forward(self) -> np.ndarray:
        return getattr(cudcn, self.name)(**self.tensors(), **self.attributes()).ravel()

    def backward(self, grad_output: np.ndarray) -> Gradients:
        shape = self.output_shape()
        grads = getattr(cudcn, f"{self.name}_backward")(
            grad_output.astype(self.image.dtype).reshape(shape), **self.tensors(), **self.attributes()
        )
        return self.gradients(grads)

    def output_shape(self) -> tuple[int, ...]:
        return (1, *self.image.shape, 1)

    def gradients(self, grads: Any) -> Gradients:
        return Gradients(
            grads.input.reshape(self.image.shape), grads.offset.reshape(-1, 2)[:, ::-1], grads.mask.ravel()
        )


class Convolution(OneSample):
    name = "deform_conv2d"

    def tensors(self) -> dict[str, Any]:
        return {
            "input": self.image[None, None], "offset": self.shifts().transpose(0, 3, 1, 2),
            "weight": np.ones((1, 1, 1, 1), self.image.dtype), "bias": None,
            "mask": self.weights.reshape(1, 1, *self.image.shape),
        }  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        return {}

    def output_shape(self) -> tuple[int, ...]:
        return (1, 1, *self.image.shape)

    def gradients(self, grads: Any) -> Gradients:
        offset = grads.offset[0].transpose(1, 2, 0)
        return Gradients(grads.input[0, 0], offset.reshape(-1, 2), grads.mask.ravel())


class V3(OneSample):
    name = "dcnv3"

    def tensors(self) -> dict[str, Any]:
        mask = self.weights.reshape(1, *self.image.shape, 1)
        return {"input": self.image[None, :, :, None], "offset": self.shifts()[..., ::-1], "mask": mask}


class V4(OneSample):
    name = "dcnv4"

    def tensors(self) -> dict[str, Any]:
        packed = np.zeros((1, *self.image.shape, 8), np.float32)
        packed[..., :2], packed[..., 2] = self.shifts()[..., ::-1], self.weights.reshape(self.image.shape)
        return {"input": self.image[None, :, :, None], "offset_mask": packed}

    def gradients(self, grads: Any) -> Gradients:
        packed = grads.offset_mask.reshape(-1, 8)
        return Gradients(grads.input.reshape(self.image.shape), packed[:, 1::-1], packed[:, 2])


class Attended(OneSample):
    name = "ms_deform_attn"

    def tensors(self) -> dict[str, Any]:
        locations = ((self.places + 0.5) / self.image.shape)[:, ::-1].astype(np.float32)
        return {
            "value": self.image.reshape(1, -1, 1, 1), "spatial_shapes": np.array([self.image.shape]),
            "level_start_index": np.zeros(1, np.int64), "sampling_locations": locations.reshape(1, -1, 1, 1, 1, 2),
            "attention_weights": self.weights.reshape(1, -1, 1, 1, 1),
        }  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        return {"softmax": self.softmax}

    def output_shape(self) -> tuple[int, ...]:
        return (1, self.image.size, 1)

    def gradients(self, grads: Any) -> Gradients:
        places = grads.sampling_locations.reshape(-1, 2)[:, ::-1] / self.image.shape
        return Gradients(grads.value.reshape(self.image.shape), places, grads.attention_weights.ravel())


OPERATORS = [Convolution, V3, V4, Attended]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def image(side: int = 4) -> np.ndarray:
    return np.arange(1, side * side + 1, dtype=np.float32).reshape(side, side)


def places(*of_queries: tuple[float, float], queries: int = 16) -> np.ndarray:
    """These, and (1.5, 1.5) for the queries that are left."""
    return np.array([*of_queries, *[(1.5, 1.5)] * (queries - len(of_queries))], np.float64)


# ---- borders and NaN, on either path

OUTSIDE = [
    (-1.5, 1), (1, -1.5), (4, 1), (1, 4), (4.5, 1), (1, 9), (NAN, 1), (1, NAN), (INF, 1), (1, -INF), (-1, 4), (4, -1),
]  # fmt: skip
EDGE = [(-1, 1.25), (1.25, -1), (-1, -1), (-1, 3), (-1, -0.5)]


@pytest.mark.usefixtures("any_device")
@every_operator
@pytest.mark.parametrize("softmax", [False, True])
def test_a_sample_outside_is_left_out(operator: type[OneSample], softmax: bool) -> None:
    """Whatever its weight or grad_output is."""
    if softmax and operator is Convolution:
        pytest.skip("has no softmax")
    weights, grad_output = np.full(16, 0.5, np.float32), np.ones(16, np.float32)
    grad_output[: len(OUTSIDE)] = np.resize([1, NAN, INF], len(OUTSIDE))
    weights[: len(OUTSIDE)] = np.repeat([1, NAN, INF, -INF], 3)
    case = operator(image(), places(*OUTSIDE), weights, softmax)
    weight = 1 if softmax else 0.5
    assert np.array_equal(case.forward(), np.where(np.arange(16) < len(OUTSIDE), 0, weight * 8.5))
    grads, zeros = case.backward(grad_output), np.zeros((len(OUTSIDE), 2))
    assert np.array_equal(grads.places[: len(OUTSIDE)], zeros)
    assert np.array_equal(grads.weights[: len(OUTSIDE)], zeros[:, 0])
    want = np.zeros((4, 4))
    want[1:3, 1:3] = weight * 4 / 4  # four queries
    assert np.array_equal(grads.image, want)
    assert np.allclose(grads.places[len(OUTSIDE) :], [weight * 4, weight * 1])


@pytest.mark.usefixtures("any_device")
@every_operator
def test_a_sample_at_minus_one_adds_nothing(operator: type[OneSample]) -> None:
    """Not even a NaN of the pixels beside it, nor of its weight or of grad_output."""
    pixels = image()
    pixels[0], pixels[:, 0] = NAN, INF
    weights, grad_output = np.full(16, 0.5, np.float32), np.ones(16, np.float32)
    weights[3], grad_output[4] = NAN, NAN
    case = operator(pixels, places(*EDGE), weights)
    assert np.array_equal(case.forward()[: len(EDGE)], np.zeros(len(EDGE)))
    grads = case.backward(grad_output)
    assert np.array_equal(grads.weights[: len(EDGE)], np.zeros(len(EDGE)))
    assert np.array_equal(grads.image[0], np.zeros(4))
    assert np.array_equal(grads.image[:, 0], np.zeros(4))
    assert np.isfinite(grads.image).all()


@pytest.mark.usefixtures("any_device")
@every_operator
def test_a_sample_at_minus_one_has_the_slope_of_its_cell(operator: type[OneSample]) -> None:
    pixels = image()
    grads = operator(pixels, places(*EDGE), np.full(16, 0.5, np.float32)).backward(np.full(16, 3, np.float32))
    top, left = 0.75 * pixels[0, 1] + 0.25 * pixels[0, 2], 0.75 * pixels[1, 0] + 0.25 * pixels[2, 0]
    slopes = [(top, 0), (0, left), (0, 0), (pixels[0, 3], 0), (pixels[0, 0] / 2, 0)]
    assert np.allclose(grads.places[: len(EDGE)], 1.5 * np.array(slopes))


@pytest.mark.usefixtures("any_device")
@every_operator
def test_inside_all_corners_count(operator: type[OneSample]) -> None:
    """Those in the image, even at weight 0."""
    pixels = image()
    pixels[2, 2] = NAN
    at = [(1, 1), (1, 2), (2, 1), (1.5, 1.5), (2, 2), (3, 3), (3, 1.5), (0, 3.5), (2, 3)]
    out = operator(pixels, places(*at), np.ones(16, np.float32)).forward()[: len(at)]
    assert np.array_equal(out, [NAN, NAN, NAN, NAN, NAN, 16, 14.5, 2, 12], equal_nan=True)


@pytest.mark.usefixtures("any_device")
@every_operator
def test_infinite_pixels(operator: type[OneSample]) -> None:
    """Those inside count, at weight 0 too, where they make NaN; beside the image nothing does."""
    at = {
        (1.5, 1.5): INF, (2, 2): NAN, (0, 0): NAN, (3, 3): INF, (3, 1.5): INF, (0.5, 3): INF, (3.5, 1): NAN,
        (-0.5, 1.25): INF, (-0.5, -0.5): INF, (0, 3.5): NAN, (3.5, 3.5): INF, (1, -0.5): NAN,
    }  # fmt: skip
    out = operator(np.full((4, 4), INF, np.float32), places(*at), np.ones(16, np.float32)).forward()[: len(at)]
    assert np.array_equal(out, list(at.values()), equal_nan=True)


@pytest.mark.usefixtures("any_device")
@every_operator
def test_an_infinite_weight(operator: type[OneSample]) -> None:
    weights = np.full(16, INF, np.float32)
    assert np.array_equal(operator(image(), places(), weights).forward(), weights)


@pytest.mark.usefixtures("any_device")
def test_a_nan_logit_makes_its_query_nan() -> None:
    """Though it is that of a sample that is left out, unless all are."""
    locations = np.full((1, 4, 1, 1, 2, 2), 0.5, np.float32)
    locations[0, 1, 0, 0, 0] = locations[0, 2] = locations[0, 3] = 7
    logits = np.zeros((1, 4, 1, 1, 2), np.float32)
    logits[0, :3, 0, 0, 0] = NAN
    tensors = image().reshape(1, 16, 1, 1), np.array([[4, 4]]), np.array([0]), locations, logits
    out = cudcn.ms_deform_attn(*tensors, softmax=True)
    assert np.array_equal(out.ravel(), [NAN, NAN, 0, 0], equal_nan=True)
    grads = cudcn.ms_deform_attn_backward(np.ones_like(out), *tensors, softmax=True)
    assert np.array_equal(grads.attention_weights[0, 2:], np.zeros((2, 1, 1, 2)))
    assert np.array_equal(grads.sampling_locations[0, 2:], np.zeros((2, 1, 1, 2, 2)))


# ---- exact sums

TENTH = np.float32(0.1)  # equal terms: the rounding of a running sum goes the same way each time
each_path = pytest.mark.parametrize("any_device", ["cpu", "fast"], indirect=True)


@every_operator
@pytest.mark.parametrize("line", [False, True], ids=["pixel", "row"])
def test_many_samples_of_one_pixel(operator: type[OneSample], line: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, and in many."""
    module = importlib.import_module(f"cudcn.ops.{operator.name}").OP.cpu
    monkeypatch.setattr(module, "_BLOCK" if operator is Convolution else "_CHUNK", 1 << 17)
    side = 1024  # a power of two, for ms_deform_attn's positions to be exact
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    where = np.stack([0 * y + 3, x if line else 0 * x + 5], axis=-1)
    case = operator(np.ones((side, side), np.float32), where, np.ones(side * side, np.float32))
    grad = case.backward(np.full(side * side, TENTH)).image
    want = np.zeros((side, side))
    want[3, slice(None) if line else 5] = float(TENTH) * (side if line else side * side)
    np.testing.assert_allclose(grad, want, rtol=1e-6)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_of_weight_and_bias_over_many_pixels(layout: str) -> None:
    case = DeformConv2d("many pixels", 1, 1, (1000, 1000), 1, (1, 1), padding=0, layout=layout)
    tensors = {name: np.zeros_like(t, np.float32) for name, t in case.tensors().items()}
    tensors["input"] += 1
    tensors["mask"] += 1
    grads = case.backward(tensors, np.full(case.output_shape(), TENTH))
    for name in ("weight", "bias"):
        assert grads[name].item() == pytest.approx(1e6 * float(TENTH), rel=2e-6)


def test_many_taps() -> None:
    image = np.full((1, 31, 31, 1), TENTH)
    offset, mask = np.zeros((1, 1, 1, 2 * 31 * 31), np.float32), np.ones((1, 1, 1, 31 * 31), np.float32)
    out = cudcn.dcnv3(image, offset, mask, kernel_size=31, padding=0, group=1)
    assert out.item() == pytest.approx(31 * 31 * float(TENTH), rel=1e-6)


@pytest.mark.usefixtures("any_device")
@each_path
@pytest.mark.parametrize("softmax", [False, True])
def test_many_points(softmax: bool) -> None:
    points = 100_001
    locations, weights = np.full((1, 3, 1, 2, points, 2), 0.5, np.float32), np.full((1, 3, 1, 2, points), TENTH)
    weights[..., 0, 0] = 3  # so that the softmax sums numbers which float32 rounds, not ones
    value, shapes, starts = np.full((1, 2, 1, 1), TENTH), np.array([[1, 1], [1, 1]]), np.array([0, 1])
    out = cudcn.ms_deform_attn(value, shapes, starts, locations, weights, softmax=softmax)
    total = 1 if softmax else 3 + (2 * points - 1) * float(TENTH)
    assert out == pytest.approx(np.full((1, 3, 1), total * float(TENTH)), rel=1e-6)


@pytest.mark.usefixtures("any_device")
@each_path
def test_the_softmax_gradient_of_many_points() -> None:
    points = 50_001
    locations, weights = np.full((1, 1, 1, 1, points, 2), 0.5, np.float32), np.zeros((1, 1, 1, 1, points), np.float32)
    locations[..., 0, :] = 7  # the one outside is 0, the others' mean
    tensors = np.full((1, 1, 1, 1), TENTH), np.array([[1, 1]]), np.array([0]), locations, weights
    grad = cudcn.ms_deform_attn_backward(np.ones((1, 1, 1), np.float32), *tensors, softmax=True).attention_weights
    mean = float(TENTH) * (points - 1) / points
    assert grad[..., 0].item() == pytest.approx(-mean / points, rel=1e-6)


@pytest.mark.usefixtures("any_device")
@each_path
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_of_offset_and_mask_over_many_channels(layout: str) -> None:
    channels = 200_000
    case = DeformConv2d("many channels", 1, channels, (1, 1), 1, (1, 1), padding=0, layout=layout)
    tensors = {name: np.full(t.shape, TENTH) for name, t in case.tensors().items()}
    tensors["offset"][...] = 0.25
    tensors["mask"][...] = 1
    grads = case.backward(tensors, np.ones(case.output_shape(), np.float32))
    square = channels * float(TENTH) ** 2
    assert grads["offset"] == pytest.approx(np.full_like(grads["offset"], -0.75 * square), rel=1e-5)
    assert grads["mask"].item() == pytest.approx(0.75**2 * square, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_levels_that_overlap(dtype: Any) -> None:
    """Their gradients are rounded once."""
    levels = 2048
    tensors = (
        np.ones((1, 1, 1, 1), dtype), np.ones((levels, 2), np.int64), np.zeros(levels, np.int64),
        np.full((1, 1, 1, levels, 1, 2), 0.5, np.float32), np.full((1, 1, 1, levels, 1), TENTH),
    )  # fmt: skip
    grad = cudcn.ms_deform_attn_backward(np.ones((1, 1, 1), dtype), *tensors).value
    assert grad == np.asarray(levels * float(TENTH)).astype(dtype)


# ---- images with a side that float32 does not hold

LONG = 2**24


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("axis", [0, 1], ids="yx")
@pytest.mark.parametrize(
    ("name", "extra"), [(name, e) for name in ("deform_conv2d", "dcnv3") for e in (1, 2, 3)] + [("ms_deform_attn", 1)]
)
def test_the_last_pixels_of_a_long_image(name: str, extra: int, axis: int) -> None:
    """Two queries: a sample outside, and one at the last pixel whose number is a float32."""
    length, last = LONG + extra, LONG + (extra - 1) // 2 * 2
    size, out_size, stride = ((length, 1), (2, 1), (LONG, 1)) if axis == 0 else ((1, length), (1, 2), (1, LONG))
    image = np.zeros(length, np.float16)
    image[last] = 3
    # what goes over all pixels takes the emulator minutes: deform_conv2d does unless there are eight channels, which
    # need no packing, and all input gradients do
    emulated = os.environ.get("CUDCN_DEVICE") == "emulator"
    pixels = np.zeros((length, 8 if emulated else 1), np.float16)
    pixels[:, 0] = image
    ones, shift, locations = np.ones(2, np.float32), np.zeros((2, 2), np.float32), np.full((2, 2), 0.5, np.float32)
    shift[:, axis], locations[:, axis] = (NAN, last - LONG), (NAN, 1)  # 1 is at length - 0.5, rounded to the last pixel
    calls: dict[str, tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
        "deform_conv2d": (
            (1, *out_size, 1),
            (
                pixels.reshape(1, *size, -1), shift.reshape(1, *out_size, 2),
                np.ones((1, pixels.shape[1], 1, 1), np.float16),
            ),
            {"stride": stride, "layout": "NHWC"},
        ),
        "dcnv3": (
            (1, *out_size, 1),
            (image.reshape(1, *size, 1), shift[:, ::-1].reshape(1, *out_size, 2), ones.reshape(1, *out_size, 1)),
            {"kernel_size": 1, "padding": 0, "stride": stride, "group": 1},
        ),
        "ms_deform_attn": (
            (1, 2, 1),
            (
                image.reshape(1, -1, 1, 1), np.array([size]), np.array([0]),
                locations[:, ::-1].reshape(1, 2, 1, 1, 1, 2), ones.reshape(1, 2, 1, 1, 1),
            ),
            {},
        ),
    }  # fmt: skip
    shape, tensors, attributes = calls[name]
    out = getattr(cudcn, name)(*tensors, **attributes)
    assert out.ravel().tolist() == [0, 3]
    if emulated:
        return
    grad_output = np.array([5, 2], np.float16).reshape(shape)
    grad = getattr(cudcn, f"{name}_backward")(grad_output, *tensors, **attributes)[0].ravel()
    assert np.flatnonzero(grad).tolist() == [last]
    assert grad[last] == 2


# ---- blocks

WAYS = {
    "many blocks": {"_FEW": 0, "_BLOCK": 1, "_CHUNK": 20000},
    "pixels and sums in turn": {"_FEW": 0, "HELD": 0},
    "some channels at a time": {"_SHARE": 1 << 14},
    "heaps of samples": {"_RUN": 8},
    "few queries": {"_CHUNK": 1},
    "few points": {"_RUN_BYTES": 1},
    "too many points to keep": {"_RUN_BYTES": 1, "_KEPT": 1},
}


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", ["deform_conv2d", "dcnv3", "ms_deform_attn", "ms_deform_attn softmax"])
def test_every_way_to_sum(operator: str, way: str, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = 30.0 if far else 1.0
    cases: dict[str, Case] = {
        "deform_conv2d": DeformConv2d("ways", 2, 6, (24, 40), 4, groups=2, offset_groups=3, reach=reach),
        "dcnv3": DCNv3("ways", 2, 12, (9, 80), group=2, reach=reach),
        "ms_deform_attn": Attention("ways", 1, 40, 2, 6, ((20, 30), (3, 4)), 40),
        "ms_deform_attn softmax": Attention("ways", 1, 40, 2, 6, ((20, 30), (3, 4)), 40, softmax=True),
    }
    case = cases[operator]
    grad_output = case.grad_output("float32")
    smooth = case.smooth(dict(case.tensors()))  # float32 and float64 are in the same cells
    tensors = {name: t if t.dtype.kind == "i" else t.astype(np.float32) for name, t in smooth.items()}
    want = {"out": case.forward(widened(tensors)), **case.backward(widened(tensors), grad_output.astype(np.float64))}
    for name, value in WAYS[way].items():
        for module in (sampling, case.op.cpu):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    got = {"out": case.forward(tensors), **case.backward(tensors, grad_output)}
    for name, array in want.items():
        if array is not None:
            case.close(got[name], array, "float32")


def test_many_samples_in_the_first_cell_keep_their_precision() -> None:
    """Between -1 and 0 along both axes, too."""
    padding, size = 100, 204
    y, x = np.mgrid[:size, :size].astype(np.float32) - padding
    offset = np.stack([-0.5 - y, -0.5 - x])[None]
    grad_output = np.full((1, 1, size, size), 0.07, np.float32)
    image_, weight = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 1, 1), np.float32)
    grad = cudcn.deform_conv2d_backward(grad_output, image_, offset, weight, padding=padding).input
    assert grad[0, 0, 0, 0] == pytest.approx(np.float64(np.float32(0.07)) * size**2 / 4, rel=1e-6)
