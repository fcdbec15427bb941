"""Each of the README's examples runs as it stands, alone, and prints something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_one_for_each_framework() -> None:
    for framework in ("numpy", "cupy", "torch", "jax"):
        assert any(f"import {framework}" in example for example in EXAMPLES)


def on_gpu(example: str) -> object:
    return pytest.param(example, marks=pytest.mark.gpu if "import cupy" in example else ())


@pytest.mark.parametrize("example", [on_gpu(example) for example in EXAMPLES], ids=lambda example: example.split()[1])
def test_example(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_what_no_gpu_has_confirmed_stands_at_the_top() -> None:
    assert "No GPU has run this yet" in README.partition("\n## ")[0]
