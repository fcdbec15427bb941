"""What each kernel may take of an sm_90, in budgets.toml, which `python tests/budgets.py` writes anew.

No kernel may take more than stands there; one that takes a fifth less asks for a new line there, too.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from cudcn import nvrtc, sass, sources

FILE = Path(__file__).with_suffix(".toml")
ARCHITECTURE = "sm_90"
HEAD = """\
# For each kernel: registers; bytes of shared memory; machine instructions; of these, tensor cores' products and 128-bit
# loads from global memory. `python tests/budgets.py` writes this file.
"""


class Budget(NamedTuple):
    registers: int
    shared: int
    instructions: int
    products: int
    wide_loads: int

    def excess(self, used: Budget) -> str | None:
        """What `used` has more of, or so much less that this should be lowered."""
        for name, allowed, taken in zip(self._fields[:3], self[:3], used[:3], strict=True):
            if not 0.8 * allowed <= taken <= allowed:
                return f"{taken} {name}, budgeted are {allowed}"
        return None

    def lack(self, used: Budget) -> str | None:
        """What `used` has none of, and should, or the other way round."""
        for name, wanted, found in zip(self._fields[3:], self[3:], used[3:], strict=True):
            if (found > 0) != (wanted > 0):
                return f"{found} {name}, budgeted are {wanted}"
        return None


def nvrtc_version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def read() -> tuple[str, dict[str, dict[str, Budget]]]:
    """NVRTC's version, and the budget of each expression of each source."""
    with FILE.open("rb") as file:
        tables = tomllib.load(file)
    version = tables.pop("nvrtc")
    return version, {source: {e: Budget(*numbers) for e, numbers in table.items()} for source, table in tables.items()}


def used(compiled: nvrtc.Compiled) -> dict[str, Budget]:
    codes = sass.disassemble(compiled.cubin)
    found = {}
    for expression, name in compiled.names.items():
        opcodes = [instruction.opcode for instruction in codes[name].instructions]
        resources = compiled.resources[expression]
        found[expression] = Budget(
            resources.registers,
            resources.shared,
            len(opcodes),
            sum(opcode.startswith("HMMA") for opcode in opcodes),
            sum(opcode.startswith("LDG.E.128") for opcode in opcodes),
        )
    return found


def main() -> None:
    lines = [HEAD, f'nvrtc = "{nvrtc_version()}"\n']
    kernels = nvrtc.kernels()
    for source in sorted({kernel.source for kernel in kernels}):
        print(source, file=sys.stderr)
        expressions = [kernel.expression for kernel in kernels if kernel.source == source]
        compiled = nvrtc.compiled(sources.path(source), expressions, ARCHITECTURE)
        lines.append(f"\n[{source}]\n")
        lines += [f'"{expression}" = {list(budget)}\n' for expression, budget in used(compiled).items()]
    FILE.write_text("".join(lines))


if __name__ == "__main__":
    main()
