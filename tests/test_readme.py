"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_one_for_each_framework() -> None:
    for framework in ("numpy", "cupy", "torch", "jax"):
        assert any(f"import {framework}" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "cupy" not in e], ids=lambda e: e.split()[1])
def test_example(example: str) -> None:
    names: dict[str, Any] = {}
    exec(example, names)
    assert "cudcn" in names
