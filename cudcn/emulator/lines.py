"""Source lines of a kernel's library, by addr2line (of binutils)."""

import shutil
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path


def source_lines(offsets: Iterable[int], library: Path) -> dict[int, list[str]]:
    """For each offset of code "file:line", and that of each function into which it was inlined; the innermost first.

    The emulator's own lines are left out. All lists are empty where there is no addr2line.
    """
    offsets = list(offsets)
    addr2line = shutil.which("addr2line")
    if addr2line is None or not offsets:
        return {offset: [] for offset in offsets}
    command = [addr2line, "--inlines", "--addresses", "--exe", str(library)]
    asked = "\n".join(map(hex, offsets))
    answer = subprocess.run(command, input=asked, capture_output=True, text=True, check=False).stdout.splitlines()
    # an address begins the lines of each answer
    groups = groupby(answer, key=lambda line: line.startswith("0x"))
    found = [[_name(line) for line in lines if _is_kernels(line)] for is_address, lines in groups if not is_address]
    return dict(zip(offsets, found, strict=True))


def _name(line: str) -> str:
    return Path(line.split(" ")[0]).name


def _is_kernels(line: str) -> bool:
    return "??" not in line and not _name(line).startswith(("emulator_", "source.cpp"))
