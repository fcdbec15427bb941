"""The operators' formulas on torch tensors, for autograd to differentiate: slow, and plain."""

from __future__ import annotations

import math
from typing import Any

import torch


def bilinear(image: Any, y: Any, x: Any) -> Any:
    """(C, H, W) at places of any shape: (C, *shape). Outside, and one pixel beyond the border, the image is 0."""
    height, width = image.shape[1:]
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    total = 0
    for dy in 0, 1:
        for dx in 0, 1:
            row, column = y.detach().floor() + dy, x.detach().floor() + dx
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixels = image[:, row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
            total = total + pixels * torch.where(there, (1 - (y - row).abs()) * (1 - (x - column).abs()), 0)
    return total


def deform_conv2d(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any,
    stride: Any, padding: Any, dilation: Any, groups: int, offset_groups: int,
) -> Any:  # fmt: skip
    batch, channels = input.shape[:2]
    height, width = offset.shape[2:]
    taps, kw = weight[0, 0].numel(), weight.shape[3]
    oy, ox = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = []
    for n in range(batch):
        columns = []
        for g, image in enumerate(input[n].split(channels // offset_groups)):
            samples = []
            for k in range(taps):
                i, j = divmod(k, kw)
                dy, dx = offset[n, 2 * (g * taps + k)], offset[n, 2 * (g * taps + k) + 1]
                y = oy * stride[0] - padding[0] + i * dilation[0] + dy
                x = ox * stride[1] - padding[1] + j * dilation[1] + dx
                sample = bilinear(image, y, x)
                samples.append(sample if mask is None else sample * mask[n, g * taps + k])
            columns.append(torch.stack(samples, 1))
        grouped = torch.cat(columns).unflatten(0, (groups, -1))
        weights = weight.flatten(2).unflatten(0, (groups, -1))
        out.append(torch.einsum("gckyx,gock->goyx", grouped, weights).flatten(0, 1))
    return torch.stack(out) + (0 if bias is None else bias[:, None, None])


def deform_roi_pool(
    input: Any, rois: Any, offset: Any, output_size: Any, spatial_scale: float, sampling_ratio: int, gamma: float
) -> Any:
    (rows, columns), (height, width) = output_size, input.shape[2:]
    out = []
    for r, (n, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (c * spatial_scale - 0.5 for c in corners)
        bin_height, bin_width = (bottom - top) / rows, (right - left) / columns
        grid_y, grid_x = sampling_ratio or math.ceil(bin_height), sampling_ratio or math.ceil(bin_width)
        for i in range(rows):
            for j in range(columns):
                dx, dy = (0, 0) if offset is None else offset[r, :, i, j]
                y = (
                    top
                    + (i + (torch.arange(grid_y, dtype=torch.float64) + 0.5) / grid_y) * bin_height
                    + gamma * (bottom - top) * dy
                )
                x = (
                    left
                    + (j + (torch.arange(grid_x, dtype=torch.float64) + 0.5) / grid_x) * bin_width
                    + gamma * (right - left) * dx
                )
                y, x = (t.expand(grid_y, grid_x) for t in (y[:, None], x[None]))
                inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
                samples = bilinear(input[int(n)], y.clamp(0, height - 1), x.clamp(0, width - 1))
                out.append((samples * inside).sum((1, 2)) / max(grid_y * grid_x, 1))
    return torch.stack(out).unflatten(0, (len(rois), rows, columns)).movedim(-1, 1)


def deform_psroi_pool(
    input: Any, rois: Any, offset: Any, output_size: Any, sample_per_part: int, trans_std: float, spatial_scale: float
) -> Any:
    """With a group and a part for each bin; offset (R, 2 * classes, *output_size) or None."""
    (rows, columns), (height, width) = output_size, input.shape[2:]
    channels = input.shape[1] // (rows * columns)
    out = []
    for r, (n, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (math.floor(c + 0.5) for c in corners)
        left, top = left * spatial_scale - 0.5, top * spatial_scale - 0.5
        roi_height = max((bottom + 1) * spatial_scale - 0.5 - top, 0.1)
        roi_width = max((right + 1) * spatial_scale - 0.5 - left, 0.1)
        steps = torch.arange(sample_per_part, dtype=torch.float64) / sample_per_part
        for c in range(channels):
            for i in range(rows):
                for j in range(columns):
                    dx = dy = 0
                    if offset is not None:
                        k = c // (channels // (offset.shape[1] // 2))
                        dx, dy = offset[r, 2 * k : 2 * k + 2, i, j]
                    y = top + (i + steps) * roi_height / rows + trans_std * roi_height * dy
                    x = left + (j + steps) * roi_width / columns + trans_std * roi_width * dx
                    y, x = (t.expand(sample_per_part, sample_per_part) for t in (y[:, None], x[None]))
                    kept = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
                    image = input[int(n), (c * rows + i) * columns + j][None]
                    samples = bilinear(image, y.clamp(0, height - 1), x.clamp(0, width - 1))[0]
                    out.append((samples * kept).sum() / max(int(kept.sum()), 1))
    return torch.stack(out).unflatten(0, (len(rois), channels, rows, columns))


def ms_deform_attn(value: Any, shapes: Any, locations: Any, weights: Any) -> Any:
    """Of levels that lie one after the other in value."""
    levels = value.split([int(h) * int(w) for h, w in shapes], 1)
    out = []
    for n in range(value.shape[0]):
        for m in range(value.shape[2]):
            total = 0
            for level, (height, width) in enumerate(shapes.tolist()):
                image = levels[level][n, :, m].T.unflatten(1, (height, width))
                x, y = locations[n, :, m, level].unbind(-1)
                samples = bilinear(image, y * height - 0.5, x * width - 0.5)
                total = total + (samples * weights[n, :, m, level]).sum(-1)
            out.append(total.T)
    return torch.stack(out).unflatten(0, (value.shape[0], -1)).transpose(1, 2).flatten(2)


def dcn(
    input: Any, offset: Any, mask: Any, kernel_size: int, pad: int, dilation: int, group: int, offset_scale: float,
    remove_center: bool,
) -> Any:  # fmt: skip
    """DCNv3's and DCNv4's, of stride 1: offset (N, H, W, group, P, 2), x before y, and mask (N, H, W, group, P)."""
    taps = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]  # columns first
    if remove_center:
        del taps[len(taps) // 2]
    center = dilation * (kernel_size - 1) // 2
    oy, ox = torch.meshgrid(*(torch.arange(n) for n in offset.shape[1:3]), indexing="ij")
    out = []
    for n in range(input.shape[0]):
        for g, image in enumerate(input[n].permute(2, 0, 1).chunk(group)):
            total = 0
            for p, (i, j) in enumerate(taps):
                dx, dy = offset[n, :, :, g, p].unbind(-1)
                y = oy - pad + center + (j * dilation - center + dy) * offset_scale
                x = ox - pad + center + (i * dilation - center + dx) * offset_scale
                total = total + bilinear(image, y, x) * mask[n, :, :, g, p]
            out.append(total)
    return torch.stack(out).unflatten(0, (input.shape[0], group)).flatten(1, 2).permute(0, 2, 3, 1)
