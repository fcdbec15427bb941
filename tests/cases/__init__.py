"""Configurations of the operators, one file a family. Those here are for tests of all operators."""

from __future__ import annotations

import importlib
import pkgutil

from .case import Case

_FAMILIES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
ADAPTED: list[Case] = [case for family in _FAMILIES for case in getattr(family, "ADAPTED", ())]
EACH = list({case.op.name: case for case in ADAPTED}.values())  # one case per operator, its last
