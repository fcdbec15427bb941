"""Two matrix products, right, and wrong with a planted bug's name defined."""

from typing import Any

import numpy as np

from cudcn import emulator

from .builds import INCLUDE, KERNELS, PREFIX


def tiled_gemm(rng: np.random.Generator, *defines: str) -> bool:
    """Whether the product is right."""
    m, n, k = 50, 37, 45
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    c, total = emulator.empty((m, n), np.float32), np.zeros(1, np.float32)
    expression = "tiled_gemm<float, 16>"
    kernel = emulator.kernel(KERNELS / "tiled_gemm.cu", expression, include=INCLUDE, defines=defines)
    kernel((3, 4), (16, 16), (a, b, c, total, np.int32(m), np.int32(n), np.int32(k)))
    return np.allclose(c, a @ b, atol=1e-4) and np.allclose(total[0], (a @ b).sum(), atol=1e-2)


def mma_gemm(rng: np.random.Generator, *defines: str, dtype: Any = np.float16) -> bool:
    m, n, k = 72, 72, 104
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    c = emulator.empty((m, n), np.float32)
    expression = f"mma_gemm<{PREFIX[np.dtype(dtype)]}>"
    kernel = emulator.kernel(KERNELS / "mma_gemm.cu", expression, include=INCLUDE, defines=defines)
    two_stages = 2 * (64 * 40 + 32 * 72) * 2
    kernel((2, 2), (128,), (a, b, c, np.int32(m), np.int32(n), np.int32(k)), shared_mem=two_stages)
    return np.allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-3)
