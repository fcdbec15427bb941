"""Configurations of the operators, one file a family. Those here are for tests of all operators."""

from __future__ import annotations

from . import aggregate, deform_conv2d, pooling
from .case import Case

ADAPTED: list[Case] = [*deform_conv2d.ADAPTED, *pooling.ADAPTED, *aggregate.ADAPTED]
EACH = list({case.op.name: case for case in ADAPTED}.values())  # one case per operator, its last
