"""What the emulator's tests share."""

from pathlib import Path

import ml_dtypes
import numpy as np

KERNELS = Path(__file__).parent / "kernels"
KERNELS_CU = Path(__file__).parents[2] / "kernels_cu"
INCLUDE = (KERNELS_CU,)

BUILDS = ("fast", "check")
ORDERS = ("forward", "reverse", "random")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PREFIX = {np.dtype(np.float16): "__half", BFLOAT16: "__nv_bfloat16"}
