"""dcnv3, dcnv4 and ms_deform_attn on NumPy arrays: a sparse matrix whose rows sum the samples of a query and group.

Work is split into blocks of one image's queries. Neither the blocks nor the order in which they are summed depend on
the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import arithmetic
from ..geometry import Aggregation, Attention
from .parallel import HELD, Team, batches, team, tiles
from .sampling import Sampler, Share, flattened, sums_of

_CHUNK = 16 << 20  # bytes of a block, by estimate
_RUN_BYTES = 4 << 20  # bytes of what is sampled for one query at a time
_KEPT = 8  # runs of a block that are kept; of more, each is computed again when it is needed

Block = tuple[int, slice, slice, slice]  # an image, the rows and columns of some of its queries, and some groups
Images = dict[int, np.ndarray]  # of each image, its pixels and groups one after another, (.., D)


class Level(NamedTuple):
    """An image that is sampled: its first pixel, and its size."""

    first: int
    height: int
    width: int


class Run(NamedTuple):
    """Some samples of a query and group, all of one level."""

    level: int
    begin: int
    end: int

    @property
    def samples(self) -> slice:
        return slice(self.begin, self.end)


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: Aggregation, out: Any, *tensors: Any) -> None:
    image, places, weights = g.views(*tensors)
    out, levels, dtype, runs = g.by_group(out), _levels(g, *tensors), arithmetic(image), _runs(g)

    def aggregate(block: Block) -> None:
        # out[q, g] = sum over levels and points of factor * bilinear(image[level, g], place)
        factors, total = _factors(g, weights[block], runs, dtype), _zeros(g, out[block], runs, dtype)
        for run in runs:
            total += _sampler(g, levels, places, factors(run), block, run).sums(pixels[block[0]])
        out[block] = total.reshape(out[block].shape)

    with _team(g, dtype, shares=0) as workers:
        for images in batches(g.batch, g.pixels * g.groups * g.group_channels * np.dtype(dtype).itemsize):
            pixels = _pixels(workers, image, images, dtype)
            workers.each(aggregate, _blocks(g, images))


@np.errstate(all="ignore")
def backward(g: Aggregation, grads: Any, grad_output: Any, *tensors: Any) -> None:
    image, places, weights = g.views(*tensors)
    grad_output, levels, dtype, runs = g.by_group(grad_output), _levels(g, *tensors), arithmetic(image), _runs(g)
    grad_image, grad_places, grad_weights = g.views(*grads)
    if (unused := g.unused(*grads)) is not None:
        unused[...] = 0
    if g.discrete and grad_places is not None:
        grad_places[...] = 0
        grad_places = None

    def differentiate(block: Block) -> Iterable[Share]:
        """The block's shares of the image's gradient; those of places and weights are its own to write."""
        # d image = factor * grad_output[q, g], times each sample's four weights, added to its pixels
        # d weight = sum over channels of grad_output[q, g] * value;  d place alike, with factor * slope * scale
        vectors = grad_output[block].reshape(-1, g.group_channels).astype(dtype, copy=False)
        factors = _factors(g, weights[block], runs, dtype)

        @functools.lru_cache(maxsize=1)
        def sampler(run: Run) -> Sampler:
            return _sampler(g, levels, places, factors(run), block, run)

        @functools.lru_cache(maxsize=_KEPT)
        def products(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return sampler(run).products(pixels[block[0]], vectors)

        shares: list[Share] = []
        mean: Any = 0  # with softmax, d logit = factor * (d weight - mean), that of d weight with the factors
        counted: Any = False  # factors that are NaN are so all together: they count where any sample of the query does
        for run in runs:
            if sums and len(runs) <= _KEPT:
                shares += sampler(run).scattered(vectors)
            if pixels and grad_weights is not None and g.softmax:
                mean += (factors(run) * products(run)[0]).sum(1, dtype=np.float64, keepdims=True)
                counted |= sampler(run).counted.reshape(len(vectors), -1).any(1, keepdims=True)
        for run in runs if pixels else ():
            values, *slopes = products(run)
            if grad_places is not None:
                for axis in (0, 1):
                    own = grad_places[..., 1 - axis][block][..., run.samples]
                    own[...] = (slopes[axis] * _scale(g, levels[run.level], axis, dtype)).reshape(own.shape)
            if grad_weights is not None:
                if g.softmax:
                    values = np.where(counted, factors(run) * (values - mean), 0)
                own = grad_weights[block][..., run.samples]
                own[...] = values.reshape(own.shape)
        if sums and len(runs) > _KEPT:
            return (share for run in runs for share in sampler(run).scattered(vectors))
        return shares

    def accumulate() -> None:
        for (n, *_), shares in zip(blocks, workers.ordered(differentiate, blocks), strict=True):
            for share in shares:
                sums[n][share.at] += share.sums

    with _team(g, dtype, shares=min(len(runs), _KEPT)) as workers:
        numbers = g.pixels * g.groups * g.group_channels  # of an image
        for images in batches(g.batch, 12 * numbers):
            blocks = _blocks(g, images)
            pixels: Images = {}
            sums: Images = {}
            sum_type = sums_of(len(blocks) // len(images) * len(runs) // g.levels, dtype)
            if _overlap(levels):
                sum_type = np.float64
            if grad_places is not None or grad_weights is not None:
                pixels = _pixels(workers, image, images, dtype)
            if grad_image is not None:
                if pixels and sum_type == np.float64 and 4 * numbers > HELD:
                    accumulate()
                    pixels = {}  # for the sums to take their place
                sums = {n: np.zeros((g.pixels * g.groups, g.group_channels), sum_type) for n in images}
            accumulate()
            workers.copy((grad_image[n], sums[n].reshape(grad_image[n].shape)) for n in sums)


def _team(g: Aggregation, dtype: type, shares: int) -> Any:
    """For blocks that leave so many shares."""
    samples = g.batch * math.prod(g.queries) * g.groups * g.samples
    scratch = _CHUNK // 2 + 32 * g.group_channels + shares * (2 << 20)
    return team(samples * g.group_channels * np.dtype(dtype).itemsize, scratch * np.dtype(dtype).itemsize // 4)


def _runs(g: Aggregation) -> list[Run]:
    """All points of a level, unless they are very many."""
    step, ends = _points(g), itertools.accumulate(g.points)
    return [
        Run(level, first, min(first + step, end))
        for level, (points, end) in enumerate(zip(g.points, ends, strict=True))
        for first in range(end - points, end, step)
    ]


def _points(g: Aggregation) -> int:
    """As many as a run may have."""
    return max(1, min(max(g.points), _RUN_BYTES // (16 * g.group_channels + 128)))


def _blocks(g: Aggregation, images: range) -> list[Block]:
    """Some rows of queries, or part of one row, or some groups of one query."""
    rows = max(1, _CHUNK // (_points(g) * (4 * g.group_channels + 256)))
    groups = [slice(i, min(i + rows, g.groups)) for i in range(0, g.groups, rows)]
    return [(n, *tile, some) for n in images for tile in tiles(*g.queries, rows // g.groups) for some in groups]


def _pixels(workers: Team, image: np.ndarray, images: range, dtype: type) -> Images:
    return dict(zip(images, flattened(workers, [image[n] for n in images], dtype), strict=True))


def _zeros(g: Aggregation, output: np.ndarray, runs: list[Run], dtype: type) -> np.ndarray:
    """(queries * groups, D), to sum a block's runs in."""
    return np.zeros((output.size // g.group_channels, g.group_channels), sums_of(len(runs), dtype))


def _overlap(levels: list[Level]) -> bool:
    spans = sorted((level.first, level.first + level.height * level.width) for level in levels)
    return any(end > first for (_, end), (first, _) in itertools.pairwise(spans))


def _factors(g: Aggregation, weights: np.ndarray, runs: list[Run], dtype: type) -> Callable[[Run], np.ndarray]:
    """The weights of a run's samples, (queries * groups, P), in a block that has `weights`."""

    def given(run: Run) -> np.ndarray:
        some = weights[..., run.samples]
        return some.astype(dtype, copy=False).reshape(-1, some.shape[-1])

    if not g.softmax:
        return given
    most = functools.reduce(np.maximum, (given(run).max(1, keepdims=True) for run in runs))
    exponentials = functools.lru_cache(maxsize=_KEPT)(lambda run: np.exp(given(run) - most))
    total: Any = np.asarray(sum(exponentials(run).sum(1, dtype=np.float64, keepdims=True) for run in runs), dtype)
    return lambda run: exponentials(run) / total


def _sampler(
    g: Aggregation, levels: list[Level], places: np.ndarray, factors: np.ndarray, block: Block, run: Run
) -> Sampler:
    """The samples of one run in a block; each row sums those of a query and group."""
    (_, rows, columns, groups), level, dtype = block, levels[run.level], factors.dtype.type
    y_x = [places[..., 1 - axis][block][..., run.samples] for axis in (0, 1)]
    positions = np.empty((2, *y_x[0].shape), dtype)
    for axis, queries in enumerate((rows, columns)):
        np.multiply(y_x[axis], _scale(g, level, axis, dtype), out=positions[axis])
        positions[axis] += _origin(g, axis, queries, run.samples, dtype)
    first = level.first * g.groups + groups.start
    return Sampler(
        positions, level.height, level.width, factors, positions.shape[-1], groups.stop - groups.start, g.groups, first,
        discrete=g.discrete,
    )  # fmt: skip


def _levels(g: Aggregation, image: np.ndarray, *others: np.ndarray) -> list[Level]:
    if not isinstance(g, Attention):
        return [Level(0, g.height, g.width)]
    shapes, starts, *_ = others
    if starts is None:
        areas = shapes.prod(axis=1, dtype=np.int64)
        starts = areas.cumsum() - areas
    levels = [Level(int(first), int(h), int(w)) for first, (h, w) in zip(starts, shapes, strict=True)]
    for first, height, width in levels:
        if min(height, width) < 1 or first < 0 or first + height * width > g.pixels:
            raise ValueError(
                f"{g.name}: each level must have a pixel and lie inside value's {g.pixels}, "
                f"got spatial_shapes {shapes.tolist()} and level_start_index {starts.tolist()}"
            )
    return levels


def _scale(g: Aggregation, level: Level, axis: int, dtype: type) -> Any:
    """The pixels that a place moves by when y (axis 0) or x of it grows by 1."""
    return dtype((level.height, level.width)[axis] if isinstance(g, Attention) else g.offset_scale)


def _origin(g: Aggregation, axis: int, queries: slice, samples: slice, dtype: type) -> Any:
    """Where samples lie whose place is 0, y (axis 0) or x of them, broadcasting to (*queries, G, P)."""
    if isinstance(g, Attention):
        # locations begin at the upper left edge of the first pixel, half a pixel before its centre; as published, the
        # discrete ones of pixel 0 end at 0.5, and what is below belongs to it as well
        return dtype(0.5 if g.discrete else -0.5)
    # q * stride - padding + center + (tap * dilation - center) * offset_scale
    tap = np.arange(g.samples + g.remove_center)
    if g.remove_center:
        tap = np.delete(tap, g.samples // 2)
    tap = np.divmod(tap[samples], g.kernel[0])[1 - axis] * g.dilation[axis] - g.center[axis]
    query = np.arange(queries.start, queries.stop)
    middle: np.ndarray = (query * g.stride[axis] - g.padding[axis] + g.center[axis]).astype(dtype)
    around = tap.astype(dtype) * dtype(g.offset_scale)
    return middle.reshape((-1, 1, 1, 1) if axis == 0 else (-1, 1, 1)) + around
