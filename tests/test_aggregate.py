"""dcnv3, dcnv4 and ms_deform_attn on raw arrays: the CPU path, the emulated kernels, and the real ones if possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases.aggregate import ATTENTION, BY_NAME, CASES, DCNV3, DCNV4, SMALL, Attention, DCNv3, DCNv4, Windows
from cases.case import DTYPES, HALVES, Case, error, widened
from every_case import EveryCase, EverySmallCase, agrees_with_float64
from hypothesis import given, settings, strategies as st
from oracles import aggregate as oracle

import cudcn
from cudcn import emulator, launch
from cudcn.cuda import sort
from cudcn.cuda.sort import Segments

PLAIN = [BY_NAME["dcnv3 plain"], BY_NAME["dcnv4 plain"], BY_NAME["ms_deform_attn plain"]]
SOFTMAX = [BY_NAME["dcnv3 large kernel"], BY_NAME["dcnv4 uneven"], BY_NAME["ms_deform_attn levels apart"]]
PLACES = {"dcnv3": "offset", "dcnv4": "offset_mask", "ms_deform_attn": "sampling_locations"}
IMAGE = {"dcnv3": "input", "dcnv4": "input", "ms_deform_attn": "value"}


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCase(EveryCase):
    pass


@pytest.mark.parametrize("case", SMALL, ids=str)
class TestEverySmallCase(EverySmallCase):
    pass


# ---- the CPU path


def test_positions_of_half_data_are_float32() -> None:
    """At column 1000 a half has no room for a fraction."""
    row = (np.arange(1200, dtype=np.float16) % 2).reshape(1, 1, -1, 1)
    offset = np.zeros((1, 1, 1200, 2), np.float16)
    offset[..., 0] = 0.25
    out = cudcn.dcnv3(row, offset, np.ones((1, 1, 1200, 1), np.float16), kernel_size=1, padding=0, group=1)
    assert np.array_equal(out[0, 0, :-1, 0], np.where(np.arange(1199) % 2, 0.75, 0.25).astype(np.float16))


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_a_few_queries_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    want = case.forward(case.tensors()), case.backward(case.tensors(), case.grad_output())
    monkeypatch.setattr(case.op.cpu, "_CHUNK", 1)
    case.close(case.forward(case.tensors()), want[0], "float64")
    for name, grad in case.backward(case.tensors(), case.grad_output()).items():
        if grad is not None:
            case.close(grad, want[1][name], "float64")


# ---- the kernels


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize("channels", [1, 2, 3, 8, 12, 24, 40, 264])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_any_number_of_channels(self, dtype: str, channels: int) -> None:
        """Rows of 1 to 32 threads, threads without channels, and channels for more than 32 threads."""
        case = DCNv4(f"{channels} channels", batch=1, size=(3, 3), channels=2 * channels, softmax=True)
        with emulator.settings(build="fast"):
            agrees_with_float64(case, dtype)

    @pytest.mark.parametrize("channels", [16, 32, 48, 64])
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("build", ["fast", "check"])
    def test_on_tensor_cores(self, build: str, dtype: str, channels: int) -> None:
        """The gradients of places and weights, where a group has a multiple of 16 channels."""
        case = DCNv4(f"{channels} channels", size=(3, 4), channels=2 * channels, softmax=channels == 48)
        with emulator.settings(build=build, order="random"):
            agrees_with_float64(case, dtype, ("offset_mask",))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_what_is_not_finite_reaches_its_own_samples(self, dtype: str, bad: float) -> None:
        """In the image and in grad_output; a tensor core multiplies those of several rows at once."""
        case = DCNv3("not finite", batch=1, size=(5, 5), channels=32, kernel=1, padding=0, group=1)
        tensors, grad_output = case.tensors(dtype, ("offset", "mask")), case.grad_output(dtype).copy()
        image = tensors["input"].copy()
        image[0, 1, 3, 5] = grad_output[0, 2, 1, 7] = bad
        got = case.backward({**tensors, "input": image}, grad_output)
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            want = case.backward({**tensors, "input": image}, grad_output)
        for name in ("offset", "mask"):
            assert 0 < np.isfinite(want[name]).sum() < want[name].size
            np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-3)

    def test_too_large_for_a_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "LARGEST_GRID", 1)
        with pytest.raises(ValueError, match=r"dcnv3: on CUDA .*, got 84, 2 and 84"):
            PLAIN[0].forward(PLAIN[0].tensors())

    def test_too_large_a_pixel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PLAIN[0].op.cuda, "_PIXEL_BYTES", 31)
        with pytest.raises(ValueError, match=r"dcnv3: on CUDA a pixel must take fewer than 2\*\*32 bytes, got 32"):
            PLAIN[0].forward(PLAIN[0].tensors())

    @pytest.mark.parametrize(
        ("shapes", "starts"),
        [
            ([[0, 4], [3, 2]], [0, 20]),
            ([[5, -4], [3, 2]], [0, 20]),
            ([[5, 4], [3, 2]], [7, 20]),
            ([[5, 4], [3, 2]], [-1, 20]),
            ([[5, 4], [3, 2]], [2**62, 20]),
            ([[2**31 - 1, 2**31 - 1], [3, 2]], [0, 20]),
            ([[2**62, 4], [3, 2]], [0, 20]),
        ],
    )
    @pytest.mark.parametrize("build", ["fast", "check"])
    def test_a_level_outside_the_value_adds_nothing(self, build: str, shapes: Any, starts: Any) -> None:
        case, grad_output = Attention("levels"), Attention("levels").grad_output()
        tensors = case.tensors()
        bad = {**tensors, "spatial_shapes": np.array(shapes), "level_start_index": np.array(starts)}
        silent = {**tensors, "attention_weights": tensors["attention_weights"].copy()}
        silent["attention_weights"][:, :, :, 0] = 0
        with emulator.settings(build=build):
            case.close(case.forward(bad), case.forward(silent), "float64")
            grads, want = case.backward(bad, grad_output), case.backward(silent, grad_output)
        want["attention_weights"][:, :, :, 0] = 0
        for name in ("value", "sampling_locations", "attention_weights"):
            case.close(grads[name], want[name], "float64")

    @pytest.mark.parametrize("build", ["fast", "check"])
    @pytest.mark.parametrize("channels", [3, 8, 140])  # with an idle lane, of one, and of all lanes of a warp
    @pytest.mark.parametrize("place", [(1.0, 2.0), (1.25, 2.75), (-0.5, 3.5)], ids=str)
    def test_all_samples_at_one_place(self, place: tuple[float, float], channels: int, build: str) -> None:
        """More than a sample counts for itself, and than one row's threads add."""
        for case in (
            DCNv3("one place", batch=1, channels=2 * channels, size=(19, 16), kernel=1, padding=0),
            Attention("one place", batch=1, queries=300, channels=channels, sizes=((3, 4), (3, 4)), softmax=True),
        ):
            tensors, grad_output = dict(case.tensors("float32")), case.grad_output("float32")
            if isinstance(case, DCNv3):
                tensors["offset"] = np.stack([place[1] - np.arange(16) + np.zeros((19, 1)),
                                              place[0] - np.arange(19)[:, None] + np.zeros(16)], -1)  # fmt: skip
                tensors["offset"] = np.tile(tensors["offset"], 2)[None].astype(np.float32)
            else:
                tensors["sampling_locations"] = np.empty_like(tensors["sampling_locations"])
                tensors["sampling_locations"][...] = (place[1] + 0.5) / 4, (place[0] + 0.5) / 3
            with emulator.settings(build=build, order="random"):
                got = case.backward(tensors, grad_output)[IMAGE[case.op.name]]
            with pytest.MonkeyPatch.context() as cpu:
                cpu.setenv("CUDCN_DEVICE", "cpu")
                want = case.backward(widened(tensors), grad_output.astype(np.float64))[IMAGE[case.op.name]]
            case.close(got, want, "float32")

    @pytest.mark.parametrize("dtype", ["float32", *HALVES])
    @pytest.mark.parametrize("channels", [1, 40])
    def test_many_samples_in_one_pixel(self, channels: int, dtype: str) -> None:
        """Of equal terms, so that the rounding of a running float32 sum goes one way, off by 1e-3."""
        queries, weight = 1 << 18, DTYPES[dtype](0.1)
        tensors = {
            "value": np.ones((1, 1, 1, channels), weight.dtype),
            "spatial_shapes": np.array([[1, 1]]), "level_start_index": np.array([0]),
            "sampling_locations": np.full((1, queries, 1, 1, 1, 2), 0.5, np.float32),
            "attention_weights": np.broadcast_to(weight, (1, queries, 1, 1, 1)),
        }  # fmt: skip
        grad_output = np.full((1, queries, channels), weight)
        got = cudcn.ms_deform_attn_backward(grad_output, **tensors).value.astype(float)
        rel = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert got == pytest.approx(np.full((1, 1, 1, channels), queries * float(weight) ** 2), rel=rel)

    @pytest.mark.parametrize("build", ["fast", "check"])
    def test_levels_that_overlap(self, build: str) -> None:
        """A pixel gathers from each level that has it."""
        case = Attention("overlapping", batch=2, queries=20, sizes=((5, 4), (3, 2), (2, 9)), softmax=True)
        tensors = {**case.tensors(), "level_start_index": np.array([0, 2, 1])}
        with emulator.settings(build=build):
            got = case.backward(tensors, case.grad_output())
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setenv("CUDCN_DEVICE", "cpu")
            want = case.backward(tensors, case.grad_output())
        case.close(got["value"], want["value"], "float64")

    @pytest.mark.parametrize("case", SOFTMAX, ids=str)
    @pytest.mark.parametrize("pairs", [1, 3])
    def test_a_few_pairs_at_a_time(self, pairs: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of an image and a group: their samples are sorted together."""
        seen: list[tuple[int, int]] = []
        made = case.op.cuda._PAIRS
        monkeypatch.setattr(Segments, "at_a_time", lambda *_: pairs)
        monkeypatch.setattr(case.op.cuda, "_PAIRS", lambda **f: (seen.append((f["first"], f["count"])), made(**f))[1])
        agrees_with_float64(case, "float64")
        groups = case.heads if isinstance(case, Attention) else case.group
        every = case.batch * groups
        assert seen == [(n, min(pairs, every - n)) for n in range(0, every, pairs)]

    def test_too_many_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one pair."""
        case = Attention("too many")
        monkeypatch.setattr(sort, "LARGEST", 2 * 5 * 2 - 1)
        with pytest.raises(ValueError, match=r"ms_deform_attn: on CUDA the input's gradient sorts .*, got 20 and 108"):
            case.backward(case.tensors(), case.grad_output())

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("case", PLAIN, ids=str)
    def test_a_nan_or_an_infinity_goes_where_the_cpu_has_it(self, case: Case, bad: float) -> None:
        """From grad_output and weights; at whole places also to the corners of weight 0."""
        name = PLACES[case.op.name]
        whole = dict(case.tensors("float32"))
        if isinstance(case, DCNv4):
            offset, mask = case.unpacked(whole[name])
            whole[name] = case.packed(np.floor(offset), mask).astype(np.float32)
        elif isinstance(case, DCNv3):
            whole[name] = np.floor(whole[name])
        else:
            size = whole["spatial_shapes"][:, None, ::-1]
            whole[name] = ((np.floor(whole[name] * size) + 0.5) / size).astype(np.float32)
        for spoiled in ("grad_output", list(case.op.tensors)[-1]):
            for position in range(0, 60, 7):
                tensors, grad_output = {n: t.copy() for n, t in whole.items()}, case.grad_output("float32")
                array = grad_output if spoiled == "grad_output" else tensors[spoiled]
                array.reshape(-1)[position] = bad
                got = case.backward(tensors, grad_output)[IMAGE[case.op.name]]
                with pytest.MonkeyPatch.context() as cpu:
                    cpu.setenv("CUDCN_DEVICE", "cpu")
                    want = case.backward(tensors, grad_output)[IMAGE[case.op.name]]
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=f"{spoiled} {position}")


