"""The operators' formulas in torch's own operations.

They are what second derivatives are made of, and what torch.onnx writes; the first derivative never runs them. Each
holds all samples of a call in memory at once, with the four pixels around them. Derivatives are those of the docstrings
of `cudcn.ops`: floor has none, so that a position moves inside of its cell, and a sample that is left out has none.
"""

from __future__ import annotations

from typing import Any

import torch

from cudcn.geometry import Aggregation, Attention, Convolution, RoIPooling
from cudcn.op import Op, specs

Tensor = torch.Tensor


def compute(op: Op, *arguments: Any) -> Tensor:
    """The output for the arguments of the operator in `torch.ops.cudcn`."""
    tensors, g = arguments[: len(op.tensors)], geometry(op, *arguments)
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32  # in which the kernels calculate
    wide = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    if isinstance(g, Convolution):
        return _convolve(g, *wide).to(tensors[0].dtype)
    if isinstance(g, RoIPooling):
        return _average(g, *wide).to(tensors[0].dtype) if g.kind == "Average" else _pool(g, *wide).to(tensors[0].dtype)
    return _aggregate(g, *wide).to(tensors[0].dtype)


def geometry(op: Op, *arguments: Any) -> Any:
    count = len(op.tensors)
    values = (tuple(v) if isinstance(v, list) else v for v in arguments[count:])
    return op.geometry(specs(arguments[:count]), **dict(zip(op.attributes, values, strict=True)))


