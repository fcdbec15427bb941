"""Wrong arguments: each an error that names the operator, the rule and what it got, on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cudcn

f4 = np.float32


def zeros(*shape: int, dtype: Any = f4) -> np.ndarray:
    return np.zeros(shape, dtype)


_POOLED = {"input": zeros(2, 12, 7, 6), "rois": zeros(5, 5), "output_size": (3, 2)}
GOOD: dict[str, dict[str, Any]] = {
    "deform_conv2d": {
        "input": zeros(2, 4, 7, 6), "offset": zeros(2, 18, 7, 6), "weight": zeros(4, 4, 3, 3),
        "bias": zeros(4), "mask": zeros(2, 9, 7, 6), "padding": 1,
    },
    "roi_avg_pool": _POOLED,
    "psroi_pool": {**_POOLED, "group_size": 2},
    "deform_roi_pool": {**_POOLED, "offset": zeros(5, 2, 3, 2), "mask": zeros(5, 3, 2)},
    "deform_psroi_pool": {
        **_POOLED, "offset": zeros(5, 6, 2, 4), "mask": zeros(5, 3, 3, 2), "group_size": 2, "part_size": (2, 4),
    },
    "dcnv3": {"input": zeros(2, 7, 6, 8), "offset": zeros(2, 7, 6, 36), "mask": zeros(2, 7, 6, 18), "group": 2},
    "dcnv4": {"input": zeros(2, 7, 6, 8), "offset_mask": zeros(2, 7, 6, 56), "group": 2},
    "ms_deform_attn": {
        "value": zeros(2, 26, 2, 3),
        "spatial_shapes": np.array([[5, 4], [3, 2]]), "level_start_index": np.array([0, 20]),
        "sampling_locations": zeros(2, 5, 2, 2, 3, 2), "attention_weights": zeros(2, 5, 2, 2, 3),
    },
}  # fmt: skip

V2 = {"sampling_locations": zeros(2, 5, 2, 6, 2), "attention_weights": zeros(2, 5, 2, 6)}
CONVOLUTION = [
    ({"input": zeros(4, 7, 6)}, ValueError, r"input must be \(N, C, H, W\), got shape \(4, 7, 6\)"),
    ({"offset": zeros(18, 7, 6)}, ValueError, r"offset must be \(N, C, H, W\), got shape"),
    ({"weight": zeros(4, 4, 9)}, ValueError, r"weight must be .*, got shape \(4, 4, 9\)"),
    ({"offset": zeros(2, 9, 7, 6)}, ValueError, r"offset must have .* a multiple of 18 .* got 9"),
    ({"offset": zeros(2, 54, 7, 6)}, ValueError, r".*offset_groups divide input's 4 channels, got 54"),
    ({"offset": zeros(2, 18, 7, 5)}, ValueError, r"offset must be .* = \(2, 18, 7, 6\), got \(2, 18, 7, 5\)"),
    ({"offset": zeros(1, 18, 7, 6)}, ValueError, r"offset must be .* = \(2, 18, 7, 6\), got \(1, 18, 7, 6\)"),
    ({"mask": zeros(2, 18, 7, 6)}, ValueError, r"mask must have offset's 1 offset_groups, .* 9 channels, got 18"),
    ({"bias": zeros(5)}, ValueError, r"bias must be \(C_out,\) = \(4,\), got \(5,\)"),
    ({"weight": zeros(4, 3, 3, 3)}, ValueError, r"weight .* input's 4 channels into groups .* got \(4, 3, 3, 3\)"),
    ({"weight": zeros(5, 2, 3, 3)}, ValueError, r".*groups that divide C_out, got \(5, 2, 3, 3\)"),
    ({"weight": zeros(4, 0, 3, 3)}, ValueError, r".*must not be empty, got .*\(4, 0, 3, 3\)"),
    ({"weight": zeros(4, 4, 10, 3)}, ValueError, r"the output's height would be empty: .* spans 10, .* 9"),
    ({"dilation": (1, 4)}, ValueError, r"the output's width would be empty: .* spans 9, .* 8"),
    ({"stride": 0}, ValueError, r"stride must be at least 1 .* got 0"),
    ({"stride": (1, -2)}, ValueError, r"stride must be at least 1 .* got -2"),
    ({"stride": 1.5}, TypeError, r"stride must be an int, got 1.5"),
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
POOLING = [
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
    ({"output_size": 2.0}, TypeError, r"output_size must be an int, got 2.0"),
    ({"output_size": (2**15, 2**14)}, ValueError, r"there must be fewer than 2\*\*30 bins and parts, got 5 rois"),
    ({"spatial_scale": np.inf}, ValueError, r"spatial_scale must be finite in float32, got inf"),
    ({"spatial_scale": np.nan}, ValueError, r"spatial_scale must be finite in float32, got nan"),
    ({"spatial_scale": True}, TypeError, r"spatial_scale must be a number, got True"),
    ({"spatial_scale": "1"}, TypeError, r"spatial_scale must be a number, got '1'"),
]
WINDOWS = [
    ({"input": zeros(7, 6, 8)}, ValueError, r"input must be \(N, H, W, C\), got shape \(7, 6, 8\)"),
    ({"input": zeros(2, 7, 6, 9)}, ValueError, r"group must divide input's channels, got 2 and 9"),
    ({"input": zeros(2, 7, 6, 0)}, ValueError, r"group must divide input's channels, got 2 and 0"),
    ({"input": zeros(2, 7, 6, 8, dtype=np.int32)}, TypeError, r"input must be float16, .* got int32"),
    ({"group": 0}, ValueError, r"group must be at least 1 .* got 0"),
    ({"group": 2.0}, TypeError, r"group must be an int, got 2.0"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1 .* got 0"),
    ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be an int or a pair"),
    ({"kernel_size": (10, 3)}, ValueError, r"the output's height would be empty: .* spans 10, .* 9"),
    ({"dilation": (1, 4)}, ValueError, r"the output's width would be empty: .* spans 9, .* 8"),
    ({"stride": 0}, ValueError, r"stride must be at least 1 .* got 0"),
    ({"padding": -1}, ValueError, r"padding must be at least 0 .* got -1"),
    ({"offset_scale": 1e39}, ValueError, r"offset_scale must be finite in float32, got 1e\+39"),
    ({"offset_scale": np.inf}, ValueError, r"offset_scale must be finite in float32, got inf"),
    ({"offset_scale": "2"}, TypeError, r"offset_scale must be a number, got '2'"),
    ({"remove_center": True, "kernel_size": 2}, ValueError, r"remove_center needs a square kernel of odd .* \(2, 2\)"),
    ({"remove_center": True, "kernel_size": (3, 5)}, ValueError, r"remove_center needs a square .* \(3, 5\)"),
    ({"remove_center": True, "kernel_size": 1}, ValueError, r"remove_center needs a square .* above 1, got"),
    ({"remove_center": 1}, TypeError, r"remove_center must be True or False, got 1"),
    ({"softmax": None}, TypeError, r"softmax must be True or False, got None"),
]
BAD = [
    *(("deform_conv2d", *row) for row in CONVOLUTION),
    *((name, *row) for name in GOOD if name.endswith("pool") for row in POOLING),
    ("psroi_pool", {"group_size": (5, 1)}, ValueError, r"group_size \(5, 1\) must divide .* 5 equal groups, got 12"),
    ("psroi_pool", {"group_size": 0}, ValueError, r"group_size must be at least 1 .* got 0"),
    ("deform_roi_pool", {"offset": zeros(5, 2, 3, 3)}, ValueError, r"offset must be .* = \(5, 2, 3, 2\), got \(5, 2"),
    ("deform_roi_pool", {"offset": zeros(4, 2, 3, 2)}, ValueError, r"offset must be .* = \(5, 2, 3, 2\), got \(4"),
    ("deform_roi_pool", {"offset": zeros(5, 2, 3, 2, dtype=np.float16)}, TypeError, r"offset must be float32 like"),
    ("deform_roi_pool", {"mask": zeros(5, 1, 3, 2)}, ValueError, r"mask must be .* = \(5, 3, 2\), got \(5, 1, 3, 2\)"),
    ("deform_roi_pool", {"mask": zeros(5, 3, 2, dtype=np.float64)}, TypeError, r"mask must be float32 like input"),
    ("deform_roi_pool", {"sampling_ratio": 2.0}, TypeError, r"sampling_ratio must be an int, got 2.0"),
    ("deform_roi_pool", {"sampling_ratio": 2**23 + 1}, ValueError, r"sampling_ratio must be at most 2\*\*23, got 838"),
    ("deform_roi_pool", {"sampling_ratio": 2**30}, ValueError, r"sampling_ratio must be at most 2\*\*23, got 10737"),
    ("deform_roi_pool", {"gamma": 1e39}, ValueError, r"gamma must be finite in float32, got 1e\+39"),
    ("deform_roi_pool", {"gamma": -np.inf}, ValueError, r"gamma must be finite in float32, got -inf"),
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
    ("deform_psroi_pool", {"trans_std": np.nan}, ValueError, r"trans_std must be finite in float32, got nan"),
    *(("dcnv3", *row) for row in WINDOWS),
    *(("dcnv4", *row) for row in WINDOWS),
    *(("dcnv3", *row) for row in [
        ({"offset": zeros(2, 7, 6, 18)}, ValueError, r"offset must be .* \* 2\) = \(2, 7, 6, 36\), got .* 18\)"),
        ({"offset": zeros(1, 7, 6, 36)}, ValueError, r"offset must be .* = \(2, 7, 6, 36\), got \(1, 7, 6, 36\)"),
        ({"remove_center": True}, ValueError, r"offset must be .* = \(2, 7, 6, 32\), got \(2, 7, 6, 36\)"),
        ({"mask": zeros(2, 7, 6, 36)}, ValueError, r"mask must be .* = \(2, 7, 6, 18\), got \(2, 7, 6, 36\)"),
        ({"mask": zeros(2, 7, 6, 18, dtype=np.float16)}, TypeError, r"mask must be float32 like input, got float16"),
        ({"offset": zeros(2, 7, 6, 36, dtype=np.float64)}, TypeError, r"offset must be float32 like input, got"),
        ({"mask": None}, TypeError, r"mask is required, got None"),
    ]),
    *(("dcnv4", *row) for row in [
        ({"offset_mask": zeros(2, 7, 6, 54)}, ValueError, r"offset_mask must be .* = \(2, 7, 6, 56\), got .* 54\)"),
        ({"offset_mask": zeros(2, 7, 6, 56, dtype=np.float64)}, TypeError, r"offset_mask must be float32 like input"),
    ]),
    *(("ms_deform_attn", *row) for row in [
        ({"value": zeros(2, 26, 6)}, ValueError, r"value must be \(N, S, M, D\), got shape \(2, 26, 6\)"),
        ({"value": zeros(2, 26, 2, 3, dtype=int)}, TypeError, r"value must be float16, .* got int64"),
        ({"value": zeros(2, 26, 2, 0)}, ValueError, r"M, D, L and P must be at least 1, got value \(2, 26, 2, 0\)"),
        ({"value": zeros(3, 26, 2, 3)}, ValueError, r"sampling_locations must be .* = \(3, 5, 2, 2, 3, 2\), got"),
        ({"spatial_shapes": zeros(2, 2)}, TypeError, r"spatial_shapes must be int32 or int64, got float32"),
        ({"spatial_shapes": zeros(2, 3, dtype=int)}, ValueError, r"spatial_shapes must be .* = \(2, 2\), got \(2, 3\)"),
        ({"level_start_index": zeros(3, dtype=int)}, ValueError, r"level_start_index must be .* = \(2,\), got \(3,\)"),
        ({"sampling_locations": zeros(2, 5, 2, 2, 3)}, ValueError, r"sampling_locations must be \(N, Q, M, L, P, 2\)"),
        ({"sampling_locations": zeros(2, 5, 2, 2, 3, 3)}, ValueError, r"sampling_locations must be .* got .* 3, 3\)"),
        ({"sampling_locations": zeros(2, 5, 2, 1, 3, 2)}, ValueError, r"sampling_locations must be .* got .* 3, 2\)"),
        ({"attention_weights": zeros(2, 5, 2, 2, 4)}, ValueError, r"attention_weights must be .* = .* 2, 3\), got"),
        ({"attention_weights": zeros(2, 5, 2, 2, 3, dtype=np.float64)}, TypeError, r"attention_weights .* like value"),
        ({"softmax": "yes"}, TypeError, r"softmax must be True or False, got 'yes'"),
        ({"points": (3, 3)}, ValueError, r"sampling_locations must be \(N, Q, M, sum\(points\), 2\), got shape"),
        ({"points": (3, 4), **V2}, ValueError, r"sampling_locations must be .* = \(2, 5, 2, 7, 2\), got .* 6, 2\)"),
        ({"points": (4, 2), "attention_weights": zeros(2, 5, 2, 2, 3), "sampling_locations": V2["sampling_locations"]},
         ValueError, r"attention_weights must be \(N, Q, M, sum\(points\)\) = \(2, 5, 2, 6\), got"),
        ({"points": (6,), **V2}, ValueError, r"points must have one number for each of 2 levels, got \(6,\)"),
        ({"points": (6, 0), **V2}, ValueError, r"points\[1\] must be at least 1 .* got 0"),
        ({"points": (4, 2.0), **V2}, TypeError, r"points\[1\] must be an int, got 2.0"),
        ({"points": 3}, ValueError, r"points must be a sequence of ints, got 3"),
        ({"points": ()}, ValueError, r"points must be a sequence of ints, got \(\)"),
        ({"points": (1,) * 17}, ValueError, r"points must be of at most 16 levels, .* got 17 and 17"),
        ({"points": (2**31 - 1, 1)}, ValueError, r"points must be of .* fewer than 2\*\*31 together, got 2 and 21"),
        ({"method": "default"}, ValueError, r"method must be 'bilinear' or 'discrete', got 'default'"),
        ({"method": "discrete", "spatial_shapes": zeros(17, 2, dtype=int), "level_start_index": None},
         ValueError, r"method 'discrete' takes at most 16 levels, got 17"),
        ({"layout": "NHWC"}, ValueError, r"layout must be 'NSMD' or 'NMDS', got 'NHWC'"),
        ({"layout": "NMDS"}, ValueError, r"sampling_locations must be .* = \(2, 5, 26, 2, 3, 2\), got"),
        ({"spatial_shapes": [5, 4]}, ValueError, r"spatial_shapes\[0\] must be a sequence of ints, got 5"),
        ({"spatial_shapes": [(5, 4), (3, 2, 1)]}, ValueError, r"each of spatial_shapes must be \(H, W\), got \[\(5"),
        ({"spatial_shapes": [(5, 4), (3, 0)]}, ValueError, r"spatial_shapes\[1\]\[1\] must be at least 1 .* 0"),
        ({"spatial_shapes": []}, ValueError, r"level_start_index must be \(L,\) = \(0,\), got \(2,\)"),
    ]),
]  # fmt: skip


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
    out = getattr(cudcn, name)(**GOOD[name])
    for grad_output in (zeros(*out.shape[:-1], out.shape[-1] + 1), zeros(*out.shape, dtype=np.float64)):
        with pytest.raises(ValueError, match=rf"{name}_backward: grad_output must have .* got \({len(out)}, "):
            getattr(cudcn, f"{name}_backward")(grad_output, **GOOD[name])


@pytest.mark.parametrize("name", [name for name in GOOD if name.endswith("pool")])
def test_attributes_by_name_only(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(cudcn, name)(_POOLED["input"], _POOLED["rois"], None, None, 3)
    with pytest.raises(TypeError, match="output_size"):
        getattr(cudcn, name)(_POOLED["input"], _POOLED["rois"])


@pytest.mark.parametrize(
    ("shapes", "starts"),
    [([[0, 4], [3, 2]], [0, 20]), ([[5, 4], [3, 3]], [0, 20]), ([[5, 4], [3, 2]], [-1, 20])],
)
def test_bad_levels(shapes: Any, starts: Any) -> None:
    bad = {**GOOD["ms_deform_attn"], "spatial_shapes": np.array(shapes), "level_start_index": np.array(starts)}
    with pytest.raises(ValueError, match=r"ms_deform_attn: each level must .* inside value's 26, got spatial_shapes"):
        cudcn.ms_deform_attn(**bad)


def test_bad_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", "tpu")
    with pytest.raises(ValueError, match=r"CUDCN_DEVICE must be 'cpu' or 'emulator'.* got 'tpu'"):
        cudcn.deform_conv2d(**GOOD["deform_conv2d"])
