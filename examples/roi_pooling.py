"""Let the bins of a box find the flower that the box has missed, with deformable RoI pooling.

The box is too large and beside the flower. Its 3x3 bins start as a regular grid; then each bin's offset climbs the
gradient of what the bin sees, which `X_backward` gives:

- `deform_roi_pool` pools one map, "how much of a flower is here": the bins move onto it.
- `deform_psroi_pool` pools a map per bin, "how much of the flower's top left part is here" and so on: each bin moves
  to its own part.

Usage: python examples/roi_pooling.py [--output roi_pooling.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

import cudcn

BINS, SAMPLES = 3, 4  # along each side: bins of the box, samples of a bin
BOX = np.array([[0, 205, 45, 535, 375]], np.float32)  # (image, x1, y1, x2, y2) in pixels
STEPS = 60
PLAIN = {"output_size": BINS, "sampling_ratio": SAMPLES}
POSITION_SENSITIVE = {"output_size": BINS, "group_size": BINS, "sample_per_part": SAMPLES}


class Pooled(NamedTuple):
    """What an operator saw before and after: the bins' mean scores, and where its samples lie as (x, y)."""

    scores: tuple[float, float]
    samples: tuple[np.ndarray, np.ndarray]  # each (BINS, BINS, SAMPLES**2, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Bins that move to what they look for.")
    parser.add_argument("--output", default="roi_pooling.png", help="where the picture goes (%(default)s)")
    output = parser.parse_args().output
    if importlib.util.find_spec("sklearn") is None:
        sys.exit("This example pools a photograph of scikit-learn's: pip install scikit-learn")

    photo = photograph()
    flower = flower_map(photo)
    parts = part_maps(flower)
    results = {
        "deform_roi_pool": climb(
            flower[None, None], cudcn.deform_roi_pool, cudcn.deform_roi_pool_backward, PLAIN, places_of_deform_roi_pool
        ),
        "deform_psroi_pool": climb(
            parts[None], cudcn.deform_psroi_pool, cudcn.deform_psroi_pool_backward, POSITION_SENSITIVE,
            places_of_deform_psroi_pool,
        ),
    }  # fmt: skip
    for name, pooled in results.items():
        before, after = pooled.scores
        print(f"{name:18} the bins' mean score: {before:.3f} on the regular grid, {after:.3f} moved")

    if importlib.util.find_spec("matplotlib") is None:
        print("picture: skipped, matplotlib is not installed")
    else:
        import roi_pooling_picture

        roi_pooling_picture.draw(output, photo, BOX[0, 1:], parts, *results.values())
        print(f"picture: {os.path.abspath(output)}")
    return 0 if all(pooled.scores[1] > pooled.scores[0] for pooled in results.values()) else 1


def photograph() -> np.ndarray:
    """(3, H, W) in [0, 1]: a photograph by vultilion (CC BY 2.0)."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("flower.jpg").transpose(2, 0, 1).astype(np.float32) / 255


def flower_map(photo: np.ndarray) -> np.ndarray:
    """(H, W): 1 on the flower, falling off towards and beyond its rim, so that there is a slope to climb."""
    red, _, blue = photo
    orange = (red - blue > 0.25).astype(np.float32)
    orange[340:] = 0  # the second flower
    return np.minimum(1.5 * gaussian_filter(orange, 30), 1)


def part_maps(flower: np.ndarray) -> np.ndarray:
    """(BINS * BINS, H, W): how much of the flower's part (i, j) is here, row by row."""
    total = flower.sum()
    y, x = np.mgrid[: flower.shape[0], : flower.shape[1]]
    centre_y, centre_x = (y * flower).sum() / total, (x * flower).sum() / total
    apart = 1.2 * np.sqrt(((y - centre_y) ** 2 * flower).sum() / total)
    maps = [
        np.exp(-((y - centre_y - i * apart) ** 2 + (x - centre_x - j * apart) ** 2) / (2 * 50**2))
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]
    return np.stack(maps).astype(np.float32)


def climb(
    maps: np.ndarray,
    pool: Callable[..., np.ndarray],
    backward: Callable[..., Any],
    attributes: dict[str, int],
    places: Callable[..., np.ndarray],
) -> Pooled:
    """Ever shorter steps along the gradient of each bin's score."""
    start = np.zeros((1, 2, BINS, BINS), np.float32)  # x, then y, in units of a tenth of the box
    offset = start
    for step in range(STEPS):
        slope = backward(np.ones((1, 1, BINS, BINS), np.float32), maps, BOX, offset, **attributes).offset
        length = np.linalg.norm(slope, axis=1, keepdims=True)
        offset = offset + 0.1 * (1 - step / STEPS) * slope / np.maximum(length, 1e-3)  # shorter near the top
    first, last = (float(pool(maps, BOX, o, **attributes).mean()) for o in (start, offset))
    return Pooled((first, last), (places(maps.shape, start), places(maps.shape, offset)))


# Where the samples lie, the operators tell themselves: an image of coordinates, pooled one sample at a time.


def places_of_deform_roi_pool(shape: tuple[int, ...], offset: np.ndarray) -> np.ndarray:
    each = offset.repeat(SAMPLES, 2).repeat(SAMPLES, 3)
    return by_bin(cudcn.deform_roi_pool(coordinates(shape), BOX, each, output_size=BINS * SAMPLES, sampling_ratio=1))


def places_of_deform_psroi_pool(shape: tuple[int, ...], offset: np.ndarray) -> np.ndarray:
    pooled = cudcn.deform_psroi_pool(
        coordinates(shape), BOX, offset, output_size=BINS * SAMPLES, group_size=1, part_size=BINS, sample_per_part=1
    )
    return by_bin(pooled)


def coordinates(shape: tuple[int, ...]) -> np.ndarray:
    """(1, 2, H, W): each pixel's own x and y."""
    y, x = np.mgrid[: shape[2], : shape[3]].astype(np.float32)
    return np.stack([x, y])[None]


def by_bin(places: np.ndarray) -> np.ndarray:
    """(BINS, BINS, SAMPLES**2, 2) of (1, 2, BINS * SAMPLES, BINS * SAMPLES)."""
    split = places[0].reshape(2, BINS, SAMPLES, BINS, SAMPLES)
    return split.transpose(1, 3, 2, 4, 0).reshape(BINS, BINS, SAMPLES**2, 2)


if __name__ == "__main__":
    sys.exit(main())