# ---- other ways to the same numbers


def grid_sample(image: Any, x: Any, y: Any, mode: str = "bilinear") -> Any:
    """(B, D, Q, S) of an image (B, D, H, W) at positions (B, Q, S) in pixels."""
    height, width = image.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return torch.nn.functional.grid_sample(image, grid, mode=mode, padding_mode="zeros", align_corners=False)


def torch_dcnv3(input: Any, offset: Any, mask: Any, case: Windows) -> Any:
    a, points = case.canonical, case.points
    batch, (height, width) = case.batch, case.places()
    taps = torch.tensor(oracle.taps(a["kernel_size"], a["remove_center"]), dtype=offset.dtype)
    pad = a["padding"][0], a["padding"][2]
    position = []
    for axis, size in enumerate((height, width)):
        middle = a["dilation"][axis] * (a["kernel_size"][axis] - 1) // 2
        query = torch.arange(size) * a["stride"][axis] - pad[axis] + middle * (1 - a["offset_scale"])
        query = query[:, None, None, None] if axis == 0 else query[None, :, None, None]
        shift = offset.reshape(batch, height, width, case.group, points, 2)[..., 1 - axis]
        position.append(query + (taps[:, axis] * a["dilation"][axis] + shift) * a["offset_scale"])
    y, x = (p.permute(0, 3, 1, 2, 4).reshape(batch * case.group, height * width, points) for p in position)
    planes = input.permute(0, 3, 1, 2).reshape(batch * case.group, -1, *case.size)
    weight = mask.reshape(batch, height * width, case.group, points)
    weight = (weight.softmax(-1) if case.softmax else weight).transpose(1, 2).reshape(-1, 1, height * width, points)
    summed = (grid_sample(planes, x, y) * weight).sum(-1)
    return summed.reshape(batch, case.channels, height, width).permute(0, 2, 3, 1)


