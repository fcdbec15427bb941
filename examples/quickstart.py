"""Smooth a noisy photograph without blurring its edges, and check that every framework computes the same.

Each output pixel of a 3x3 convolution looks at nine places. Here the photograph says where they lie: at an
edge the grid is squeezed to a line along it, in an even area it stays a square. `offset` carries those nine
shifts, `mask` how much each place counts, and `cudcn.deform_conv2d` does the rest.

The same call is then made with torch tensors and JAX arrays, which proves the adapters that carry them, and with the
CUDA kernels, run on the CPU by the emulator, which proves the arithmetic. Outputs and gradients must agree with
NumPy's.

Usage: python examples/quickstart.py [--output quickstart.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

import cudcn
from cudcn import emulator

Arrays = tuple[np.ndarray, ...]
PASSES = 2
BINOMIAL = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
TENSORS = ("input", "offset", "weight", "bias", "mask")

# The largest difference allowed, relative to the largest value. float32 rounds each number by 6e-8; summed in
# another order over 56,000 pixels, that can grow sqrt(56,000)-fold, to 1.4e-5. This is twice as much, and a
# wrong tap, slope or border shows as 1e-3 at least.
BOUND = 3e-5


def main() -> int:
    parser = argparse.ArgumentParser(description="Edge-preserving smoothing with one deformable operator.")
    parser.add_argument("--output", default="quickstart.png", help="where the picture goes (%(default)s)")
    output = parser.parse_args().output
    if importlib.util.find_spec("sklearn") is None:
        sys.exit("This example filters a photograph of scikit-learn's: pip install scikit-learn")

    with step("load the photograph and add noise"):
        clean, noisy = photograph()
    with step("compute offsets and mask from it"):
        first = steer(noisy)
    with step(f"regular 3x3 convolution, {PASSES} passes"):
        blurred = noisy
        for _ in range(PASSES):
            blurred = regular(blurred)
    with step(f"deformable 3x3 convolution, {PASSES} passes"):
        smoothed = noisy
        for _ in range(PASSES):
            smoothed = deformed(smoothed, *steer(smoothed))
    for name, image in (("noisy photo", noisy), ("regular", blurred), ("deformed", smoothed)):
        print(f"    {name:12} {psnr(image, clean):.1f} dB from the clean photo")

    agree = compare(noisy, *first, clean)

    if importlib.util.find_spec("matplotlib") is None:
        print("picture: skipped, matplotlib is not installed")
    else:
        with step("draw the picture"):
            import quickstart_picture

            quickstart_picture.draw(output, clean, noisy, blurred, smoothed, *first)
        print(f"picture: {os.path.abspath(output)}")
    return 0 if agree else 1


def photograph() -> tuple[np.ndarray, np.ndarray]:
    """(3, H, W) in [0, 1], clean and with noise: a part of a photograph by danielbuechele (CC BY 2.0)."""
    from sklearn.datasets import load_sample_image

    clean = load_sample_image("china.jpg")[15:215, 70:350].transpose(2, 0, 1).astype(np.float32) / 255
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    return clean, (clean + noise).astype(np.float32)


def steer(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offset (1, 18, H, W) and mask (1, 9, H, W) that fit the 3x3 grid to the image around each pixel."""
    # The structure tensor: how clear the local edge is, from 0 to 1, and a, the unit vector across it.
    dy, dx = (gaussian_filter(image, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
    yy, xx, xy = (gaussian_filter(product.sum(0), 1.5) for product in (dy * dy, dx * dx, dx * dy))
    edge = np.hypot(xx - yy, 2 * xy) / (xx + yy + 4e-3)
    angle = np.arctan2(2 * xy, xx - yy) / 2
    ay, ax = np.sin(angle), np.cos(angle)

    # The grid: the clearer the edge, the narrower across it and the longer along it.
    height, width = image.shape[1:]
    row, column = np.mgrid[:height, :width]
    i, j = (axis.reshape(9, 1, 1) for axis in np.mgrid[-1:2, -1:2])
    across, along = 1.25 * (1 - edge), 1.25 + 0.25 * edge
    place = (across - along) * (i * ay + j * ax)
    y = np.clip(row + along * i + place * ay, 0, height - 1)
    x = np.clip(column + along * j + place * ax, 0, width - 1)
    offset = np.stack([y - row - i, x - column - j], axis=1).reshape(1, 18, height, width)

    # The mask: a place counts less the more its colour differs from the centre's. It sums to 1.
    guide = gaussian_filter(image, (0, 0.7, 0.7))
    difference = np.stack([map_coordinates(channel, (y, x), order=1) for channel in guide]) - guide[:, None]
    mask = BINOMIAL.reshape(9, 1, 1) * np.exp(-(difference**2).sum(0) / (2 * 0.12**2))
    return offset.astype(np.float32), (mask / mask.sum(0))[None].astype(np.float32)


def deformed(image: np.ndarray, offset: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weight = np.ones((3, 1, 3, 3), np.float32)  # one input channel for each output: depthwise, groups = 3
    return cudcn.deform_conv2d(image[None], offset, weight, mask=mask, padding=1)[0]


def regular(image: np.ndarray) -> np.ndarray:
    """The same operator with its grid left alone."""
    image = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")[None]
    offset = np.zeros((1, 18, image.shape[2] - 2, image.shape[3] - 2), np.float32)
    return cudcn.deform_conv2d(image, offset, np.tile(BINOMIAL, (3, 1, 1, 1)))[0]


def compare(image: np.ndarray, offset: np.ndarray, mask: np.ndarray, clean: np.ndarray) -> bool:
    """Print how far each framework's output and gradients are from NumPy's; whether all are near enough."""
    weight, bias = np.ones((3, 1, 3, 3), np.float32), np.zeros(3, np.float32)
    tensors, target = (image[None], offset, weight, bias, mask), clean[None]
    expected = with_numpy(target, *tensors)
    no_emulator = emulator.unavailable() or ("" if shutil.which("g++") else "g++ not found")
    runs: list[tuple[str, Callable[..., Arrays], str]] = [
        ("torch adapter", with_torch, missing("torch")),
        ("JAX adapter", with_jax, missing("jax", "jax_tvm_ffi")),
        ("CUDA, emulated", emulated, no_emulator),
    ]
    lines, agree = [], True
    for name, run, reason in runs:
        if reason:
            lines.append(f"{name:15} skipped: {reason}")
            continue
        with step(f"{name}: load, forward and backward"):
            results = run(target, *tensors)
        far = [float(abs(a - b).max() / abs(b).max()) for a, b in zip(results, expected, strict=True)]
        near = all(value <= BOUND for value in far)  # so that NaN is not near
        agree &= near
        verdict = "agrees" if near else f"DIFFERS by more than {BOUND:.0e}"
        lines.append(f"{name:15} " + "".join(f"{value:10.1e}" for value in far) + f"  {verdict}")
    print("\nLargest difference from NumPy's output and gradients (d), relative to the largest value:")
    print(f"{'':15} {'output':>10}" + "".join(f"{'d ' + name:>10}" for name in TENSORS))
    print("\n".join(lines))
    print("On the CPU, torch tensors and JAX arrays are computed by the code that computed NumPy's numbers: their rows")
    print("prove the adapters, not the arithmetic. The kernels are other code, and their row proves it.\n")
    return agree


# In each framework: the output, then the gradients of half its squared distance from a target.


def with_numpy(target: np.ndarray, *tensors: np.ndarray) -> Arrays:
    out = cudcn.deform_conv2d(*tensors, padding=1)
    return out, *cudcn.deform_conv2d_backward(out - target, *tensors, padding=1)


def with_torch(target: np.ndarray, *tensors: np.ndarray) -> Arrays:
    import torch

    leaves = [torch.from_numpy(t.copy()).requires_grad_() for t in tensors]
    out = cudcn.deform_conv2d(*leaves, padding=1)
    (0.5 * (out - torch.from_numpy(target.copy())) ** 2).sum().backward()
    return out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)


def with_jax(target: np.ndarray, *tensors: np.ndarray) -> Arrays:
    import jax

    arrays = map(jax.numpy.asarray, tensors)
    out, pullback = jax.vjp(lambda *arrays: cudcn.deform_conv2d(*arrays, padding=1), *arrays)
    return np.asarray(out), *map(np.asarray, pullback(out - target))


def emulated(target: np.ndarray, *tensors: np.ndarray) -> Arrays:
    """The CUDA kernels, compiled by g++ and run on the CPU."""
    with mock.patch.dict(os.environ, CUDCN_DEVICE="emulator"):
        return with_numpy(target, *tensors)


def missing(*modules: str) -> str:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    return float(-10 * np.log10(((image - clean) ** 2).mean()))


@contextmanager
def step(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:48} {time.perf_counter() - start:6.2f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
