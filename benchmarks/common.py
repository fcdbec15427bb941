"""What cpu.py and gpu.py share: the cases as data, timing bookkeeping, the table, where a result comes from.

A case is an operator at one size: it names itself, makes its tensors, and knows its compulsory work. A new
operator adds one such class here and one group of contestants to each script.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("forward", "forward+backward")
PAUSE = 0.002  # seconds


class Unavailable(Exception):
    """A contestant cannot take part in a case; the message says why and stands in its row."""


@dataclass(frozen=True)
class DeformConv2d:
    """deform_conv2d with mask and bias, 'same' padding, stride 1 and as many channels out as in."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3

    operator = "deform_conv2d"

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        taps, pixels = self.kernel**2, (self.height, self.width)
        return {
            "input": (self.batch, self.channels, *pixels),
            "offset": (self.batch, 2 * taps, *pixels),
            "weight": (self.channels, self.channels, self.kernel, self.kernel),
            "bias": (self.channels,),
            "mask": (self.batch, taps, *pixels),
        }

    @property
    def output(self) -> tuple[int, ...]:
        return self.shapes["input"]

    def tensors(self, seed: int = 0) -> dict[str, np.ndarray]:
        """float32 tensors as a trained layer has them: offsets of about a pixel, masks in [0, 1]."""
        rng = np.random.default_rng(seed)
        made = {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes.items()}
        made["mask"] = rng.random(self.shapes["mask"], np.float32)
        made["weight"] /= (self.channels * self.kernel**2) ** 0.5
        return made

    def grad_output(self, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(self.output, np.float32)

    def flops(self, which: str) -> int:
        """Those of the matrix products alone: one in the forward pass, two more in the backward pass."""
        out = self.batch * self.channels * self.height * self.width
        return 2 * out * self.channels * self.kernel**2 * (1 if which == "forward" else 3)

    def bytes(self, which: str, itemsize: int) -> int:
        """Each tensor read or written once a pass, below which no implementation can go."""
        read = sum(int(np.prod(shape)) for shape in self.shapes.values())
        out = int(np.prod(self.output))
        forward = read + out
        backward = read - self.channels + out + read  # all but bias and grad_output in, the gradients out
        return itemsize * (forward if which == "forward" else forward + backward)


def interleaved(
    functions: dict[str, Callable[[], Any]], seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Milliseconds of each call.

    The contestants take turns, in another order each round, so that noise and what the one before has left
    behind hit all alike; a pause lets its idle threads stop spinning.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, random = list(functions), Random(0)
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        random.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            functions[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first column aligned left and the others right, legible unrendered too."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference by the largest value."""
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


def commit() -> str:
    """The checkout's commit, with '-dirty' where files that git knows differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: str | Path, data: Any) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