def torch_dcnv4(input: Any, offset_mask: Any, case: DCNv4) -> Any:
    parts = offset_mask[..., : 3 * case.group * case.points].unflatten(-1, (case.group, 3 * case.points))
    offset, mask = parts[..., : 2 * case.points], parts[..., 2 * case.points :]
    return torch_dcnv3(input, offset.flatten(3), mask.flatten(3), case)


def torch_ms_deform_attn(value: Any, shapes: Any, starts: Any, locations: Any, weights: Any, case: Attention) -> Any:
    value = value if case.layout == "NSMD" else value.movedim(-1, 1)
    batch, _, heads, _ = value.shape
    counts, weights = oracle.counts(case.points, len(shapes)), weights.flatten(3)
    places = locations.reshape(*weights.shape, 2).split(list(counts), -2)
    weights = (weights.softmax(-1) if case.softmax else weights).split(list(counts), -1)
    areas, total, queries = shapes.prod(1), 0, locations.shape[1]
    starts = areas.cumsum(0) - areas if starts is None else starts
    for (height, width), start, place, weight in zip(shapes.tolist(), starts.tolist(), places, weights, strict=True):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        place = place.transpose(1, 2).flatten(0, 1)
        weight = weight.transpose(1, 2).flatten(0, 1)[:, None]
        x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5
        mode = "bilinear"
        if case.method == "discrete":  # half a pixel off, and clamped
            x, y, mode = (x + 0.5).clamp(0, width - 1), (y + 0.5).clamp(0, height - 1), "nearest"
        total = total + (grid_sample(image, x, y, mode) * weight).sum(-1)
    return total.reshape(batch, -1, queries).transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid_sample(case: Case) -> None:
    composite = {"dcnv3": torch_dcnv3, "dcnv4": torch_dcnv4, "ms_deform_attn": torch_ms_deform_attn}[case.op.name]
    tensors = {name: None if t is None else torch.from_numpy(t.copy()) for name, t in case.tensors().items()}
    wanted = [t.requires_grad_() for t in tensors.values() if t is not None and t.is_floating_point()]
    out = composite(*tensors.values(), case)
    case.close(case.forward(case.tensors()), out.detach().numpy(), "float64")
    grads = torch.autograd.grad(out, wanted, torch.from_numpy(case.grad_output()))
    got = [grad for grad in case.backward(case.tensors(), case.grad_output()).values() if grad is not None]
    for grad, want in zip(got, grads, strict=True):
        assert error(grad, want.numpy()) <= 1e-11


