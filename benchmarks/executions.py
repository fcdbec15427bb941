"""How often a warp runs each instruction of a kernel's machine code, from what the emulator counts of its source.

The emulator knows how often the warps come to each access, barrier, shuffle and matrix product, by source line; NVRTC's
line information says which instructions are made of that line. So for each line

    sum over its instructions of (bytes a lane moves) * (runs of the instruction's block) = (bytes a lane moved)

holds, however the compiler has unrolled and copied it, and what comes into a block goes out of it. Both together,
with the least sum of (relative) errors, are a linear programme for the runs of the blocks. They leave something open:
branches with none of these on either side. `Runs` has the least and the most instructions that agree with the counts;
the truth is nearer to the least, for most such branches are there for rare cases. A loop without any of these is
counted once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from cudcn.emulator import Counts, Event
from cudcn.sass import Code, Instruction

DIVERGENCE = 1e-3  # what a warp that takes both sides of a branch adds to the objective, beside the relative errors
PREDICATED = 0.1  # weight of more runs than counted, where a predicate may hide some
SLACK = 1e-5  # of the objective, within which solutions count as equally good


class Runs(NamedTuple):
    """Per warp."""

    opcodes: dict[str, float]  # how many of each a warp issues, at least
    least: float
    most: float
    error: float  # by how much the counts disagree with the instructions, as a mean over the lines


class _Edge(NamedTuple):
    source: int  # -1: the kernel's start
    target: int  # -1: its end
    is_call: bool = False  # and so comes back


def runs(code: Code, counts: Counts) -> Runs:
    warps = counts.blocks * math.ceil(math.prod(counts.block) / 32)
    blocks, edges = _flow(code)
    equations = _equations(blocks, counts.events, warps)
    anchored = {block for equation in equations for block in equation.gives}
    edges = [edge for edge in edges if not _is_loop_without(edge, anchored)]
    programme = _Programme(len(blocks), edges, equations)
    sizes = np.array([len(block) for block in blocks], float)
    least, most = programme.extremes(sizes)
    opcodes: dict[str, float] = defaultdict(float)
    for block, times in zip(blocks, least, strict=True):
        for instruction in block:
            opcodes[instruction.opcode] += times
    return Runs(dict(opcodes), float(sizes @ least), float(sizes @ most), programme.error)


# ---- the flow graph

Block = list[Instruction]


def _flow(code: Code) -> tuple[list[Block], list[_Edge]]:
    """The basic blocks, and the ways between them."""
    count = len(code.instructions)
    ends = {i + 1 for i, instruction in enumerate(code.instructions) if instruction.kind in _LEAVES}
    starts = sorted({0, *ends, *code.labels.values()} - {count})
    number = {start: i for i, start in enumerate(starts)}
    blocks = [code.instructions[a:b] for a, b in zip(starts, [*starts[1:], count], strict=True)]
    edges = [_Edge(-1, 0)]
    for i, block in enumerate(blocks):
        last = block[-1]
        label = code.labels.get(last.target or "")
        # A division calls its slow path for the rarest numbers.
        if last.kind in ("BRA", "CALL") and label is not None and "slowpath" not in (last.target or ""):
            edges.append(_Edge(i, number[label], last.kind == "CALL"))
        if last.kind in ("EXIT", "RET"):
            edges.append(_Edge(i, -1))
        if i + 1 < len(blocks) and not (last.kind in ("BRA", "EXIT", "RET") and _is_always(last)):
            edges.append(_Edge(i, i + 1))
    return blocks, edges


_LEAVES = ("BRA", "CALL", "EXIT", "RET")


def _is_always(instruction: Instruction) -> bool:
    """Whether a branch is taken by all: "BRA P1, label" has a condition as "@P1 BRA label" has, and BRA.DIV is one."""
    has_condition = re.match(r"!?U?[PR]", instruction.operands) is not None and instruction.kind == "BRA"
    return not instruction.predicate and not has_condition


def _is_loop_without(edge: _Edge, anchored: set[int]) -> bool:
    """Whether an edge closes a loop in which nothing is counted."""
    return 0 <= edge.target <= edge.source and not anchored & set(range(edge.target, edge.source + 1))


# ---- what is counted: a class of instructions, and how many bytes a lane moves

_CLASSES = {
    "LDG": "load", "LD": "load", "LDS": "load", "STG": "store", "ST": "store", "STS": "store", "LDGSTS": "copy",
    "RED": "atomic", "REDG": "atomic", "ATOM": "atomic", "ATOMG": "atomic", "ATOMS": "atomic",
    "BAR": "barrier", "SHFL": "shuffle", "LDSM": "matrix load", "HMMA": "matrix product",
}  # fmt: skip


_COLLECTIVES = {
    "ldmatrix": "matrix load", "mma": "matrix product", "__shfl": "shuffle", "__syncthreads": "barrier",
}  # fmt: skip


def _class_of_event(event: Event) -> tuple[str, float] | None:
    """Its class, and what one of its instructions counts."""
    for prefix, kind in _COLLECTIVES.items():
        if event.name.startswith(prefix):
            return kind, 1
    if event.name == "copy" and not event.shared:  # beside which there is one event more, for the destination
        return None
    return (event.name, event.size) if event.size else None


def _class_of(instruction: Instruction) -> tuple[str, float] | None:
    kind = _CLASSES.get(instruction.kind)
    if kind is None:
        return None
    if kind in ("load", "store", "copy", "atomic"):
        return kind, _bytes(instruction.opcode)
    return kind, 1


def _bytes(opcode: str) -> int:
    """What a lane moves."""
    if match := re.search(r"\.F(\d+)x(\d)", opcode):
        return int(match[1]) * int(match[2]) // 8
    for part in opcode.split("."):
        if match := re.fullmatch(r"[USF]?(8|16|32|64|128)(?:_?V\d)?", part):
            return int(match[1]) // 8
    return 4


class _Equation(NamedTuple):
    """Of one class and line; that of a caller has all that is called there."""

    kind: str
    line: str
    gives: dict[int, float]  # a run of each block
    total: float  # of a warp
    predicated: bool  # some instruction may run for no lane, which the emulator does not count
    lines: int  # how many say this


def _equations(blocks: list[Block], events: list[Event], warps: int) -> list[_Equation]:
    have: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        # ldmatrix is an event of its own, beside its loads
        if (found := _class_of_event(event)) and not _is_of_ldmatrix(event, events):
            for line in set(event.where):
                have[found[0], line] += found[1] * event.instructions / warps
    known = {line for event in events for line in event.where}
    give: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    predicated = set()
    for i, block in enumerate(blocks):
        for instruction in block:
            if found := _class_of(instruction):
                kind, amount = found
                lines = {line for line in instruction.where if (kind, line) in have}
                # One that the emulator knows by none of its lines never ran.
                for line in lines or {line for line in instruction.where if line not in known}:
                    give[kind, line][i] += amount
                    if instruction.predicate:
                        predicated.add((kind, line))
    equations: dict[Any, _Equation] = {}
    for (kind, line), gives in give.items():
        key = kind, tuple(sorted(gives.items()))
        same = equations.get(key)
        # Of lines that name the same instructions, one may be all that the compiler tells of several.
        total, count = max(have.get((kind, line), 0), same.total if same else 0), 1 + (same.lines if same else 0)
        equations[key] = _Equation(kind, line, dict(gives), total, (kind, line) in predicated, count)
    return list(equations.values())


def _is_of_ldmatrix(event: Event, events: list[Event]) -> bool:
    return event.name == "load" and any(e.name.startswith("ldmatrix") and e.where == event.where for e in events)


# ---- the linear programme


class _Programme:
    """Variables: the runs of each block, of each edge, and the errors of each equation, above and below."""

    def __init__(self, blocks: int, edges: list[_Edge], equations: list[_Equation]) -> None:
        self.blocks, self.edges, self.equations = blocks, edges, equations
        self.width = blocks + len(edges) + 2 * len(equations)
        self.cost = np.zeros(self.width)
        self.bounds: list[tuple[float, float | None]] = [(0, None)] * self.width
        self.equal: list[tuple[dict[int, float], float]] = []
        self.at_most: list[tuple[dict[int, float], float]] = []
        self._add_flow()
        self._add_equations()
        best = self._solve(self.cost)
        self.best = best @ self.cost
        weights = self.cost[-2 * len(equations) :] if equations else np.zeros(0)
        self.error = float(weights @ best[self.width - len(weights) :]) / max(1, len(equations))

    def _add_flow(self) -> None:
        into: dict[int, list[int]] = defaultdict(list)
        out: dict[int, list[int]] = defaultdict(list)
        for i, edge in enumerate(self.edges):
            at = self.blocks + i
            if edge.source < 0:
                self.bounds[at] = (1, 1)
            elif edge.is_call:
                self.equal.append(({at: 1, edge.source: -1}, 0))
            else:
                out[edge.source].append(at)
                self.at_most.append(({at: 1, edge.source: -1}, 0))
            if edge.target >= 0:
                into[edge.target].append(at)
                if not edge.is_call:
                    self.at_most.append(({at: 1, edge.target: -1}, 0))
        for block in range(self.blocks):
            for ways in (into[block], out[block]):
                # all come by some way and go by some; a warp may come by several at once
                self.at_most.append(({block: 1, **dict.fromkeys(ways, -1.0)}, 0))
                self.cost[block] -= DIVERGENCE
                self.cost[ways] += DIVERGENCE

    def _add_equations(self) -> None:
        first = self.blocks + len(self.edges)
        for i, equation in enumerate(self.equations):
            above, below = first + 2 * i, first + 2 * i + 1
            self.equal.append(({**equation.gives, above: -1, below: 1}, equation.total))
            weight = equation.lines / max(equation.total, max(equation.gives.values()))
            self.cost[above] = weight * (PREDICATED if equation.predicated else 1)
            self.cost[below] = weight

    def extremes(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks' runs with the least and the most instructions, of those that explain the counts as well."""
        self.at_most.append((dict(enumerate(self.cost)), self.best + SLACK * max(1, abs(self.best))))
        padded = np.zeros(self.width)
        padded[: self.blocks] = sizes
        least = self._solve(padded)
        for at, edge in enumerate(self.edges, self.blocks):
            if 0 <= edge.target <= edge.source:  # loops run no more often than in the least
                self.bounds[at] = (0, least[at] + SLACK)
        return least[: self.blocks], self._solve(-padded)[: self.blocks]

    def _solve(self, cost: np.ndarray) -> np.ndarray:
        equal, equal_to = self._matrix(self.equal)
        most, at_most = self._matrix(self.at_most)
        result = linprog(cost, most, at_most, equal, equal_to, self.bounds, method="highs")
        if not result.success:
            raise RuntimeError(f"the runs of the blocks: {result.message}")
        return result.x

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> tuple[coo_array, np.ndarray]:
        entries = [(value, i, j) for i, (row, _) in enumerate(rows) for j, value in row.items()]
        values, i, j = zip(*entries, strict=True) if entries else ((), (), ())
        return coo_array((values, (i, j)), (len(rows), self.width)), np.array([total for _, total in rows])
