"""What cpu.py and gpu.py share: timing bookkeeping, the table, where a result comes from."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("forward", "forward+backward")
PAUSE = 0.05  # seconds
TURN = 3  # calls


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each call.

    The contestants take turns, in another order each round, so that noise hits all alike. A turn begins with a
    pause, in which the threads of the one before stop spinning, and a call that is not counted, which wakes its own.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, random = list(functions), Random(0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        random.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            functions[name]()
            for _ in range(TURN):
                start = time.perf_counter()
                functions[name]()
                times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
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