@pytest.mark.parametrize("case", [c for c in DCNV3 if c.offset_scale == 1], ids=str)
def test_without_offsets_it_is_a_depthwise_convolution(case: DCNv3) -> None:
    """With one weight per group and tap."""
    rng = np.random.default_rng(0)
    kernel, points = case.canonical["kernel_size"], case.points
    weight = rng.random((case.group, points))
    raw = np.log(weight) if case.softmax else weight
    tensors = case.tensors()
    mask = np.broadcast_to(raw.reshape(-1), tensors["mask"].shape)
    weight = oracle.softmax(raw) if case.softmax else weight
    filters = np.zeros((case.group, *kernel))
    for p, (row, column) in enumerate(oracle.taps(kernel, case.remove_center)):
        filters[:, row, column] = weight[:, p]
    filters = np.repeat(filters, case.channels // case.group, axis=0)[:, None]
    top, bottom, left, right = case.canonical["padding"]
    padded = np.pad(tensors["input"], ((0, 0), (top, bottom), (left, right), (0, 0))).transpose(0, 3, 1, 2)
    want = torch.nn.functional.conv2d(
        torch.from_numpy(padded), torch.from_numpy(filters), None, case.canonical["stride"], 0,
        case.canonical["dilation"], case.channels,
    )  # fmt: skip
    out = case.forward({**tensors, "offset": np.zeros_like(tensors["offset"]), "mask": mask})
    case.close(out.transpose(0, 3, 1, 2), want.numpy(), "float64")


@pytest.mark.parametrize("case", DCNV4, ids=str)
def test_dcnv4_is_dcnv3_on_unpacked_tensors(case: DCNv4) -> None:
    input, packed = case.tensors().values()
    offset, mask = case.unpacked(packed)
    case.close(case.forward(case.tensors()), cudcn.dcnv3(input, offset, mask, **case.attributes), "float64")
    grads = case.backward(case.tensors(), case.grad_output())
    want = cudcn.dcnv3_backward(case.grad_output(), input, offset, mask, **case.attributes)
    case.close(grads["input"], want.input, "float64")
    for got, grad in zip(case.unpacked(grads["offset_mask"]), want[1:], strict=True):
        case.close(got, grad, "float64")
    assert not grads["offset_mask"][..., 3 * case.group * case.points :].any()


@pytest.mark.parametrize("case", [c for c in DCNV3 if c.offset_scale == 1], ids=str)
def test_attention_in_one_level_is_dcnv3(case: DCNv3) -> None:
    """With the taps' positions as locations."""
    input, offset, mask = case.tensors().values()
    a, (height, width), (out_height, out_width) = case.canonical, case.size, case.places()
    taps = np.array(oracle.taps(a["kernel_size"], a["remove_center"]))
    queries = np.stack(np.mgrid[:out_height, :out_width], -1) * a["stride"] - (a["padding"][0], a["padding"][2])
    shift = offset.reshape(case.batch, out_height, out_width, case.group, case.points, 2)[..., ::-1]
    position = queries[:, :, None, None] + taps * a["dilation"] + shift
    locations = ((position + 0.5) / (height, width))[..., ::-1]
    per_query = (case.batch, out_height * out_width, case.group, 1, case.points)
    out = cudcn.ms_deform_attn(
        input.reshape(case.batch, height * width, case.group, -1), np.array([[height, width]]), np.array([0]),
        locations.reshape(*per_query, 2), mask.reshape(per_query), softmax=case.softmax,
    )  # fmt: skip
    assert error(out.reshape(case.output_shape()), case.forward(case.tensors())) <= 1e-11


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", [c for c in (*DCNV3, *ATTENTION) if c.softmax], ids=str)
def test_softmax_inside_is_softmax_outside(case: Any) -> None:
    name = list(case.op.tensors)[-1]
    tensors = case.tensors()
    raw = tensors[name].reshape(*tensors[name].shape[:3], -1)
    groups = raw.reshape(*raw.shape[:3], case.group, -1) if isinstance(case, DCNv3) else raw
    weights = oracle.softmax(groups).reshape(tensors[name].shape)
    outside = replace(case, softmax=False)
    case.close(case.forward(tensors), outside.forward({**tensors, name: weights}), "float64")
    large = {**tensors, name: tensors[name] + 1e4}
    assert error(case.forward(large), case.forward(tensors)) <= 1e-10


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_discrete_sample_is_one_pixel(dtype: str) -> None:
    """Half a pixel rounds up, what is beyond a border is the pixel there, and NaN is neither near it nor nowhere."""
    places = np.array([-5, -0.5, 0, 0.49, 0.5, 1.5, 2.49, 2.5, 3, 99, np.nan, np.inf, -np.inf], dtype) / 4
    pixels = [0, 0, 0, 0, 1, 2, 2, 3, 3, 3, None, None, None]
    weight = np.ones((1, len(places), 1, 1, 1), dtype)
    for axis in (0, 1):
        locations = np.zeros((1, len(places), 1, 1, 1, 2), dtype)
        locations[..., axis] = places[:, None, None, None]
        shapes = [(1, 4)] if axis == 0 else [(4, 1)]
        for at in range(4):
            value = np.full((1, 4, 1, 1), np.nan, dtype)
            value[0, at] = at + 1
            out = cudcn.ms_deform_attn(value, shapes, None, locations, weight, method="discrete")
            want = [0 if p is None else p + 1 if p == at else np.nan for p in pixels]
            np.testing.assert_array_equal(out.ravel(), want)
            only = np.where(np.array(pixels) == at, 1, np.nan).astype(dtype).reshape(1, -1, 1)
            grads = cudcn.ms_deform_attn_backward(only, value, shapes, None, locations, weight, method="discrete")
            assert grads.value[0, at] == pixels.count(at)
            assert not grads.sampling_locations.any()


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("shapes", [[(5, 4), (3, 2)], ((5, 4), (3, 2)), [[5, 4], [3, 2]]], ids=str)
def test_levels_by_their_shapes(shapes: Any) -> None:
    case = Attention("plain")
    tensors = case.tensors()
    short = {**tensors, "spatial_shapes": shapes, "level_start_index": None}
    assert np.array_equal(case.forward(short), case.forward(tensors))
    grads, want = case.backward(short, case.grad_output()), case.backward(tensors, case.grad_output())
    for name in ("value", "sampling_locations", "attention_weights"):
        assert np.array_equal(grads[name], want[name])


# ---- properties

sizes = st.integers(1, 5)


@st.composite
def any_windows(draw: st.DrawFn) -> Windows:
    group = draw(st.integers(1, 3))
    remove_center = draw(st.booleans())
    kernel = (3, 3) if remove_center else (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((reach, draw(st.integers(0, 3))) for reach in (dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    return draw(st.sampled_from([DCNv3, DCNv4]))(
        f"drawn {draw(st.integers(0, 99))}", batch=draw(sizes), channels=group * draw(st.integers(1, 3)),
        size=(draw(sizes), draw(sizes)), kernel=kernel, stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding, dilation=dilation, group=group, offset_scale=draw(st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0])),
        remove_center=remove_center, softmax=draw(st.booleans()), reach=draw(st.sampled_from([0.0, 0.5, 3.0, 100.0])),
    )  # fmt: skip


@st.composite
def any_attention(draw: st.DrawFn) -> Attention:
    levels, ordered = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3)), draw(st.booleans())
    return Attention(
        f"drawn {draw(st.integers(0, 99))}", batch=draw(sizes), queries=draw(sizes), heads=draw(st.integers(1, 3)),
        channels=draw(sizes), sizes=tuple(levels),
        points=draw(st.integers(1, 4) | st.tuples(*[st.integers(1, 4)] * len(levels))), softmax=draw(st.booleans()),
        gap=0 if ordered else draw(st.integers(0, 2)), method=draw(st.sampled_from(["bilinear", "discrete"])),
        layout=draw(st.sampled_from(["NSMD", "NMDS"])), starts=not ordered,
    )  # fmt: skip


