"""Other libraries' models and calls on these operators: `patch`, a file of functions for each library, and `install`.

None of the libraries is imported.
"""

from . import (
    dcnv4 as dcnv4,
    deformable_detr as deformable_detr,
    internimage as internimage,
    mmcv as mmcv,
    torchvision as torchvision,
    transformers as transformers,
)
from .extensions import install as install
from .patching import patch as patch
