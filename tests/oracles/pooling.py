"""Slow, obvious loops of the RoI pooling operators in float64, written from the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Pair = tuple[int, int]


def psroi_pool(input: Any, rois: Any, output_size: Pair, group_size: Pair, spatial_scale: float) -> np.ndarray:
    """R-FCN, section 2: bin (i, j) averages its own score map over its own pixels."""
    (rows, columns), (groups_y, groups_x), (_, _, height, width) = output_size, group_size, input.shape
    out = np.zeros((len(rois), input.shape[1] // (groups_y * groups_x), rows, columns))
    for r, c, i, j in np.ndindex(out.shape):
        n, x1, y1, x2, y2 = (_nearest(v) for v in rois[r])
        top, left = y1 * spatial_scale, x1 * spatial_scale
        bin_height = max((y2 + 1) * spatial_scale - top, 0.1)
        bin_width = max((x2 + 1) * spatial_scale - left, 0.1)
        maps = input[n, (c * groups_y + i * groups_y // rows) * groups_x + j * groups_x // columns]
        pixels = [
            maps[y, x]
            for y in range(
                math.floor(top + i * bin_height / rows), math.ceil(top + (i + 1) * bin_height / rows)
            )
            for x in range(
                math.floor(left + j * bin_width / columns), math.ceil(left + (j + 1) * bin_width / columns)
            )
            if 0 <= y < height and 0 <= x < width
        ]  # fmt: skip
        out[r, c, i, j] = sum(pixels) / len(pixels) if pixels else 0.0
    return out


def roi_avg_pool(input: Any, rois: Any, output_size: Pair, spatial_scale: float) -> np.ndarray:
    return psroi_pool(input, rois, output_size, (1, 1), spatial_scale)


def deform_roi_pool(
    input: Any, rois: Any, offset: Any, mask: Any,
    output_size: Pair, spatial_scale: float, sampling_ratio: int, gamma: float,
) -> np.ndarray:  # fmt: skip
    """RoIAlign's samples, moved by DCN's normalised offsets, the mean modulated as in DCNv2."""
    (rows, columns), (_, channels, height, width) = output_size, input.shape
    out = np.zeros((len(rois), channels, rows, columns))
    for r, c, i, j in np.ndindex(out.shape):
        n, x1, y1, x2, y2 = rois[r]
        roi_height, roi_width = (y2 - y1) * spatial_scale, (x2 - x1) * spatial_scale
        bin_height, bin_width = roi_height / rows, roi_width / columns
        grid_y = sampling_ratio or math.ceil(bin_height)
        grid_x = sampling_ratio or math.ceil(bin_width)
        dx, dy = (0.0, 0.0) if offset is None else gamma * offset[r, :, i, j] * (roi_width, roi_height)
        total = 0.0
        for s in range(grid_y):
            for t in range(grid_x):
                y = y1 * spatial_scale - 0.5 + (i + (s + 0.5) / grid_y) * bin_height + dy
                x = x1 * spatial_scale - 0.5 + (j + (t + 0.5) / grid_x) * bin_width + dx
                if -1 <= y <= height and -1 <= x <= width:
                    total += _clamped(input[int(n), c], y, x)
        modulation = 1.0 if mask is None else mask[r, i, j]
        out[r, c, i, j] = modulation * total / max(grid_y * grid_x, 1)
    return out


def deform_psroi_pool(
    input: Any, rois: Any, offset: Any, mask: Any,
    output_size: Pair, group_size: Pair, part_size: Pair, sample_per_part: int, trans_std: float, spatial_scale: float,
) -> np.ndarray:  # fmt: skip
    """DCN, section 2.2, with the samples of its authors' operator."""
    (rows, columns), (groups_y, groups_x), (_, _, height, width) = output_size, group_size, input.shape
    out_channels = input.shape[1] // (groups_y * groups_x)
    classes = 1 if offset is None and mask is None else mask.shape[1] if offset is None else offset.shape[1] // 2
    out = np.zeros((len(rois), out_channels, rows, columns))
    for r, c, i, j in np.ndindex(out.shape):
        n, x1, y1, x2, y2 = (_nearest(v) for v in rois[r])
        top, left = y1 * spatial_scale - 0.5, x1 * spatial_scale - 0.5
        roi_height = max((y2 + 1) * spatial_scale - 0.5 - top, 0.1)
        roi_width = max((x2 + 1) * spatial_scale - 0.5 - left, 0.1)
        k = c // (out_channels // classes)
        if offset is not None:
            part = (i * part_size[0] // rows, j * part_size[1] // columns)
            left += trans_std * roi_width * offset[(r, 2 * k, *part)]
            top += trans_std * roi_height * offset[(r, 2 * k + 1, *part)]
        maps = input[n, (c * groups_y + i * groups_y // rows) * groups_x + j * groups_x // columns]
        kept = []
        for s in range(sample_per_part):
            for t in range(sample_per_part):
                y = top + (i + s / sample_per_part) * roi_height / rows
                x = left + (j + t / sample_per_part) * roi_width / columns
                if -0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5:
                    kept.append(_clamped(maps, y, x))
        modulation = 1.0 if mask is None else mask[r, k, i, j]
        out[r, c, i, j] = modulation * sum(kept) / len(kept) if kept else 0.0
    return out


def _nearest(value: float) -> int:
    """Halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _clamped(image: np.ndarray, y: float, x: float) -> float:
    """The bilinear value at the place of the image that is nearest to (y, x)."""
    height, width = image.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)