any_case = st.one_of(any_windows(), any_attention())


@settings(max_examples=60, deadline=None)
@given(any_case)
def test_linear_in_the_image(case: Case) -> None:
    """The gradient is the adjoint: <grad_image, v> = <grad_output, f(v)>, and the same for weights not normalised."""
    tensors, grad_output = case.tensors(), case.grad_output()
    grads = case.backward(tensors, grad_output)
    product = (grad_output * case.forward(tensors)).sum()
    linear = [IMAGE[case.op.name]]
    if case.op.name != "dcnv4" and not case.attributes["softmax"]:
        linear.append(list(tensors)[-1])
    for name in linear:
        assert (grads[name] * tensors[name]).sum() == pytest.approx(product, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(any_case)
def test_images_are_independent(case: Case) -> None:
    tensors = case.tensors()
    image = {name: t if name in case.op.non_differentiable else t[-1:] for name, t in tensors.items()}
    np.testing.assert_allclose(case.forward(image), case.forward(tensors)[-1:], rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(any_case)
def test_emulated_on_any_case(case: Case) -> None:
    with pytest.MonkeyPatch.context() as device, emulator.settings(build="fast"):
        device.setenv("CUDCN_DEVICE", "emulator")
        out = case.forward(case.tensors())
        grads = case.backward(case.tensors(), case.grad_output())
    np.testing.assert_allclose(out, case.forward(case.tensors()), rtol=1e-10, atol=1e-10)
    for name, want in case.backward(case.tensors(), case.grad_output()).items():
        if want is not None:
            np.testing.assert_allclose(grads[name], want, rtol=1e-9, atol=1e-9, err_msg=name)


# ---- the edges


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**33)])
def test_places_that_are_nowhere(bad: float, case: Case) -> None:
    """They sample 0, give the image, themselves and their weight no gradient, and disturb no other sample."""
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    name = PLACES[case.op.name]
    first = case.backward(tensors, grad_output)[name].reshape(-1)[:12]  # places of the first query, in any operator
    at = np.abs(first).argmax()
    spoiled = {**tensors, name: tensors[name].copy()}
    spoiled[name].reshape(-1)[at] = bad
    far = {**tensors, name: tensors[name].copy()}
    far[name].reshape(-1)[at] = 1000
    case.close(case.forward(spoiled), case.forward(far), "float32")
    grads, want = case.backward(spoiled, grad_output), case.backward(far, grad_output)
    for n, grad in want.items():
        if grad is not None:
            case.close(grads[n], grad, "float32")
    assert not np.array_equal(case.forward(spoiled), case.forward(tensors))
    assert grads[name].reshape(-1)[at] == grads[name].reshape(-1)[at ^ 1] == 0


