"""The planted bugs of bugs.cu, and what each build says of them."""

import re
from dataclasses import dataclass

import numpy as np

from cudcn import emulator

from .builds import INCLUDE, KERNELS, ORDERS

RACE = r"race on shared array '\w+' at byte \d+: .*, with no barrier between"
RACE_OR_UNWRITTEN = rf"{RACE}|read of uninitialised shared array"


@dataclass(frozen=True)
class Bug:
    """One function of bugs.cu: what each build says of it, "wrong" for a wrong result, None if it hides.

    The message must name a line of the function, except where `line` is False.
    """

    name: str
    fast: str | None
    check: str | None
    orders: tuple[str, ...] = ORDERS
    grid: int = 1
    threads: int = 64
    strict: bool = False
    line: bool = True


PAST_END = r"out-of-bounds {} argument \d \(256 bytes\) at byte 256"
NEGATIVE = "out-of-bounds .* at byte -"
RETURNED = "threads of the block have returned"
MISALIGNED_COPY = r"cp.async .*: misaligned source"
MISALIGNED_ROW = "ldmatrix.x4: row address .* not 16-byte aligned"
DIMENSION = "index outside an array's dimension"
BUGS = [
    Bug("read_past_end", PAST_END.format("read of"), PAST_END.format("read of 4 bytes in")),
    Bug("read_far_past_end", "out-of-bounds read of argument 1", "read of 4 bytes in argument 1"),
    Bug("read_before_start", NEGATIVE, NEGATIVE),
    Bug("write_past_end", PAST_END.format("write of"), PAST_END.format("write of 4 bytes in"), threads=96),
    Bug("write_just_before_start", "write to argument 2 .*1 bytes before its start", None, line=False),
    Bug("write_just_before_start", None, "write of 4 bytes in argument 2 .* at byte -4"),
    Bug("write_to_const", "write to read-only argument 1", "write to read-only argument 1"),
    Bug("load_misaligned_vector", "misaligned vector access", "misaligned access"),
    Bug("write_past_shared", "write of shared array 'tile' .* byte 256", "shared array 'tile' .* byte 256"),
    Bug("read_past_dynamic_shared", "read of dynamic shared .* byte 256", "dynamic shared .* byte 256"),
    Bug("write_before_shared", "write to shared array 'tile' .* before its start", None, line=False),
    Bug("write_before_shared", None, "write of 4 bytes in shared array 'tile' .* at byte -4"),
    Bug("overrun_inner_dimension", "out-of-bounds write of shared array 'tile'", DIMENSION),
    Bug("read_uninitialised_shared", "wrong", "read of uninitialised shared array 'tile'"),
    Bug("overrun_local_array", None, DIMENSION),
    Bug("read_neighbour", "wrong", RACE_OR_UNWRITTEN, orders=("reverse", "random")),
    Bug("read_neighbour", None, RACE, orders=("forward",)),
    Bug("overwrite_neighbour", "wrong", RACE, orders=("reverse",)),
    Bug("overwrite_neighbour", None, RACE, orders=("forward", "random")),
    Bug("overwrite_after_shuffle", None, RACE),
    Bug("read_lane", "wrong", RACE),
    Bug("write_same_value", None, "race on shared array 'flag'"),
    Bug("add_without_atomic", None, "race on argument 2 .* of the same block"),
    Bug("add_from_blocks", None, "race on argument 2 .* of another block", grid=4),
    Bug("forget_async_wait", "wrong", "while a cp.async to it .* is in flight"),
    Bug("copy_misaligned", MISALIGNED_COPY, MISALIGNED_COPY),
    Bug("copy_past_end", PAST_END.format("read of"), PAST_END.format("read of 16 bytes in")),
    Bug("wait_in_both_branches", "divergent barrier", "divergent barrier"),
    Bug("wait_after_return", RETURNED, RETURNED, strict=True),
    Bug("wait_against_shuffle", "deadlock.* in __syncthreads .* in __shfl_sync", "deadlock"),
    Bug("shuffle_in_both_branches", "divergent warp collective", "divergent warp collective"),
    Bug("shuffle_outside_mask", "is not in its mask 0000ffff", "is not in its mask 0000ffff"),
    Bug("shuffle_from_returned_lane", "wrong", "wrong"),
    Bug("multiply_with_half_warp", "mma.m16n8k16 needs a full warp", "mma.m16n8k16 needs a full warp"),
    Bug("load_misaligned_matrix", MISALIGNED_ROW, MISALIGNED_ROW),
    Bug("convert_nan", "wrong", "conversion of NaN"),
    Bug("divide_by_zero", "integer division by zero", "integer division by zero"),
]
BUG_SOURCE = (KERNELS / "bugs.cu").read_text()
BUG_NUMBERS = {name: int(number) for number, name in re.findall(r"case (\d+): return (\w+)\(", BUG_SOURCE)}


def lines_of(name: str) -> range:
    """The lines of a function of bugs.cu."""
    start = BUG_SOURCE.index(f"PLANTED {name}(")
    end = re.compile(r"^}|}$", re.MULTILINE).search(BUG_SOURCE, start).end()
    return range(BUG_SOURCE.count("\n", 0, start) + 1, BUG_SOURCE.count("\n", 0, end) + 2)


def run_bug(bug: Bug, *defines: str) -> np.ndarray:
    source = np.arange(64, dtype=np.float32)
    out = np.zeros(64, np.float32)
    kernel = emulator.kernel(KERNELS / "bugs.cu", "planted_bug", include=INCLUDE, defines=defines)
    args = (np.int32(BUG_NUMBERS[bug.name]), source, out, np.int32(64))
    kernel((bug.grid,), (bug.threads,), args, shared_mem=256)
    return out
