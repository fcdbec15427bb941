"""How kernels are built and in which order their threads run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

BUILDS = ("fast", "check", "count")
ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Settings:
    build: str
    order: str
    seed: int = 0
    strict: bool = False
    sample: int = 0

    def __post_init__(self) -> None:
        if self.build not in BUILDS:
            raise ValueError(f"emulator: build must be one of {BUILDS}, got {self.build!r}")
        if self.order not in ORDERS:
            raise ValueError(f"emulator: order must be one of {ORDERS}, got {self.order!r}")


# One for the whole process, not per thread: JAX launches from threads of its own, and they must see it.
_active: Settings | None = None


def current_settings() -> Settings:
    """Those of the innermost `settings`, else the environment's, else fast and forward."""
    if _active is not None:
        return _active
    return Settings(
        build=os.environ.get("CUDCN_EMULATOR_BUILD") or "fast",
        order=os.environ.get("CUDCN_EMULATOR_ORDER") or "forward",
    )


@contextmanager
def settings(
    *,
    build: str | None = None,
    order: str | None = None,
    seed: int | None = None,
    strict: bool | None = None,
    sample: int | None = None,
) -> Iterator[None]:
    """Build and run kernels differently inside a `with` block; what is left out stays as it is.

    build: "fast", "check" for the build that looks at every access, or "count" for the one that counts them.
    order: "forward", "reverse" or "random", the order of blocks, warps and lanes.
    seed: of the random order.
    strict: a `__syncthreads()` is an error once a thread of the block has returned.
    sample: how many blocks of a launch to run, spread over its grid; 0 for all.
    """
    global _active
    given = {"build": build, "order": order, "seed": seed, "strict": strict, "sample": sample}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    before = _active
    _active = replace(current_settings(), **changes)
    try:
        yield
    finally:
        _active = before