@pytest.mark.usefixtures("any_device")
def test_the_border_cell() -> None:
    """On an image of ones: 0 at -1 and at H, linear between; the slope at exactly -1 is the right-hand one."""
    positions = np.array([-1.5, -1.0, -0.25, 0.0, 2.0, 2.75, 3.0, 3.5])
    values = [0, 0, 0.75, 1, 1, 0.25, 0, 0]
    slopes = [0, 1, 1, 0, -1, -1, 0, 0]
    one = np.ones((1, 1, 1, 1))
    attributes = {"kernel_size": 1, "padding": 0, "stride": 3, "group": 1}
    for position, value, slope in zip(positions, values, slopes, strict=True):
        for axis in (0, 1):
            offset = np.ones((1, 1, 1, 2))
            offset[..., axis] = position
            tensors = (np.ones((1, 3, 3, 1)), offset, one)
            assert cudcn.dcnv3(*tensors, **attributes).item() == value
            grads = cudcn.dcnv3_backward(one, *tensors, **attributes)
            assert grads.offset[0, 0, 0, axis] == slope
            assert grads.mask.item() == value


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_nan_pixel_stays_where_it_is(case: Case) -> None:
    tensors = case.tensors("float32")
    image, places = IMAGE[case.op.name], PLACES[case.op.name]
    spoiled = {**tensors, image: np.full_like(tensors[image], np.nan), places: tensors[places].copy()}
    if isinstance(case, DCNv4):
        offset, mask = case.unpacked(tensors[places])
        spoiled[places] = case.packed(np.full_like(offset, 99), mask).astype(np.float32)
    else:
        spoiled[places][...] = 99
    assert not case.forward(spoiled).any()
    assert not case.backward(spoiled, case.grad_output("float32"))[places].any()


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("case", [c for c in (*DCNV3, *ATTENTION) if c.softmax], ids=str)
def test_a_nan_logit_is_its_querys_own(case: Any) -> None:
    tensors = case.tensors()
    name = list(tensors)[-1]
    spoiled = {**tensors, name: tensors[name].copy()}
    spoiled[name].reshape(-1)[0] = np.nan
    out, want = (case.forward(t).reshape(-1, case.output_shape()[-1]) for t in (spoiled, tensors))
    assert np.isnan(out[0]).any()
    assert np.array_equal(out[1:], want[1:])


