"""Runs the CUDA kernels of `kernels_cu/` on the CPU, from their own source, and finds what is wrong.

g++ compiles a `.cu` against the headers in `include/`, which stand in for CUDA's device language; the threads
of a block run one after another, as fibers. It needs g++ 11 or later, on Linux, on an x86-64 processor with
AVX2; `unavailable()` says why it cannot run on another.

    >>> import numpy as np
    >>> from cudcn import emulator, sources
    >>> from cudcn.cuda.divisor import DIVISOR, divisor
    >>> name = "deform_conv2d_backward_bias<float, double>"
    >>> sum_pixels = emulator.kernel(sources.path("deform_conv2d_backward"), name)
    >>> image, sums = np.ones((1, 4, 8, 8), np.float32), emulator.empty((4,), np.float64)
    >>> strides = sources.Struct("bilinear.cuh", "Strides")(n=256, c=64, y=8, x=1)
    >>> pixels = sources.Struct("deform_conv2d_backward", "Pixels", Divisor=DIVISOR)(
    ...     plane_of=divisor(64), width_of=divisor(8), images=1, channels=4, height=8, width=8, summands=1
    ... )
    >>> sum_pixels((1,), (4, 64), (image, strides, sums, pixels))  # one block of 4 channels by 64 pixels
    >>> sums
    array([64., 64., 64., 64.])

Arrays are copied for each launch into memory that ends at a guard page, and what the kernel wrote is copied
back. Three builds, chosen by `settings`:

- "fast" finds accesses that hit a guard page, writes to `const` pointers, misaligned moves of whole vectors,
  deadlocks and divergent warp collectives. Shared memory and new arrays are full of NaN: what was never
  written shows in the result.
- "check" looks at every access and finds those out of bounds or misaligned, data races in shared and global
  memory, reads of shared memory that was never written, and undefined behaviour. It is three to fifty times
  slower and takes sixty bytes for each byte of an array that a kernel touches: give it small shapes.
- "count" counts what a GPU's memory system would see: see `counts`, which chooses it.

A race changes the result of the fast build only where the threads run in an order that suits it: try
`order="reverse"` and `order="random"`. What is not emulated is listed in `include/cuda_emulator.h`.
"""

from .build import kernel, unavailable
from .configuration import settings
from .counts import Counts, Event, counts
from .errors import BuildError, EmulatorError
from .launch import Compiled
from .memory import empty

__all__ = [
    "BuildError",
    "Compiled",
    "Counts",
    "EmulatorError",
    "Event",
    "counts",
    "empty",
    "kernel",
    "settings",
    "unavailable",
]
