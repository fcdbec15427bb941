"""What is told of an operator in several places agrees, and no place is forgotten."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from inspect import Parameter

import pytest
from cases import EACH

import cudcn
from cudcn import ops
from cudcn.op import Op
from cudcn.ops import OPS

each = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def test_every_operator_is_listed() -> None:
    modules = [importlib.import_module(f"cudcn.ops.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
    assert [module.OP for module in modules if hasattr(module, "OP")] == list(OPS)


def test_every_operator_has_cases() -> None:
    """From which the adapters' tests take their names, too."""
    assert {case.op.name for case in EACH} == {op.name for op in OPS}


@each
def test_the_pair_is_public(op: Op) -> None:
    for name, function in (op.name, op.function), (f"{op.name}_backward", op.backward_function):
        assert getattr(cudcn, name) is function
        assert function.__name__ == name
        assert function.__doc__


@pytest.mark.parametrize("framework", ["torch", "jax"])
@each
def test_the_pair_is_bound_in_each_adapter(op: Op, framework: str) -> None:
    adapter = importlib.import_module(f"cudcn.{framework}")
    for name in op.name, f"{op.name}_backward":
        assert getattr(adapter, name).__name__ == name


@each
def test_docstring_examples_run(op: Op) -> None:
    outcome = doctest.testmod(inspect.getmodule(op.function))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@each
def test_the_backward_is_called_as_the_forward(op: Op) -> None:
    first, *rest = inspect.signature(op.backward_function).parameters.values()
    assert first == Parameter("grad_output", Parameter.POSITIONAL_OR_KEYWORD, annotation="Any")
    assert rest == list(inspect.signature(op.function).parameters.values())  # kinds, defaults and annotations too


@each
def test_the_pair_alone_has_defaults(op: Op) -> None:
    for function in op.canonical, op.geometry:
        assert all(p.default is Parameter.empty for p in inspect.signature(function).parameters.values())


@each
def test_canonical_attributes_keep_their_order(op: Op) -> None:
    """In which the adapters pass them on."""
    given = {**dict.fromkeys(op.attributes, 2), **op.function.__kwdefaults__}
    assert list(op.canonical(**given)) == list(op.attributes)
