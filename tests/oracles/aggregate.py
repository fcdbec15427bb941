"""Slow, obvious loops in float64 for dcnv3, dcnv4 and ms_deform_attn. Written from the papers' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bilinear import bilinear


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def taps(kernel: tuple[int, int], remove_center: bool) -> list[tuple[int, int]]:
    """(row, column) of each tap, one column after another."""
    kh, kw = kernel
    every = [(row, column) for column in range(kw) for row in range(kh)]
    return [tap for tap in every if not (remove_center and tap == (kh // 2, kw // 2))]


def dcnv3(
    input: Any, offset: Any, mask: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, group: int,
    offset_scale: float, remove_center: bool, softmax: bool,
) -> np.ndarray:  # fmt: skip
    """InternImage's equation 2. Attributes are canonical: pairs, and padding as (top, bottom, left, right)."""
    batch, height, width, channels = input.shape
    (kh, kw), (top, bottom, left, right) = kernel_size, padding
    places = taps(kernel_size, remove_center)
    out_height = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    offset = offset.reshape(batch, out_height, out_width, group, len(places), 2)
    mask = _weights(mask.reshape(batch, out_height, out_width, group, len(places)), softmax)
    middle_y, middle_x = dilation[0] * (kh - 1) // 2, dilation[1] * (kw - 1) // 2
    out = np.zeros((batch, out_height, out_width, channels))
    for n, oy, ox, c in np.ndindex(out.shape):
        g = c // (channels // group)
        for p, (row, column) in enumerate(places):
            dx, dy = offset[n, oy, ox, g, p]
            y = oy * stride[0] - top + middle_y * (1 - offset_scale) + (row * dilation[0] + dy) * offset_scale
            x = ox * stride[1] - left + middle_x * (1 - offset_scale) + (column * dilation[1] + dx) * offset_scale
            out[n, oy, ox, c] += mask[n, oy, ox, g, p] * bilinear(input[n, :, :, c], y, x)
    return out


def unpacked(offset_mask: Any, group: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """dcnv4's packed tensor as dcnv3's offset and mask."""
    parts = [offset_mask[..., g * 3 * points : (g + 1) * 3 * points] for g in range(group)]
    offset = np.concatenate([part[..., : 2 * points] for part in parts], axis=-1)
    return offset, np.concatenate([part[..., 2 * points :] for part in parts], axis=-1)


def ms_deform_attn(
    value: Any, spatial_shapes: Any, level_start_index: Any, sampling_locations: Any, attention_weights: Any,
    softmax: bool, points: Any, method: str, layout: str,
) -> np.ndarray:  # fmt: skip
    """Deformable DETR's equation 3, and what RT-DETRv2 adds."""
    value = value if layout == "NSMD" else np.moveaxis(value, -1, 1)
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    per_head = attention_weights.reshape(batch, queries, heads, -1)
    weights = _weights(per_head, softmax)
    locations = sampling_locations.reshape(*weights.shape, 2)
    levels = np.repeat(range(len(spatial_shapes)), counts(points or attention_weights.shape[-1], len(spatial_shapes)))
    out = np.zeros((batch, queries, heads, channels))
    for n, q, m, c in np.ndindex(out.shape):
        for level, (x, y), weight in zip(levels, locations[n, q, m], weights[n, q, m], strict=True):
            height, width = spatial_shapes[level]
            before = spatial_shapes[:level].prod(1).sum()
            start = before if level_start_index is None else level_start_index[level]
            image = value[n, start : start + height * width, m, c].reshape(height, width)
            if method == "bilinear":
                out[n, q, m, c] += weight * bilinear(image, y * height - 0.5, x * width - 0.5)
            else:
                row, column = (min(max(int(s * size + 0.5), 0), size - 1) for s, size in ((y, height), (x, width)))
                out[n, q, m, c] += weight * image[row, column]
    return out.reshape(batch, queries, heads * channels)


def counts(points: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """How many points each level has, if `points` are of every level or of each."""
    return (points,) * levels if isinstance(points, int) else points


def _weights(raw: np.ndarray, normalise: bool) -> np.ndarray:
    return softmax(raw) if normalise else raw
