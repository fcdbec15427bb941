"""`python -m cudcn`: what the kernels need of a GPU, and compiling them ahead of the first call."""

from __future__ import annotations

import argparse
import sys

from .dtypes import DTYPES
from .ops import OPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cudcn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="registers and shared memory of every kernel; no GPU needed")
    kernels.add_argument("--arch", action="append", help="such as sm_90; more than once for several; default: all")
    warmup = commands.add_parser("warmup", help="compile the kernels for this machine's GPU, into CuPy's cache")
    operators = [op.name for op in OPS]
    warmup.add_argument("--op", action="append", choices=operators, help="more than once for several; default: all")
    warmup.add_argument("--dtype", action="append", choices=list(DTYPES), help="of the data; the same; default: all")
    arguments = parser.parse_args()
    try:
        if arguments.command == "kernels":
            from . import nvrtc

            architectures = arguments.arch or nvrtc.ARCHITECTURES
            print(nvrtc.table(architectures, report=lambda line: print(line, file=sys.stderr)))
        else:
            from .warmup import warm_up

            count = warm_up(arguments.op or operators, arguments.dtype or list(DTYPES))
            print(f"{count} kernels are ready")
    except (ImportError, RuntimeError) as error:  # they say what is missing, or what NVRTC refused
        sys.exit(f"{parser.prog} {arguments.command}: {error}")


if __name__ == "__main__":
    main()
