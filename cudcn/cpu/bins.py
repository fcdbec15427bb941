"""Where the samples of the RoI pooling operators lie. See kernels_cu/pooling.cu, which rounds as this does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..geometry import MOST, RoIPooling


class Bins:
    """The bins that have samples, of the `chosen` rois and for the channels of one class. `places` are the numbers of
    those to look at, in the order of (roi, row, column)."""

    def __init__(
        self, g: RoIPooling, dtype: type, rois: Any, offset: Any, chosen: np.ndarray, cls: int, places: range
    ) -> None:
        self.number, place = np.divmod(np.arange(places.start, places.stop), g.output_size[0] * g.output_size[1])
        self.row, self.column = np.divmod(place, g.output_size[1])
        self.roi = chosen[self.number]
        self.part_row = self.row * g.part_size[0] // g.output_size[0]
        self.part_column = self.column * g.part_size[1] // g.output_size[1]
        self.plane = self.row * g.group_size[0] // g.output_size[0] * g.group_size[1]
        self.plane += self.column * g.group_size[1] // g.output_size[1]

        def axis(low: int, high: int, bin: np.ndarray, bins: int, length: int, channel: int) -> Axis:
            start, stop = (rois[self.roi, end].astype(dtype) for end in (low, high))
            shift = 0 if offset is None else offset[self.roi, 2 * cls + channel, self.part_row, self.part_column]
            return _axis(g, self.roi, start, stop, bin.astype(dtype), bins, length, np.asarray(shift, dtype))

        self.y = axis(2, 4, self.row, g.output_size[0], g.height, 1)
        self.x = axis(1, 3, self.column, g.output_size[1], g.width, 0)
        vars(self).update(vars(self.of((self.y.counts > 0) & (self.x.counts > 0))))
        top, bottom, self.rows = self.y.reach(g.height, g.kind == "Average")
        _, _, self.columns = self.x.reach(g.width, g.kind == "Average")
        self.top, self.bottom = self.plane * g.height + top, self.plane * g.height + bottom

    def of(self, some: Any) -> Bins:
        """Some of them."""
        bins = copy.copy(self)
        for name, value in vars(self).items():
            setattr(bins, name, value.of(some) if isinstance(value, Axis) else value[some])
        return bins

    @property
    def at(self) -> tuple[np.ndarray, ...]:
        return self.roi, self.row, self.column

    @property
    def part(self) -> tuple[np.ndarray, ...]:
        return self.number, self.part_row, self.part_column

    @property
    def divisor(self) -> np.ndarray:
        return self.y.divisor.astype(np.float64) * self.x.divisor

    def __len__(self) -> int:
        return len(self.roi)


class Axis(NamedTuple):
    """The samples of some bins along one axis: number i, begin <= i < end, lies at origin + i * spacing."""

    begin: np.ndarray
    end: np.ndarray
    origin: np.ndarray
    spacing: np.ndarray
    unit: np.ndarray  # an offset of 1, in pixels
    divisor: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return self.end - self.begin

    def cut(self, most: int) -> Iterator[Axis]:
        """That of one bin, in pieces."""
        for begin in range(int(self.begin[0]), int(self.end[0]), most):
            yield self._replace(begin=np.array([begin]), end=np.minimum(begin + most, self.end))

    def of(self, some: Any) -> Axis:
        return Axis(*(array[some] for array in self))

    def reach(self, length: int, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first and the last pixel that the samples read, and how many these are at the most."""
        one, other = (i.astype(self.origin.dtype) * self.spacing + self.origin for i in (self.begin, self.end - 1))
        first = np.floor(np.minimum(one, other)).astype(np.int64)
        last = np.floor(np.maximum(one, other)).astype(np.int64) + (0 if whole else 1)
        most = np.minimum(last - first + 1, self.counts * (1 if whole else 2))
        return np.clip(first, 0, length - 1), np.clip(last, 0, length - 1), most

    def pixels(self) -> Line:
        """The line of samples that are whole pixels."""
        counts = self.counts
        pixel, _ = spans(self.begin, counts)
        ones = np.ones(len(pixel), self.origin.dtype)
        return Line(counts, pixel, ones, ones)

    def cells(self, length: int, slopes: bool) -> Line:
        """The two pixels around each sample; neighbouring samples share theirs."""
        dtype, counts = self.origin.dtype, self.counts
        number, first = spans(self.begin, counts)
        if (falling := self.spacing < 0).any():  # from the last sample on, so that all positions rise
            number = np.where(np.repeat(falling, counts), np.repeat(self.begin + self.end - 1, counts) - number, number)
        position = np.repeat(self.origin, counts) + number.astype(dtype) * np.repeat(self.spacing, counts)
        cell = np.floor(position)
        after = position - cell
        step = np.full(len(cell), 2)  # to the next cell's entries: a cell has two
        np.minimum(cell[1:] - cell[:-1], 2, out=step[1:], casting="unsafe")
        step[first[:-1]] = 2
        left = np.cumsum(step) - 2
        right = left + 1
        total = int(right[-1]) + 1
        pixel = np.empty(total, np.int32)
        pixel[left] = cell
        pixel[right] = cell + 1
        value = np.bincount(left, 1 - after, total) + np.bincount(right, after, total)
        slope = np.bincount(right, minlength=total) - np.bincount(left, minlength=total) if slopes else value
        of_each = np.append(left[first[:-1]], total)
        return Line(
            of_each[1:] - of_each[:-1], np.clip(pixel, 0, length - 1), value.astype(dtype), slope.astype(dtype)
        )  # fmt: skip


