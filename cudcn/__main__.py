"""`python -m cudcn kernels`: registers and shared memory of every kernel, compiled by NVRTC, no GPU needed."""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cudcn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="a table of registers and shared memory per kernel")
    kernels.add_argument("--arch", action="append", help="such as sm_90; more than once for several; default: all")
    arguments = parser.parse_args()

    from . import nvrtc

    try:
        print(nvrtc.table(arguments.arch or nvrtc.ARCHITECTURES, report=lambda line: print(line, file=sys.stderr)))
    except (ImportError, RuntimeError) as error:  # they say what is missing, or what NVRTC refused
        sys.exit(f"{parser.prog} kernels: {error}")


if __name__ == "__main__":
    main()
