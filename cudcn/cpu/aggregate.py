"""dcnv3, dcnv4 and ms_deform_attn on NumPy arrays: a sparse matrix whose rows sum the samples of a query and group.

Work is split into blocks of one image's queries. Neither the blocks nor the order in which they are summed depend on
the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..dtypes import arithmetic
from .parallel import HELD, Team, batches, team, tiles
from .sampling import Sampler, Share, flattened, sums_of

if TYPE_CHECKING:
    from ..ops.aggregate import Geometry, Level

_CHUNK = 16 << 20  # bytes of a block, by estimate
_PART = 4 << 20  # bytes of what is sampled for one query at a time
_KEPT = 8  # parts of a block that are kept; of more, each is computed again when it is needed

Block = tuple[int, slice, slice, slice]  # an image, the rows and columns of some of its queries, and some groups
Images = dict[int, np.ndarray]  # of each image, its pixels and groups one after another, (.., D)


class Part(NamedTuple):
    """A level and some of its points."""

    level: int
    begin: int
    end: int

    @property
    def at(self) -> Any:
        """In arrays (..., L, P)."""
        return ..., self.level, slice(self.begin, self.end)


@np.errstate(all="ignore")  # NaN and infinity pass through, as in the kernels
def forward(g: Geometry, out: Any, *tensors: Any) -> None:
    image, places, weights = g.parts(*tensors)
    out, levels, dtype, parts = g.by_group(out), g.images(*tensors), arithmetic(image), _parts(g)

    def aggregate(block: Block) -> None:
        factors, total = _factors(g, weights[block], parts, dtype), _zeros(g, out[block], parts, dtype)
        for part in parts:
            total += _sampler(g, levels, places, factors(part), block, part).sums(pixels[block[0]])
        out[block] = total.reshape(out[block].shape)

    with _team(g, dtype, shares=0) as workers:
        for images in batches(g.batch, g.pixels * g.groups * g.group_channels * np.dtype(dtype).itemsize):
            pixels = _pixels(workers, image, images, dtype)
            for _ in workers.ordered(aggregate, _blocks(g, images)):
                pass


@np.errstate(all="ignore")
def backward(g: Geometry, grads: Any, grad_output: Any, *tensors: Any) -> None:
    image, places, weights = g.parts(*tensors)
    grad_output, levels, dtype, parts = g.by_group(grad_output), g.images(*tensors), arithmetic(image), _parts(g)
    grad_image, grad_places, grad_weights = g.parts(*grads)
    if (unused := g.unused(*grads)) is not None:
        unused[...] = 0

    def differentiate(block: Block) -> Iterable[Share]:
        """The block's shares of the image's gradient; those of places and weights are its own to write."""
        vectors = grad_output[block].reshape(-1, g.group_channels).astype(dtype, copy=False)
        factors = _factors(g, weights[block], parts, dtype)

        @functools.lru_cache(maxsize=1)
        def sampler(part: Part) -> Sampler:
            return _sampler(g, levels, places, factors(part), block, part)

        @functools.lru_cache(maxsize=_KEPT)
        def products(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return sampler(part).products(pixels[block[0]], vectors)

        shares: list[Share] = []
        mean: Any = 0  # d out / d logit = factor * (value - mean), and out is the mean of the values
        counted: Any = False  # factors that are NaN are so all together: they count where any sample of the query does
        for part in parts:
            if sums and len(parts) <= _KEPT:
                shares += sampler(part).scattered(vectors)
            if pixels and grad_weights is not None and g.softmax:
                mean += (factors(part) * products(part)[0]).sum(1, dtype=np.float64, keepdims=True)
                counted |= sampler(part).counted.reshape(len(vectors), -1).any(1, keepdims=True)
        for part in parts if pixels else ():
            values, *slopes = products(part)
            if grad_places is not None:
                for axis in (0, 1):
                    own = grad_places[..., 1 - axis][block][part.at]
                    own[...] = (slopes[axis] * dtype(g.scale(levels[part.level])[axis])).reshape(own.shape)
            if grad_weights is not None:
                if g.softmax:
                    values = np.where(counted, factors(part) * (values - mean), 0)
                own = grad_weights[block][part.at]
                own[...] = values.reshape(own.shape)
        if sums and len(parts) > _KEPT:
            return (share for part in parts for share in sampler(part).scattered(vectors))
        return shares

    def accumulate() -> None:
        for (n, *_), shares in zip(blocks, workers.ordered(differentiate, blocks), strict=True):
            for share in shares:
                sums[n][share.at] += share.sums

    with _team(g, dtype, shares=min(len(parts), _KEPT)) as workers:
        numbers = g.pixels * g.groups * g.group_channels  # of an image
        for images in batches(g.batch, 12 * numbers):
            blocks = _blocks(g, images)
            pixels: Images = {}
            sums: Images = {}
            sum_type = sums_of(len(blocks) // len(images) * len(parts) // g.levels, dtype)
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


def _team(g: Geometry, dtype: type, shares: int) -> Any:
    """For blocks that leave so many shares."""
    samples = g.batch * math.prod(g.queries) * g.groups * g.levels * g.points
    scratch = _CHUNK // 2 + 32 * g.group_channels + shares * (2 << 20)
    return team(samples * g.group_channels * np.dtype(dtype).itemsize, scratch * np.dtype(dtype).itemsize // 4)


def _parts(g: Geometry) -> list[Part]:
    """All points of a level, unless they are very many."""
    step = _points(g)
    return [Part(i, p, min(p + step, g.points)) for i in range(g.levels) for p in range(0, g.points, step)]


def _points(g: Geometry) -> int:
    """Of a part."""
    return max(1, min(g.points, _PART // (16 * g.group_channels + 128)))


def _blocks(g: Geometry, images: range) -> list[Block]:
    """Some rows of queries, or part of one row, or some groups of one query."""
    rows = max(1, _CHUNK // (_points(g) * (4 * g.group_channels + 256)))
    groups = [slice(i, min(i + rows, g.groups)) for i in range(0, g.groups, rows)]
    return [(n, *tile, some) for n in images for tile in tiles(*g.queries, rows // g.groups) for some in groups]


def _pixels(workers: Team, image: np.ndarray, images: range, dtype: type) -> Images:
    return dict(zip(images, flattened(workers, [image[n] for n in images], dtype), strict=True))


def _zeros(g: Geometry, output: np.ndarray, parts: list[Part], dtype: type) -> np.ndarray:
    """(queries * groups, D), to sum a block's parts in."""
    return np.zeros((output.size // g.group_channels, g.group_channels), sums_of(len(parts), dtype))


def _overlap(levels: list[Level]) -> bool:
    spans = sorted((level.first, level.first + level.height * level.width) for level in levels)
    return any(end > first for (_, end), (first, _) in itertools.pairwise(spans))


def _factors(g: Geometry, weights: np.ndarray, parts: list[Part], dtype: type) -> Callable[[Part], np.ndarray]:
    """Of a part's samples in a block with those `weights`, (queries * groups, P)."""

    def given(part: Part) -> np.ndarray:
        some = weights[part.at]
        return some.astype(dtype, copy=False).reshape(-1, some.shape[-1])

    if not g.softmax:
        return given
    most = functools.reduce(np.maximum, (given(part).max(1, keepdims=True) for part in parts))
    exponentials = functools.lru_cache(maxsize=_KEPT)(lambda part: np.exp(given(part) - most))
    total: Any = np.asarray(sum(exponentials(part).sum(1, dtype=np.float64, keepdims=True) for part in parts), dtype)
    return lambda part: exponentials(part) / total


def _sampler(
    g: Geometry, levels: list[Level], places: np.ndarray, factors: np.ndarray, block: Block, part: Part
) -> Sampler:
    """Of a part of a block's samples; each row sums those of a query and group."""
    (_, rows, columns, groups), level, dtype = block, levels[part.level], factors.dtype.type
    y_x = [places[..., 1 - axis][block][part.at] for axis in (0, 1)]
    positions = np.empty((2, *y_x[0].shape), dtype)
    for axis, queries in enumerate((rows, columns)):
        np.multiply(y_x[axis], dtype(g.scale(level)[axis]), out=positions[axis])
        positions[axis] += g.origin(axis, queries, slice(part.begin, part.end), dtype)
    first = level.first * g.groups + groups.start
    return Sampler(
        positions, level.height, level.width, factors, positions.shape[-1], groups.stop - groups.start, g.groups, first
    )
