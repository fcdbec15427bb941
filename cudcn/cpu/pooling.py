"""The RoI pooling operators on NumPy arrays: the sum over a bin is a sum of short rows of sparse matrices.

The samples of a bin are a grid, so a pixel's weight in their sum is that of its row times that of its column, and each
axis is listed on its own. A run is a few neighbouring columns of one row. Its sum is a row of a sparse matrix times the
pixels, in the type of positions; the sum over the runs of a bin is one in float64. The pixels' gradient is summed in
float64, each strip of the image by one thread. So no bit of a result depends on the number of threads.

Scratch memory is bounded, however large the bins: they are worked on so many at a time, and large ones are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import pairwise, product
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..dtypes import arithmetic
from ..geometry import RoIPooling
from .bins import Bins, Line, spans, starts
from .parallel import team

_RUN = 16  # pixels in one running sum of float32: it loses 5e-7 at the most
_BINS = 1 << 13  # located at a time, of some 500 bytes
_CUT = 1 << 12  # samples along an axis listed at a time
_PIECE = 2 << 20  # bytes of a piece of work
_STRIP = 2 << 20  # bytes of the gradient's sums that one thread works on
_LISTED, _ENTRY = 100, 32  # bytes of a sample in an axis's list, of a pixel in a matrix


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: RoIPooling, out: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None) -> None:
    out[...] = 0  # bins without samples
    for image, chosen, cls in _classes(g, rois):
        pixels, means = _pixels(g, input, image, cls), _by_bin(g, out, cls)
        for bins in _bins(g, arithmetic(input), rois, offset, chosen, cls):
            _each(partial(_pool, g, means, pixels, _by_class(g, mask, cls)), *_pieces(g, bins))


def _pool(g: RoIPooling, means: Any, pixels: np.ndarray, mask: Any, bins: Bins) -> None:
    # out[r, c, i, j] = mask / divisor * sum over the bin's samples
    sums = _total(area.sums(area.y.value, area.x.value, pixels) for area in _areas(g, bins))
    means[bins.at] = sums * _factor(bins, mask)


@np.errstate(all="ignore")
def backward(
    g: RoIPooling, grads: Any, grad_output: Any, input: Any, rois: Any, offset: Any = None, mask: Any = None
) -> None:
    grad_input, _, grad_offset, grad_mask = (*grads, None, None)[:4]
    for grad in grads:
        if grad is not None:
            grad[...] = 0  # bins without samples, and pixels that no bin reads
    if grad_offset is not None or grad_mask is not None:
        _backward_offset(g, grad_offset, grad_mask, grad_output, input, rois, offset, mask)
    if grad_input is not None:  # after that, as it does not need the pixels in memory
        _backward_input(g, grad_input, grad_output, rois, offset, mask)


def _backward_offset(
    g: RoIPooling, grad_offset: Any, grad_mask: Any, grad_output: Any, input: Any, rois: Any, offset: Any, mask: Any
) -> None:
    for image, chosen, cls in _classes(g, rois):
        pixels, gradients = _pixels(g, input, image, cls), _by_bin(g, grad_output, cls)
        for some in _groups(g, chosen):
            parts: Any = np.zeros((2, len(some), *g.part_size))
            for bins in _bins(g, arithmetic(input), rois, offset, some, cls):
                pieces, size = _pieces(g, bins)
                wanted = grad_mask is not None, grad_offset is not None
                products = _in_order(partial(_products, g, pixels, gradients, *wanted), pieces, size)
                # d mask = sum over c of grad_output * value / divisor
                # d offset = sum over c of grad_output * slope * mask / divisor * unit
                for piece, (value, slope_y, slope_x) in zip(pieces, products, strict=True):
                    if grad_mask is not None:
                        _by_class(g, grad_mask, cls)[piece.at] = value / piece.divisor
                    factor = _factor(piece, _by_class(g, mask, cls))[:, 0]
                    np.add.at(parts[0], piece.part, slope_x * piece.x.unit * factor)  # several bins may share a part
                    np.add.at(parts[1], piece.part, slope_y * piece.y.unit * factor)
            if grad_offset is not None:
                grad_offset[some, 2 * cls : 2 * cls + 2] = parts.swapaxes(0, 1)


def _products(g: RoIPooling, pixels: np.ndarray, gradients: Any, value: bool, slopes: bool, bins: Bins) -> Any:
    """The products of each bin's gradient with the sums of its samples and of their slopes along y and x, if wanted."""
    gradient = gradients[bins.at].astype(np.float64)

    def products(area: _Area) -> np.ndarray:
        def dot(wanted: bool, y: np.ndarray, x: np.ndarray) -> np.ndarray:
            return np.einsum("qc,qc->q", area.sums(y, x, pixels), gradient) if wanted else np.zeros(len(bins))

        y, x = area.y, area.x
        return np.stack([dot(value, y.value, x.value), dot(slopes, y.slope, x.value), dot(slopes, y.value, x.slope)])

    return _total(map(products, _areas(g, bins, slopes)))


