"""The machine code of kernels: NVRTC's cubins through nvdisasm.

That is in the wheel nvidia-cuda-nvdisasm, and in an installed CUDA.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .nvrtc import cuda_folders


class Instruction(NamedTuple):
    predicate: str  # such as "@!P0", or ""
    opcode: str  # such as "LDG.E.128.CONSTANT"
    operands: str
    where: tuple[str, ...]  # with line information "file:line" in the source, then where that was inlined

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch or call names."""
        match = re.search(r"`\((\S+)\)", self.operands)
        return match[1] if match else None


class Code(NamedTuple):
    instructions: list[Instruction]  # up to the padding
    labels: dict[str, int]  # where each label is, as an index


@functools.cache
def nvdisasm() -> Path | None:
    """The program, if it is installed."""
    folders = os.pathsep.join(map(str, cuda_folders("bin")))
    found = shutil.which("nvdisasm", path=folders) or shutil.which("nvdisasm")
    return Path(found) if found else None


def disassemble(cubin: bytes, lines: bool = False) -> dict[str, Code]:
    """Each kernel's code by its mangled name; with source lines, if it was compiled with -lineinfo."""
    program = nvdisasm()
    if program is None:
        raise RuntimeError("nvdisasm was not found: install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-c", *(["-gi"] if lines else []), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return {name: _code(body) for name, body in zip(sections[::2], sections[1::2], strict=True)}


_PLACE = re.compile(r'"([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;")


def _code(text: str) -> Code:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    where: list[str] = []
    complete = True
    for line in text.splitlines():
        if line.lstrip().startswith("//## File"):
            if complete:
                where, complete = [], False
            where += [name for name in _places(line) if name not in where[-1:]]
        elif match := re.match(r"(\S+):$", line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            complete = True
            instructions.append(Instruction(match[1] or "", match[2], match[3], tuple(where)))
        elif line.lstrip().startswith(".section"):
            break
    # a branch to itself, and NOPs behind it, fill the last line of the instruction cache
    while instructions and _is_padding(instructions[-1], labels, len(instructions) - 1):
        instructions.pop()
    return Code(instructions, {label: at for label, at in labels.items() if at < len(instructions)})


def _is_padding(instruction: Instruction, labels: dict[str, int], at: int) -> bool:
    return instruction.kind == "NOP" or labels.get(instruction.target or "") == at


def _places(line: str) -> Iterator[str]:
    for file, number in _PLACE.findall(line):
        yield f"{Path(file).name}:{number}"