def _convolve(
    g: Convolution, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    if g.layout == "NHWC":
        input, offset = input.movedim(-1, 1), offset.movedim(-1, 1)
        mask = None if mask is None else mask.movedim(-1, 1)
    per_group, places = (g.batch, g.offset_groups), (g.out_height, g.out_width)
    pixels = input.reshape(*per_group, g.channels // g.offset_groups, g.height * g.width).transpose(2, 3)
    dy, dx = offset.reshape(*per_group, g.taps, 2, *places).unbind(3)
    rows, columns = (_steps(size, input) for size in g.kernel)
    top, left = rows * g.dilation[0] - g.padding[0], columns * g.dilation[1] - g.padding[1]
    y = dy + top.repeat_interleave(g.kernel[1])[:, None, None] + _steps(g.out_height, input)[:, None] * g.stride[0]
    x = dx + left.repeat(g.kernel[0])[:, None, None] + _steps(g.out_width, input) * g.stride[1]
    inside = _inside(y, g.height) & _inside(x, g.width)
    factor = torch.ones_like(y) if mask is None else mask.reshape(y.shape)
    columns = _samples(pixels, y, x, g.height, g.width, inside) * torch.where(inside, factor, 0)[..., None]

    by_group = columns.movedim(-1, 2).reshape(g.batch, g.groups, -1, g.taps, *places)
    out = torch.einsum("ngckyx,gock->ngoyx", by_group, weight.reshape(g.groups, -1, by_group.shape[2], g.taps))
    out = out.flatten(1, 2) + (0 if bias is None else bias[:, None, None])
    return out if g.layout == "NCHW" else out.movedim(1, -1)


def _aggregate(g: Aggregation, *tensors: Tensor) -> Tensor:
    image, places, weights = g.views(*tensors)
    if g.softmax:
        weights = weights.softmax(-1)
    height: Any
    width: Any
    first: Any
    if isinstance(g, Attention):
        height, width, first = _levels(g, *tensors[1:3])
        half = -0.5 if g.discrete else 0.5
        x, y = places[..., 0] * width - half, places[..., 1] * height - half
    else:
        height, width, first = g.height, g.width, 0
        y, x = _in_windows(g, places)
    if isinstance(g, Attention) and g.discrete:
        inside = y.isfinite() & x.isfinite()
        weights = weights + torch.where(inside, 0 * y + 0 * x, 0)  # a gradient of 0 for the places, not none
        y, x = (torch.minimum(t.detach().floor().clamp(min=0), size - 1) for t, size in ((y, height), (x, width)))
    else:
        inside = _inside(y, height) & _inside(x, width)
    if isinstance(g, Attention):  # a level that does not lie inside value adds nothing
        inside = inside & (first >= 0) & (first + height * width <= g.pixels)
    # places are (N, *queries, G, samples): the group comes before the queries where pixels are taken
    y, x, kept, factor = (t.movedim(3, 1) for t in (y, x, inside, torch.where(inside, weights, 0)))
    pixels = image.reshape(g.batch, g.pixels, g.groups, g.group_channels).transpose(1, 2)
    if isinstance(g, Attention) and g.discrete:
        y, x = (torch.where(kept, t, 0).long() for t in (y, x))
        samples = _gathered(pixels, first + y * width + x, kept)
    else:
        samples = _samples(pixels, y, x, height, width, kept, first)
    sums = (samples * factor[..., None]).sum(-2)
    return sums.movedim(1, 3).reshape(g.output.shape)


def _levels(g: Attention, shapes: Tensor, starts: Tensor | None) -> list[Tensor]:
    """The height, width and first pixel of each sample's level."""
    height, width = shapes.unbind(1)
    if starts is None:
        starts = (height * width).cumsum(0) - height * width
    level = torch.tensor([level for level, points in enumerate(g.points) for _ in range(points)], device=shapes.device)
    return [t[level] for t in (height, width, starts)]


def _in_windows(g: Any, places: Tensor) -> list[Tensor]:
    """Where the taps of dcnv3 and dcnv4 lie, y and x; they are numbered along the height first."""
    taps = torch.arange(g.samples + g.remove_center, device=places.device)
    if g.remove_center:
        taps = torch.cat([taps[: g.samples // 2], taps[g.samples // 2 + 1 :]])
    found = []
    for axis, (tap, offset) in enumerate(((taps % g.kernel[0], places[..., 1]), (taps // g.kernel[0], places[..., 0]))):
        query = _steps(g.queries[axis], places) * g.stride[axis] - g.padding[axis] + g.center[axis]
        around = (tap * g.dilation[axis] - g.center[axis]).to(places.dtype)
        query = query.reshape((-1, 1, 1, 1) if axis == 0 else (-1, 1, 1))
        found.append(query + (around + offset) * g.offset_scale)
    return found


def _pool(g: RoIPooling, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
    rows, columns = g.output_size
    bin_rows, bin_columns = (torch.arange(size, device=input.device) for size in g.output_size)
    part_rows = bin_rows * g.part_size[0] // rows
    part_columns = bin_columns * g.part_size[1] // columns
    dx = dy = rois.new_zeros(g.rois, g.classes, rows, columns)
    if offset is not None:
        of_bins = offset[:, :, part_rows[:, None], part_columns].unflatten(1, (g.classes, 2))
        dx, dy = of_bins.unbind(2)
    y, kept_y, count_y = _along(g, rois, 2, bin_rows[:, None], rows, g.height, dy)
    x, kept_x, count_x = _along(g, rois, 1, bin_columns, columns, g.width, dx)
    y, kept_y, x, kept_x = y[..., :, None], kept_y[..., :, None], x[..., None, :], kept_x[..., None, :]

    plane = bin_rows[:, None] * g.group_size[0] // rows * g.group_size[1] + bin_columns * g.group_size[1] // columns
    planes = g.group_size[0] * g.group_size[1]
    # pixels of all images and planes one after another, for each class
    by_class = input.reshape(g.batch, g.classes, -1, planes, g.height * g.width).movedim(2, -1).transpose(0, 1)
    first = (rois[:, :1, None].long() * planes + plane) * (g.height * g.width)
    of_an_image = (rois[:, 0] >= 0) & (rois[:, 0] < g.batch) & (rois[:, 0] == rois[:, 0].floor())
    kept = kept_y & kept_x & of_an_image[:, None, None, None, None, None]
    y, x, kept = (t.transpose(0, 1)[None] for t in torch.broadcast_tensors(y, x, kept))
    samples = _samples(
        by_class.flatten(1, 3)[None], y, x, g.height, g.width, kept, first[..., None, None], beyond="border"
    )
    sums = (samples * kept[..., None]).sum((-3, -2))[0].movedim(-1, 1)  # (classes, D, R, PH, PW)
    out = sums.flatten(0, 1).transpose(0, 1).unflatten(1, (g.classes, -1))
    factor = 1 / (count_y * count_x)
    if mask is not None:
        factor = factor * mask.reshape(factor.shape)
    return (out * torch.where(kept[0].transpose(0, 1).any(-1).any(-1), factor, 0)[:, :, None]).flatten(1, 2)


def _along(
    g: RoIPooling, rois: Tensor, axis: int, bin: Tensor, bins: int, length: int, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples along y (axis 2) or x (1): where they lie, whether they are read, (R, classes, PH, PW, S); and
    the number that divides their sum."""
    start, size = _extent(g, rois, axis)
    samples = (torch.ceil(size / bins) if g.samples == 0 else torch.full_like(size, g.samples))[:, None, None, None]
    start, size = start[:, None, None, None], size[:, None, None, None]
    most = g.samples or int(samples.max().clamp(min=0))
    number = _steps(most, rois)
    spacing = size / bins / samples.clamp(min=1)
    origin = start + bin * size / bins + g.offset_unit * size * offset
    if g.kind == "DeformRoI":
        position = origin[..., None] + (number + 0.5) * spacing[..., None]
        kept = (position >= -1) & (position <= length) & (number < samples[..., None])
        return position, kept, samples.clamp(min=1).expand(origin.shape)
    position = origin[..., None] + number * spacing[..., None]
    kept = (position >= -0.5) & (position <= length - 0.5)
    return position, kept, kept.sum(-1).clamp(min=1).to(position.dtype)


def _extent(g: RoIPooling, rois: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Where the rois start along an axis, and their sizes."""
    low, high = rois[:, axis], rois[:, axis + 2]
    if g.kind == "DeformRoI":
        return low * g.spatial_scale - 0.5, (high - low) * g.spatial_scale
    edge = 0 if g.kind == "Average" else 0.5
    start = _round(low) * g.spatial_scale - edge
    return start, ((_round(high) + 1) * g.spatial_scale - edge - start).clamp(min=0.1)


def _average(g: RoIPooling, input: Tensor, rois: Tensor) -> Tensor:
    # the mean over a bin, as two products: with its rows, of its own image among all, and with its columns
    row = torch.arange(g.batch * g.height, device=rois.device)
    in_rows = _in_bins(g, rois, 2, g.output_size[0], g.height)[:, :, row % g.height]
    in_rows = in_rows & (row // g.height == rois[:, :1, None])
    in_columns = _in_bins(g, rois, 1, g.output_size[1], g.width)
    lines = input.reshape(g.batch, -1, *g.group_size, g.height, g.width).permute(0, 4, 1, 2, 3, 5).flatten(0, 1)
    sums = torch.einsum("riy,ydghx->ridghx", in_rows.to(input.dtype), lines)
    rows, columns = (torch.arange(size, device=rois.device) for size in g.output_size)
    sums = sums[:, rows, :, rows * g.group_size[0] // g.output_size[0]]  # (PH, R, D, Gw, W): each bin's group
    sums = torch.einsum("rjx,irdhx->jhird", in_columns.to(input.dtype), sums)
    sums = sums[columns, columns * g.group_size[1] // g.output_size[1]].permute(2, 3, 1, 0)
    count = in_rows.sum(-1)[:, :, None] * in_columns.sum(-1)[:, None]
    return sums / count.clamp(min=1)[:, None]


def _in_bins(g: RoIPooling, rois: Tensor, axis: int, bins: int, length: int) -> Tensor:
    """(R, bins, length): whether a pixel along an axis belongs to a bin."""
    start, size = (t[:, None, None] for t in _extent(g, rois, axis))
    bin, pixel = _steps(bins, rois)[:, None], torch.arange(length, device=rois.device)
    return (pixel >= (start + bin * size / bins).floor()) & (pixel < (start + (bin + 1) * size / bins).ceil())


def _samples(
    pixels: Tensor, y: Tensor, x: Tensor, height: Any, width: Any, kept: Tensor, first: Any = 0, beyond: str = "zeros"
) -> Tensor:
    """Bilinear samples (N, G, *places, D) of pixels (N, G, S, D) at y and x (N, G, *places); 0 where not `kept`.

    An image is `height` rows of `width` pixels from pixel `first` on; `beyond` it are zeros, or its border again.
    """
    y, x = torch.where(kept, y, 0), torch.where(kept, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    total: Any = 0
    for row, along_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, along_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            there = kept
            if beyond == "zeros":
                there = kept & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            values = _gathered(pixels, first + _clamped(row, height) * width + _clamped(column, width), kept)
            total = total + torch.where(there, along_y * along_x, 0)[..., None] * values
    return total


def _gathered(pixels: Tensor, place: Tensor, kept: Tensor) -> Tensor:
    """Those (N, G, *places, D) of pixels (N, G, S, D) at `place`; any where not `kept`."""
    index = torch.where(kept, place, 0).flatten(2)[..., None].expand(-1, -1, -1, pixels.shape[-1])
    return pixels.gather(2, index).unflatten(2, place.shape[2:])


def _clamped(index: Tensor, length: Any) -> Tensor:
    whole = index.long().clamp(min=0)
    return torch.minimum(whole, length - 1) if isinstance(length, Tensor) else whole.clamp(max=length - 1)


def _inside(position: Tensor, length: Any) -> Tensor:
    return (position >= -1) & (position < length)


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _round(value: Tensor) -> Tensor:
    """Halves away from zero."""
    return value.sign() * (value.abs() + 0.5).floor()
