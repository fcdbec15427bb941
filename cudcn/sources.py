"""The files in kernels_cu/ as text: what Python must know of a kernel is read there, and written nowhere else."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent / "kernels_cu"
if not FOLDER.is_dir():  # an editable install, or a checkout
    FOLDER = Path(__file__).resolve().parent.parent / "kernels_cu"

_TYPES = {"int": np.int32, "unsigned": np.uint32, "long long": np.int64, "float": np.float32, "double": np.float64}


def path(name: str) -> Path:
    """`name` is a file's, without its ending if that is `.cu`."""
    return FOLDER / (name if "." in name else f"{name}.cu")


@functools.cache
def text(name: str) -> str:
    return path(name).read_text()


@functools.cache
def digest() -> str:
    """A hash of all files: CuPy's own cache key does not cover the headers that a source includes."""
    total = hashlib.sha256()
    for file in sorted(FOLDER.glob("*.cu*")):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def constant(name: str, symbol: str) -> int:
    """A `constexpr int` of a file."""
    match = re.search(rf"^constexpr int .*\b{symbol} = (\d+)[,;]", text(name), re.MULTILINE)
    if match is None:
        raise LookupError(f"{path(name).name} has no constexpr int {symbol}")
    return int(match[1])


class Struct:
    """A struct of a file, as a NumPy scalar: called with every field by its name.

    >>> Struct("bilinear.cuh", "Strides")(n=60, c=20, y=5, x=1)
    array((60, 20, 5, 1), dtype=[('n', '<i8'), ('c', '<i8'), ('y', '<i8'), ('x', '<i8')])
    """

    def __init__(self, name: str, symbol: str, **others: type | np.dtype) -> None:
        """`others` are the types of fields that are not numbers: template parameters, and structs' dtypes.

        A field can be an array, as long as a constant of the file says.
        """
        self.name = symbol
        match = re.search(rf"\bstruct {symbol} {{\n(.*?)^}};", text(name), re.MULTILINE | re.DOTALL)
        if match is None:
            raise LookupError(f"{path(name).name} has no struct {symbol}")
        types = {**_TYPES, **others}
        fields = []
        for kind, names, length in re.findall(r"^  (\w[\w ]*?) (\w+(?:, \w+)*)(?:\[(\w+)\])?;", match[1], re.MULTILINE):
            if kind not in types:
                raise LookupError(f"{symbol} of {path(name).name} has a field of type {kind}, which is not known here")
            shape = (constant(name, length),) if length else ()
            fields += [(field, types[kind], shape) for field in names.split(", ")]
        self.dtype = np.dtype(fields, align=True)
        self._names = self.dtype.names or ()

    def __call__(self, **fields: Any) -> np.ndarray:
        if len(fields) != len(self._names):
            raise TypeError(f"{self.name} has the fields {self._names}, got {list(fields)}")
        return np.array(tuple([fields[name] for name in self._names]), self.dtype)
