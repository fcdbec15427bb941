"""`Divisor` of kernels_cu/divisor.cuh."""

from __future__ import annotations

from .. import sources
from ..geometry import ceil_div

DIVISOR = sources.Struct("divisor.cuh", "Divisor").dtype


def divisor(number: int) -> tuple[int, int]:
    """The fields of one."""
    shift = (number - 1).bit_length()
    return ceil_div(2 ** (31 + shift), number), shift
