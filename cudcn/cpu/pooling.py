"""The RoI pooling operators on NumPy arrays: the sum over a bin is a row of a sparse matrix.

The rois of one image have a matrix per class, made in blocks of bins. Its columns are the pixels of all groups; a bin's
entries are among those of its group. A sample whose position is clamped reads the outermost pixel twice: it has that
pixel's value, and no slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from ..check import arithmetic
from .parallel import blocks, ordered

if TYPE_CHECKING:
    from ..ops.pooling import Geometry

_MOST = 2**30  # samples along one axis of a bin
_BLOCK = 1 << 16  # samples, of some 150 bytes


def forward(g: Geometry, out: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None) -> None:
    for piece in _pieces(g, arithmetic(input), rois, offset, mask):
        piece.forward(out, input)


def backward(
    g: Geometry, grads: Any, grad_output: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None
) -> None:
    grad_input, _, grad_offset, grad_mask = (*grads, None, None)[:4]
    dtype = arithmetic(input)
    if grad_input is not None:
        grad_input[...] = 0  # also where no bin reads
    sums: Any = None if grad_offset is None else np.zeros((g.rois, 2 * g.classes, *g.part_size), dtype)
    for piece in _pieces(g, dtype, rois, offset, mask):
        piece.backward(grad_output, input, grad_input, sums, grad_mask)
    if grad_offset is not None:
        grad_offset[...] = sums


def _pieces(g: Geometry, dtype: type, rois: Any, offset: Any, mask: Any) -> Iterator[_Piece]:
    images = rois[:, 0].astype(np.float64)
    for row in np.flatnonzero(~((images >= 0) & (images < g.batch) & (images == np.floor(images)))):
        raise ValueError(
            f"{g.name}: rois[{row}, 0] must be an image's index, a whole number in [0, {g.batch}), got {images[row]}"
        )
    for image in np.unique(images).astype(int):
        for cls in range(g.classes):
            yield _Piece(g, dtype, image, np.flatnonzero(images == image), cls, rois, offset, mask)


class _Piece:
    """The bins of the `chosen` rois of one image, for the channels of one class.

    Q is the number of bins, and arrays over them are flat, in the order of (roi, row, column).
    """

    def __init__(
        self, g: Geometry, dtype: type, image: int, chosen: np.ndarray, cls: int, rois: Any, offset: Any, mask: Any
    ) -> None:
        self.g, self.dtype, self.image, self.chosen, self.cls = g, dtype, image, chosen, cls
        channels = g.out_channels // g.classes
        self.channels = slice(cls * channels, (cls + 1) * channels)
        self.shape = len(chosen), *g.output_size

        row, column = np.ogrid[: g.output_size[0], : g.output_size[1]]
        gh, gw = row * g.group_size[0] // g.output_size[0], column * g.group_size[1] // g.output_size[1]
        self.group = np.broadcast_to(gh * g.group_size[1] + gw, self.shape).ravel()
        ph, pw = row * g.part_size[0] // g.output_size[0], column * g.part_size[1] // g.output_size[1]
        self.parts = chosen[:, None, None], ph, pw
        left, top, right, bottom = rois[chosen, 1:].astype(dtype).T[..., None, None]
        with np.errstate(all="ignore"):  # NaN, infinity, and no samples
            self.y = self._axis(top, bottom, row, g.output_size[0], g.height, self._offset(offset, 1))
            self.x = self._axis(left, right, column, g.output_size[1], g.width, self._offset(offset, 0))
            self.divisor = (self.y.divisor * self.x.divisor)[:, None]
        self.modulation = None if mask is None else self._bins(mask)[chosen, cls].astype(dtype).reshape(-1, 1)

    def forward(self, out: Any, input: Any) -> None:
        pixels = self._pixels(input)
        means: Any = np.zeros((len(self.divisor), pixels.shape[1]), self.dtype)

        def pool(block: slice) -> None:
            means[block] = self._samples(block).value() @ pixels / self.divisor[block]

        for _ in self._in_blocks(pool, pixels):
            pass
        if self.modulation is not None:
            means *= self.modulation
        out[self.chosen, self.channels] = means.reshape(*self.shape, -1).transpose(0, 3, 1, 2)

    def backward(self, grad_output: Any, input: Any, grad_input: Any, offset_sums: Any, grad_mask: Any) -> None:
        pixels = self._pixels(input)
        gradient = grad_output[self.chosen, self.channels].astype(self.dtype).transpose(0, 2, 3, 1)
        grad_means = gradient.reshape(len(self.divisor), -1) / self.divisor
        grad_sums = grad_means if self.modulation is None else grad_means * self.modulation
        shifts: Any = np.zeros((2, len(grad_sums)), self.dtype)
        modulations: Any = np.zeros(len(grad_sums), self.dtype)

        def differentiate(block: slice) -> Any:
            """This block's share of the pixels' gradient; offset and mask are its own to write."""
            samples = self._samples(block)
            if offset_sums is not None:
                for axis, slope, line in ((0, samples.slope_x, self.x), (1, samples.slope_y, self.y)):
                    shifts[axis, block] = _dot(slope() @ pixels, grad_sums[block]) * line.unit[block]
            if grad_mask is not None:
                modulations[block] = _dot(samples.value() @ pixels, grad_means[block])
            return None if grad_input is None else samples.value().T @ grad_sums[block]

        total = None
        for share in self._in_blocks(differentiate, pixels):
            total = share if total is None else np.add(total, share, out=total)
        if total is not None:
            planes = self._planes(grad_input)
            planes[...] = total.reshape(planes.shape)
        if offset_sums is not None:
            for axis in (0, 1):  # several bins may share a part
                np.add.at(offset_sums[:, 2 * self.cls + axis], self.parts, shifts[axis].reshape(self.shape))
        if grad_mask is not None:
            self._bins(grad_mask)[self.chosen, self.cls] = modulations.reshape(self.shape)

    def _bins(self, mask: Any) -> Any:
        """(R, classes, PH, PW), a view."""
        return mask.reshape(self.g.rois, self.g.classes, *self.g.output_size)

    def _offset(self, offset: Any, axis: int) -> Any:
        if offset is None:
            return 0
        return offset[:, 2 * self.cls + axis][self.parts].astype(self.dtype)

    def _axis(self, low: Any, high: Any, bin: Any, bins: int, length: int, offset: Any) -> _Axis:
        """One axis of the bins, for rois from `low` to `high` in an image of `length` pixels."""
        g, dtype = self.g, self.dtype
        bin, scale = bin.astype(dtype), dtype(g.spatial_scale)
        edge = 0 if g.bins == "Average" else dtype(0.5)
        if g.bins == "DeformRoI":
            start = low * scale - edge
            size = high * scale - edge - start
        else:
            start = _round(low) * scale - edge
            size = (_round(high) + 1) * scale - edge - start
            size = np.where(np.isfinite(size) & (size < 0.1), dtype(0.1), size)
        if g.bins == "Average":
            begin, end = _pixel_run(start + bin * size / bins, start + (bin + 1) * size / bins, length)
            origin, spacing, unit, count = dtype(0), dtype(1), dtype(0), end - begin
        else:
            unit = dtype(g.offset_scale) * size
            count = np.ceil(size / bins) if g.samples == 0 else np.full_like(size, g.samples)
            spacing = size / bins / count
            origin = start + bin * size / bins + unit * offset
            if g.bins == "DeformRoI":
                origin = origin + spacing * dtype(0.5)
                begin, end = _sample_run(origin, spacing, count, -1, length)
            else:
                begin, end = _sample_run(origin, spacing, count, -0.5, length - 0.5)
                count = end - begin
            unit = np.where(begin < end, unit, 0)
        divisor = np.where(count >= 1, count, 1)
        arrays = (np.broadcast_to(a, self.shape).ravel() for a in (origin, spacing, unit, divisor))
        integers = (np.broadcast_to(a, self.shape).ravel() for a in (begin, end))
        return _Axis(*integers, *(a.astype(dtype, copy=False) for a in arrays))

    def _planes(self, images: Any) -> Any:
        """(groups, H, W, C) of the class's channels, a view."""
        g = self.g
        return images[self.image].reshape(g.out_channels, -1, g.height, g.width)[self.channels].transpose(1, 2, 3, 0)

    def _pixels(self, input: Any) -> np.ndarray:
        """(groups * H * W, C)"""
        planes = self._planes(input)
        return np.ascontiguousarray(planes, self.dtype).reshape(-1, planes.shape[-1])

    def _in_blocks(self, work: Callable[[slice], Any], pixels: np.ndarray) -> Iterable[Any]:
        """The results of `work` on blocks of bins that have about as many samples, in order."""
        last = np.cumsum((self.y.end - self.y.begin) * (self.x.end - self.x.begin))
        size = 4 * pixels.shape[1] * pixels.itemsize  # of one sample's pixels, in bytes
        samples = [part.stop for _, part in blocks(int(last[-1]), 1, size, size * max(_BLOCK, len(pixels)))]
        if not samples:
            return []
        ends = np.searchsorted(last, samples)
        edges = [0, *np.unique([*(ends[:-1] + 1), len(last)])]
        return ordered(work, [slice(*edge) for edge in pairwise(edges)], size * int(last[-1]))

    def _samples(self, block: slice) -> _Samples:
        g = self.g
        y, x = (_Axis(*(a[block] for a in axis)) for axis in (self.y, self.x))
        columns = x.end - x.begin
        counts = (y.end - y.begin) * columns
        first = np.concatenate([[0], np.cumsum(counts)])
        bins = np.repeat(np.arange(len(counts)), counts)
        i, j = np.divmod(np.arange(first[-1]) - first[bins], columns[bins])
        top, bottom, down = y.pixels(i, bins, g.height)
        left, right, across = x.pixels(j, bins, g.width)
        rows = self.group[block][bins] * g.height
        corners = [(top, left)] if g.bins == "Average" else [(top, left), (top, right), (bottom, left), (bottom, right)]
        indices = np.stack([(rows + y) * g.width + x for y, x in corners], -1)
        return _Samples(first, indices, g.channels // g.out_channels * g.height * g.width, down, across)


class _Axis(NamedTuple):
    """The samples of Q bins along one axis: number i, begin <= i < end, lies at origin + i * spacing."""

    begin: np.ndarray
    end: np.ndarray
    origin: np.ndarray
    spacing: np.ndarray
    unit: np.ndarray  # an offset of 1, in pixels; 0 where there are no samples
    divisor: np.ndarray

    def pixels(self, i: np.ndarray, bins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two pixels around the i-th sample of each of `bins`, and how far it is from the first to the second."""
        number = (i + self.begin[bins]).astype(self.origin.dtype)
        position = self.origin[bins] + number * self.spacing[bins]
        cell = np.floor(position)
        pixel = cell.astype(np.int64)
        return np.clip(pixel, 0, length - 1), np.clip(pixel + 1, 0, length - 1), position - cell


class _Samples(NamedTuple):
    """The matrix of the sums over each bin's samples, which are those from first[bin] to first[bin + 1]."""

    first: np.ndarray
    indices: np.ndarray  # (samples, corners): 1, or top left, top right, bottom left and bottom right
    pixels: int
    down: np.ndarray  # distances from the top left corner
    across: np.ndarray

    def _matrix(self, *weights: np.ndarray) -> csr_array:
        corners, data = len(weights), np.stack(weights, -1).ravel()
        index = np.int32 if max(self.pixels, data.size) < 2**31 else np.int64
        indices, first = self.indices.ravel().astype(index), (corners * self.first).astype(index)
        return csr_array((data, indices, first), shape=(len(first) - 1, self.pixels))

    def value(self) -> csr_array:
        bottom, right = self.down, self.across
        if self.indices.shape[1] == 1:
            return self._matrix(np.ones_like(bottom))
        top, left = 1 - bottom, 1 - right
        return self._matrix(top * left, top * right, bottom * left, bottom * right)

    def slope_y(self) -> csr_array:
        left, right = 1 - self.across, self.across
        return self._matrix(-left, -right, left, right)

    def slope_x(self) -> csr_array:
        top, bottom = 1 - self.down, self.down
        return self._matrix(-top, top, -bottom, bottom)


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
    begin = np.where(first > 0, np.minimum(first, _MOST), 0).astype(np.int64)
    end = np.where(last > 0, np.minimum(np.floor(last) + 1, np.clip(count, 0, _MOST)), 0).astype(np.int64)
    while (outside := (begin < end) & ~inside(begin)).any():  # the division was rounded
        begin = begin + outside
    while (outside := (begin < end) & ~inside(end - 1)).any():
        end = end - outside
    return begin, np.maximum(begin, end)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("qc,qc->q", a, b)