def _backward_input(g: RoIPooling, grad_input: Any, grad_output: Any, rois: Any, offset: Any, mask: Any) -> None:
    """By strips of lines and channels, each summed in float64 over as many bins as are located at a time."""
    channels = max(1, min(g.out_channels // g.classes, _STRIP // (8 * g.width)))
    step, lines = max(1, _STRIP // (8 * g.width * channels)), math.prod(g.group_size) * g.height
    strips = [
        (range(top, min(top + step, lines)), slice(c, min(c + channels, g.out_channels // g.classes)))
        for top in range(0, lines, step) for c in range(0, g.out_channels // g.classes, channels)
    ]  # fmt: skip
    for image, chosen, cls in _classes(g, rois):
        planes, gradients = _planes(g, grad_input, image, cls), _by_bin(g, grad_output, cls)
        few = len(chosen) * math.prod(g.output_size) <= _RUN * _BINS
        dtype = arithmetic(grad_input) if few else np.float64
        total = planes if planes.dtype == dtype else np.zeros(planes.shape, dtype)
        for bins in _bins(g, arithmetic(grad_output), rois, offset, chosen, cls):
            size = _pieces(g, bins)[1]
            _each(partial(_scatter, g, total, gradients, _by_class(g, mask, cls), bins), strips, size)
        if total is not planes:
            _copy(planes, total)


def _scatter(
    g: RoIPooling, total: np.ndarray, gradients: Any, mask: Any, bins: Bins, strip: tuple[range, slice]
) -> None:
    """Add to some lines of the image, those of all groups one after another, what the bins give them."""
    lines, channels = strip
    pieces, _ = _pieces(g, bins.of((bins.top < lines.stop) & (bins.bottom >= lines.start)))
    if not pieces:
        return
    sums: Any = np.zeros((len(lines) * g.width, channels.stop - channels.start))
    for piece in pieces:
        gradient = gradients[piece.at][:, channels] * _factor(piece, mask)
        for area in _areas(g, piece, lines=lines):
            sums += area.shares(gradient, len(lines) * g.width)
    sums = sums.reshape(len(lines), g.width, -1)
    for group in range(lines.start // g.height, (lines.stop - 1) // g.height + 1):
        first = group * g.height
        start, stop = max(lines.start, first), min(lines.stop, first + g.height)
        total[group, start - first : stop - first, :, channels] += sums[start - lines.start : stop - lines.start]


def _classes(g: RoIPooling, rois: Any) -> Iterator[tuple[int, np.ndarray, int]]:
    """Each image that has rois, which these are, and each class."""
    images = rois[:, 0].astype(np.float64)
    for row in np.flatnonzero(~((images >= 0) & (images < g.batch) & (images == np.floor(images)))):
        raise ValueError(
            f"{g.name}: rois[{row}, 0] must be an image's index, a whole number in [0, {g.batch}), got {images[row]}"
        )
    order = np.argsort(images, kind="stable")
    for chosen in np.split(order, np.flatnonzero(np.diff(images[order])) + 1):
        for cls in range(g.classes):
            yield int(images[chosen[0]]), chosen, cls


def _groups(g: RoIPooling, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Rois of about as many bins, and parts, as are located at a time, or one that has more."""
    step = max(1, _BINS // max(math.prod(g.output_size), math.prod(g.part_size)))
    return (chosen[roi : roi + step] for roi in range(0, len(chosen), step))


def _bins(g: RoIPooling, dtype: type, rois: Any, offset: Any, chosen: np.ndarray, cls: int) -> Iterator[Bins]:
    """Those of the `chosen` rois, some at a time."""
    count = len(chosen) * math.prod(g.output_size)
    for first in range(0, count, _BINS):
        yield Bins(g, dtype, rois, offset, chosen, cls, range(first, min(first + _BINS, count)))


def _pieces(g: RoIPooling, bins: Bins) -> tuple[list[Bins], int]:
    """Bins to work on together, a large one alone; and the bytes of all that work."""
    if not len(bins):
        return [], 0
    cost = _LISTED * (bins.y.counts + bins.x.counts) + _bytes(g, bins.rows * bins.columns)
    large = cost > _PIECE
    new = (np.diff(np.cumsum(cost) // _PIECE) > 0) | large[1:] | large[:-1]
    edges = [0, *(np.flatnonzero(new) + 1), len(bins)]
    return [bins.of(slice(*edge)) for edge in pairwise(edges)], int(cost.sum())


def _bytes(g: RoIPooling, pixels: Any) -> Any:
    """That the sum over so many pixels takes: a matrix and the sums of runs."""
    return _ENTRY * pixels + 12 * (g.out_channels // g.classes) * (1 + pixels // _RUN)


def _areas(g: RoIPooling, bins: Bins, slopes: bool = False, lines: range | None = None) -> Iterator[_Area]:
    """The pixels of a piece's bins, of those in some lines of the image; those of a large bin in several parts."""
    axes = product(bins.y.cut(_CUT), bins.x.cut(_CUT)) if len(bins) == 1 else [(bins.y, bins.x)]
    for y_axis, x_axis in axes:
        if g.kind == "Average":
            y, x = y_axis.pixels(), x_axis.pixels()
        else:
            y, x = y_axis.cells(g.height, slopes), x_axis.cells(g.width, slopes)
        row, bin = np.arange(len(y.pixel)), np.repeat(np.arange(len(bins)), y.counts)
        line = y.pixel + np.repeat(bins.plane * g.height, y.counts)
        if lines is not None:
            mine = (line >= lines.start) & (line < lines.stop)
            row, bin, line = row[mine], bin[mine], line[mine] - lines.start
        step = _PIECE // _bytes(g, len(x.pixel)) + 1 if len(bins) == 1 else max(1, len(row))
        for first in range(0, len(row), step):
            some = slice(first, first + step)
            yield _Area(y, x, bin[some], row[some], line[some] * g.width)


class _Area:
    """The pixels of some rows of some bins: a matrix of what the sums over the bins have of them."""

    def __init__(self, y: Line, x: Line, bin: np.ndarray, row: np.ndarray, corner: np.ndarray) -> None:
        """For each row its `bin`, its place in `y`, and the pixel that it starts from."""
        self.y, self.x = y, x
        self._row, self._columns = row, x.counts[bin]
        self._entry, first = spans(starts(x.counts)[bin], self._columns)
        pixel = np.repeat(corner, self._columns) + x.pixel[self._entry]
        self._pixel = pixel.astype(_index(int(corner.max()) + int(x.pixel.max())))
        new = np.flatnonzero(np.diff(bin, prepend=-1))
        self.bins = bin[new]
        self._first = np.append(first[new], first[-1])  # of each bin's pixels

    def _weights(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        weights = np.repeat(y[self._row], self._columns)
        weights *= x[self._entry]
        return weights

    def sums(self, y: np.ndarray, x: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(bins, C) with the weights `y` of the rows and `x` of the columns: in the type of `pixels` as long as few
        numbers are summed, then in float64."""
        runs, first = _runs(self._first)
        sums = _csr(self._weights(y, x), self._pixel, runs, len(pixels)) @ pixels
        if len(sums) > len(self.bins):
            runs, first = _runs(first)
            sums = _sum(sums, runs)
        return sums if len(sums) == len(self.bins) else _sum(sums.astype(np.float64), first)

    def shares(self, gradient: np.ndarray, pixels: int) -> np.ndarray:
        """(pixels, C) of the bins' `gradient`, in float64."""
        weights = self._weights(self.y.value, self.x.value).astype(np.float64)
        return _csr(weights, self._pixel, self._first, pixels).T @ gradient[self.bins]


def _runs(first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers from first[i] to first[i + 1] in runs of a few: where each starts, and the first run of each i."""
    runs = -(-(first[1:] - first[:-1]) // _RUN)
    of_each = starts(runs)
    number = np.arange(of_each[-1]) - np.repeat(of_each[:-1], runs)
    return np.append(np.repeat(first[:-1], runs) + _RUN * number, first[-1]), of_each


def _sum(numbers: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Sums of the rows from each `first` to the next."""
    return _csr(np.ones(len(numbers), numbers.dtype), np.arange(len(numbers)), first, len(numbers)) @ numbers


def _csr(weights: np.ndarray, pixels: np.ndarray, first: np.ndarray, count: int) -> csr_array:
    index = _index(max(count, len(weights)))
    return csr_array((weights, pixels.astype(index, copy=False), first.astype(index)), shape=(len(first) - 1, count))


def _index(count: int) -> type:
    return np.int32 if count < 2**31 else np.int64


def _total(parts: Iterable[np.ndarray]) -> np.ndarray:
    return reduce(partial(np.add, dtype=np.float64), parts)


def _in_order(work: Callable[[Any], Any], items: Sequence[Any], size: int) -> Iterator[Any]:
    with team(size if len(items) > 1 else 0, _PIECE + _STRIP) as workers:
        yield from workers.ordered(work, items)


def _each(work: Callable[[Any], None], items: Sequence[Any], size: int) -> None:
    for _ in _in_order(work, items, size):
        pass


def _by_bin(g: RoIPooling, output: Any, cls: int) -> Any:
    """(R, PH, PW, C) of the class's channels, a view."""
    channels = g.out_channels // g.classes
    return output[:, cls * channels : (cls + 1) * channels].transpose(0, 2, 3, 1)


def _by_class(g: RoIPooling, mask: Any, cls: int) -> Any:
    """(R, PH, PW), a view."""
    return None if mask is None else mask.reshape(g.rois, g.classes, *g.output_size)[:, cls]


def _factor(bins: Bins, mask: Any) -> Any:
    """From each bin's sum to its result, (bins, 1)."""
    return ((1.0 if mask is None else mask[bins.at].astype(np.float64)) / bins.divisor)[:, None]


def _planes(g: RoIPooling, images: Any, image: int, cls: int) -> Any:
    """(groups, H, W, C) of the class's channels, a view."""
    channels = g.out_channels // g.classes
    planes = images[image].reshape(g.out_channels, -1, g.height, g.width)
    return planes[cls * channels : (cls + 1) * channels].transpose(1, 2, 3, 0)


def _pixels(g: RoIPooling, input: Any, image: int, cls: int) -> np.ndarray:
    """(groups * H * W, C), a copy unless they lie so."""
    planes, dtype = _planes(g, input, image, cls), arithmetic(input)
    if planes.dtype == dtype and planes.flags.c_contiguous:
        return planes.reshape(-1, planes.shape[-1])
    pixels = np.empty(planes.shape, dtype)
    _copy(pixels, planes)
    return pixels.reshape(-1, planes.shape[-1])


def _copy(target: Any, source: Any) -> None:
    with team(source.nbytes) as workers:
        workers.copy(zip(target, source, strict=True))