class Line(NamedTuple):
    """The pixels that bins read along one axis, `counts` of them for each, and their weights in the sum of the bin's
    samples and in that of its slopes."""

    counts: np.ndarray
    pixel: np.ndarray
    value: np.ndarray
    slope: np.ndarray


def _axis(g: RoIPooling, roi: Any, low: Any, high: Any, bin: Any, bins: int, length: int, offset: Any) -> Axis:
    """One axis of the bins, for rois from `low` to `high` in an image of `length` pixels."""
    dtype = low.dtype.type
    scale = dtype(g.spatial_scale)
    edge = 0 if g.kind == "Average" else dtype(0.5)
    if g.kind == "DeformRoI":
        start = low * scale - edge
        size = high * scale - edge - start
    else:
        start = _round(low) * scale - edge
        size = (_round(high) + 1) * scale - edge - start
        size = np.where(np.isfinite(size) & (size < 0.1), dtype(0.1), size)
    if g.kind == "Average":
        begin, end = _pixel_run(start + bin * size / bins, start + (bin + 1) * size / bins, length)
        origin, spacing, unit, count = np.zeros_like(size), np.ones_like(size), size, end - begin
    else:
        unit = dtype(g.offset_unit) * size
        count = np.ceil(size / bins) if g.samples == 0 else np.full_like(size, g.samples)
        for i in np.flatnonzero((count > MOST) & np.isfinite(count)):
            raise ValueError(
                f"{g.name}: with sampling_ratio 0 a bin must be at most 2**23 pixels high and wide, "
                f"those of rois[{roi[i]}] are {size[i] / bins}"
            )
        spacing = size / bins / count
        origin = start + bin * size / bins + unit * offset
        if g.kind == "DeformRoI":
            origin = origin + spacing * dtype(0.5)
            begin, end = _sample_run(origin, spacing, count, -1, length)
        else:
            begin, end = _sample_run(origin, spacing, count, -0.5, length - 0.5)
            count = end - begin
    divisor = np.where(count >= 1, count, 1)
    return Axis(begin, end, origin, spacing, unit, divisor)


def _round(value: np.ndarray) -> np.ndarray:
    """Halves away from zero."""
    whole = np.floor(np.abs(value))
    return np.copysign(whole + (np.abs(value) - whole >= 0.5), value)


def _pixel_run(low: np.ndarray, high: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels from floor(low) to ceil(high) in the image; none for NaN."""
    begin = np.where(low < length, np.maximum(np.floor(low), 0), length).astype(np.int64)
    end = np.where(high > 0, np.minimum(np.ceil(high), length), 0).astype(np.int64)
    return begin, np.maximum(begin, end)


def _sample_run(origin: Any, spacing: Any, count: Any, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The i of [0, count) with low <= origin + i * spacing <= high: a run, as positions only grow or only fall."""

    def inside(i: np.ndarray) -> np.ndarray:
        position = origin + i.astype(origin.dtype) * spacing
        return (position >= low) & (position <= high)

    still = spacing == 0
    ends = (low - origin) / spacing, (high - origin) / spacing
    first, last = np.where(still, 0, np.minimum(*ends) - 1), np.where(still, count, np.maximum(*ends) + 1)
    count = np.where(count > 0, np.where(np.isfinite(count), count, 0), 0)
    begin = np.where(first > 0, np.minimum(first, count), 0).astype(np.int64)
    end = np.where(last > 0, np.minimum(np.floor(last) + 1, count), 0).astype(np.int64)
    end = np.where(still & ~inside(begin), begin, end)  # all lie at one place: all are inside, or none is
    while (outside := (begin < end) & ~inside(begin)).any():  # the division was rounded
        begin = begin + outside
    while (outside := (begin < end) & ~inside(end - 1)).any():
        end = end - outside
    return begin, np.maximum(begin, end)


def starts(counts: np.ndarray) -> np.ndarray:
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first


def spans(begin: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """begin[0], begin[0] + 1, ..., count[0] numbers, then those from begin[1] on, and so on; and where each starts."""
    first = starts(count)
    numbers = np.arange(first[-1], dtype=np.int32)
    numbers += np.repeat((begin - first[:-1]).astype(np.int32), count)
    return numbers, first
