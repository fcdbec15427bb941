"""docs/migration.md names what there is, and no more."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import cudcn

pytest.importorskip("torch")
from cudcn.torch import nn
from cudcn.torch.compat import patching

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text()
IMPORTS = sorted(set(re.findall(r"from cudcn[\w.]* import [\w, ]+", PAGE)))
CALLS = sorted(set(re.findall(r"`cudcn\.(\w+)\((.*?)\)`", PAGE)))


def test_there_are_some() -> None:
    assert len(IMPORTS) > 6
    assert len(CALLS) > 6


@pytest.mark.parametrize("line", IMPORTS)
def test_imports(line: str) -> None:
    exec(line, {})


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_calls_take_what_they_are_given(name: str, arguments: str) -> None:
    operator = importlib.import_module(f"cudcn.ops.{name}").OP
    assert getattr(cudcn, name) is operator.function
    given = arguments.split(", ")
    named = {argument.partition("=")[0] for argument in given if "=" in argument}
    assert named <= operator.attributes.keys()
    assert len(given) - len(named) <= len(operator.tensors)


def test_every_replacement_is_named() -> None:
    for replacement in patching.REPLACEMENTS:
        for name in replacement.names or [replacement.kind.partition(".")[2]]:
            assert f"`{name}`" in PAGE, name


def test_every_module_is_named() -> None:
    modules = [name for name, value in vars(nn).items() if isinstance(value, type)]
    assert len(modules) > 9
    for name in modules:
        assert f"`{name}`" in PAGE, name


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_a_swap_is_two_lines_at_most(block: str) -> None:
    assert len([line for line in block.splitlines() if line]) <= 2