@pytest.mark.usefixtures("any_device")
def test_images_without_a_pixel() -> None:
    """All samples are outside them."""
    input, ones = np.ones((2, 0, 3, 4), np.float32), np.ones((2, 1, 5, 3), np.float32)
    tensors, grad_output = (input, np.zeros((2, 1, 5, 2), np.float32), ones[..., :1]), np.ones((2, 1, 5, 4), np.float32)
    attributes = {"kernel_size": 1, "padding": ((1, 0), (1, 1)), "group": 1}
    assert not cudcn.dcnv3(*tensors, **attributes).any()
    grads = cudcn.dcnv3_backward(grad_output, *tensors, **attributes)
    assert not grads.offset.any()
    assert not grads.mask.any()


@pytest.mark.usefixtures("any_device")
def test_nothing_to_do() -> None:
    for case in PLAIN:
        empty = replace(case, batch=0)
        assert empty.forward(empty.tensors()).shape == empty.output_shape()
        grads = empty.backward(empty.tensors(), empty.grad_output())
        assert all(grad is None or grad.shape == empty.tensors()[name].shape for name, grad in grads.items())
    no_queries = Attention("no queries", queries=0)
    assert no_queries.forward(no_queries.tensors()).shape == (2, 0, 6)
    assert not no_queries.backward(no_queries.tensors(), no_queries.grad_output())["value"].any()
