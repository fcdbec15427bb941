"""Run the CUDA kernels of `kernels_cu/` on the CPU, from their own source, and find what is wrong with them.

g++ compiles a `.cu` against the headers in `include/`, which stand in for CUDA's device language, and the threads of a
block run one after another as fibers. It needs g++ 11 or later on Linux on an x86-64 processor with AVX2.

    sample = kernel(Path("kernels_cu/deform_conv2d.cu"), "deform_conv2d_sample<float, float, false>")
    sample((blocks,), (256,), (input, offset, mask, columns, shape))

Arrays are copied for each launch into memory that ends at a guard page, and what the kernel wrote is copied back.
Two builds, chosen by `settings`:

- `"fast"` finds accesses past an array that hit a guard page, writes to `const` pointers, deadlocks and divergent warp
  collectives; shared memory and new arrays are full of NaN, so that what was never written shows in the result.
- `"check"`, about ten times slower, looks at every access: out of bounds, misaligned, data races in shared and global
  memory, shared memory that was never written, undefined behaviour. It tells the line of the source.

A race changes the result of the fast build only if threads run in an order that suits it: try `order="reverse"` and
`order="random"`. What is not emulated is listed in `include/cuda_emulator.h`.
"""

from .build import kernel
from .configuration import settings
from .errors import BuildError, EmulatorError
from .launch import Kernel
from .memory import empty

__all__ = ["BuildError", "EmulatorError", "Kernel", "empty", "kernel", "settings"]
