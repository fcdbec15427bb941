"""How a module of another library gets a forward of ours: its class becomes a subclass of what it was.

So parameters, buffers, hooks, names, mode, `isinstance` and the class's name all stay, as they do where torch's own
parametrizations do the same.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import nn


class Replacement(torch.nn.Module):
    """A `forward` with the parameters of another library's, to be mixed in before the class that has that one."""

    kind: ClassVar[str]  # library.Class, as patch reports it
    names: ClassVar[tuple[str, ...]] = ()  # of the classes whose forward this replaces
    needs: ClassVar[frozenset[str]] = frozenset()  # the attributes and children that such a module has,
    allows: ClassVar[frozenset[str]] = frozenset()  # and those that it may have

    if TYPE_CHECKING:  # the attributes are the other library's, of types that only it knows

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def claims(cls, module: torch.nn.Module) -> bool:
        """Whether the class that defines the module's forward bears one of the names, and is not our own of it."""
        owner = _owner(module)
        return owner.__name__ in cls.names and not owner.__module__.startswith(nn.__name__)

    @classmethod
    def misfit(cls, module: torch.nn.Module) -> str | None:
        """Why a module that `claims` is true of is another one for all that: a fork, say. None if it is the one."""
        theirs, ours = parameters(_owner(module).forward), parameters(cls.forward)
        if theirs != ours[: len(theirs)]:
            return f"its forward takes ({', '.join(theirs)}), and not ({', '.join(ours)})"
        has = _attributes(module)
        if lacking := cls.needs - has:
            return f"it has no {', '.join(sorted(lacking))}"
        if unknown := has - cls.needs - cls.allows:
            return f"it has {', '.join(sorted(unknown))}, which is not known, and may mean another forward"
        return None

    @classmethod
    def members(cls, original: type[torch.nn.Module]) -> dict[str, Any]:
        """What else the class has that replaces `original`."""
        return {}


def swap(module: torch.nn.Module, replacement: type[Replacement]) -> None:
    """Gives the module the replacement's forward, in place."""
    module.__class__ = _swapped(replacement, type(module))  # type: ignore[arg-type]  # mypy doubts that classes hash


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, but self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


@functools.cache
def _swapped(replacement: type[Replacement], original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def reduce(self: Any, protocol: Any) -> Any:
        # pickle looks a class up by its name, and would find the original
        return _blank, (replacement, original), self.__getstate__()

    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    members = {**named, "__reduce_ex__": reduce, **replacement.members(original)}
    return types.new_class(original.__name__, (replacement, original), exec_body=lambda body: body.update(members))


def _blank(replacement: type[Replacement], original: type[torch.nn.Module]) -> torch.nn.Module:
    """What a swapped module's state is restored into."""
    swapped = _swapped(replacement, original)  # type: ignore[arg-type]
    return swapped.__new__(swapped)


def _owner(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that defines the module's forward: a subclass that leaves it as it was is the same to us."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def _attributes(module: torch.nn.Module) -> set[str]:
    """The public ones of the module itself: plain ones, parameters, buffers and children."""
    plain = vars(module).keys() - vars(torch.nn.Module()).keys()
    names = {*plain, *module._parameters, *module._buffers, *module._modules}
    return {name for name in names if not name.startswith("_")}
