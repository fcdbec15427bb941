"""Compare the operators on an NVIDIA GPU with other libraries' and with what the device could do at best.

Usage: python benchmarks/gpu.py [--quick] [--only OPERATOR] [--dry-run] [--folder benchmarks/results] [--commit HASH]

"device ms" is the device's own time, by CUDA events, with work queued ahead so that the host has no share in
it; "eager ms" is the wall-clock time of one of ten calls in a row, host included. The inputs rotate through
several sets, more than the L2 cache holds. The floor of a row is the longer of its compulsory bytes at the
speed of a large copy and of its matrix products' FLOPs at that of a large matmul of the same dtype (float32
without TF32), both measured in the same run; "% of best" is that floor by the device's time. "peak MB" is the
most memory that a call holds at a time beyond its inputs, results included.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import peers
from cases import (
    Case,
    DCNv3,
    DCNv4,
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIPool,
    MSDeformAttn,
    PSRoIPool,
    RoIAvgPool,
)
from common import PASSES, ROOT, commit, relative_error, table, write_json

import cudcn

Tensors = dict[str, Any]
KEY = ("operator", "layout", "name", "dtype", "pass")
Errors = dict[tuple[str, ...], float | str]  # KEY -> the largest error, or why there is none
Call = Callable[[Tensors, Any], list[Any]]  # (tensors, grad_output) -> [output, *gradients]

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
BATCH = 10  # calls queued behind one sleep of the device
SLEEP = 30_000_000  # cycles, some 17 ms: longer than the host needs to queue a batch
ROTATION = 192 << 20  # bytes of input sets to rotate through; an H100's L2 holds 50 MB
FIELDS = ("device ms", "eager ms", "x cudcn", "floor ms", "% of best", "peak MB", "error")

# deform_conv2d: ResNet-50's 3x3 convolutions at 224x224 (DCN deforms the last three stages), and the 256 channels of a
# detector's stride-8 pyramid level for two images of 800x1216, whose stride-4 level the RoIs are pooled from.
# DCNv3 and DCNv4: the shapes of the DCNv4 paper. Attention: Deformable DETR's encoder at 800x1333. One of each
# once more with offsets that spread further, so that samples share fewer pixels.
CONVOLUTIONS = [
    (32, 64, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (2, 256, 100, 152),
]
AGGREGATES = [
    (64, 56, 56, 128, 4),
    (64, 28, 28, 256, 8),
    (64, 14, 14, 512, 16),
    (64, 7, 7, 1024, 32),
    (64, 14, 14, 768, 24),
]
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
FAR = 4.0  # pixels
CASES: list[Case] = [
    *(DeformConv2d(*size, layout=layout) for size in CONVOLUTIONS for layout in ("NCHW", "NHWC")),
    DeformConv2d(*CONVOLUTIONS[1], spread=FAR),
    RoIAvgPool(2, 256, 200, 304, rois=1000),
    DeformRoIPool(2, 256, 200, 304, rois=1000),
    PSRoIPool(2, 49 * 21, 50, 76, rois=300),
    DeformPSRoIPool(2, 49 * 21, 50, 76, rois=300),
    *(DCNv3(*size) for size in AGGREGATES),
    *(DCNv4(*size) for size in AGGREGATES),
    DCNv3(*AGGREGATES[0], spread=FAR),
    DCNv4(*AGGREGATES[0], spread=FAR),
    MSDeformAttn(2, LEVELS),
    MSDeformAttn(2, LEVELS, spread=FAR),
]
CHECKED: list[Case] = [
    DeformConv2d(2, 64, 14, 15),
    DeformConv2d(2, 64, 14, 15, layout="NHWC"),
    RoIAvgPool(2, 16, 40, 50, rois=20),
    DeformRoIPool(2, 16, 40, 50, rois=20),
    PSRoIPool(2, 49 * 3, 40, 50, rois=20),
    DeformPSRoIPool(2, 49 * 3, 40, 50, rois=20),
    DCNv3(2, 14, 15, 64, 4),
    DCNv4(2, 14, 15, 64, 4),
    MSDeformAttn(2, ((14, 15), (7, 8))),
]
# The largest error accepted of cudcn, by the largest value. Sums are float32; the half types round the
# sampled values and the results, by 5e-4 and 4e-3 of each.
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the repeats")
    parser.add_argument("--only", metavar="OPERATOR", choices=[case.operator for case in CASES])
    parser.add_argument("--dry-run", action="store_true", help="list the cases and their work, touching no GPU")
    parser.add_argument("--folder", default=str(ROOT / "benchmarks" / "results"), help="where the JSON goes")
    parser.add_argument("--commit", help="the commit to name in it, where git cannot tell")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only in (None, case.operator)]
    if options.dry_run:
        print(dry_run(chosen))
        return 0
    try:
        import torch
    except ImportError:
        print("benchmarks/gpu.py needs torch, CuPy and an NVIDIA GPU: torch is not installed.")
        return 1
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU: torch sees no CUDA device. --dry-run lists the cases.")
        return 1
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True

    facts = machine(options.commit or commit())
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    ceilings = measure_ceilings()
    print(", ".join(f"{name} {value:.3g}" for name, value in ceilings.items()), flush=True)
    seconds = 0.5 if options.quick else 2.0

    checked = [case for case in CHECKED if options.only in (None, case.operator)]
    errors: Errors = {}
    for case in checked:
        for dtype in DTYPES:
            for which in PASSES:
                errors |= check(case, dtype, which)
    device = re.sub(r"\W+", "-", facts["device"].lower()).strip("-")
    path = Path(options.folder) / f"{device}-{facts['commit']}.json"
    checks = [dict(zip((*KEY, "error"), (*key, error), strict=True)) for key, error in errors.items()]
    results: list[dict[str, Any]] = []
    for case in chosen:
        for dtype in DTYPES:
            for which in PASSES:
                print(f"{case.operator} {case} {dtype} {which}", flush=True)
                results += measure(case, dtype, which, seconds, ceilings, errors)
        write_json(path, {**facts, "ceilings": ceilings, "checks": checks, "results": results})
    print(f"{report(results)}\n\n{summary(results)}\n\nWritten to {path}")
    return verdict(results, errors)


def dry_run(cases: list[Case]) -> str:
    rows = []
    for case in cases:
        for dtype, size in DTYPES.items():
            for which in PASSES:
                megabytes, gigaflops = case.bytes(which, size) / 1e6, case.flops(which) / 1e9
                name = f"{case.operator} {case} {dtype} {which}"
                rows.append([name, f"{megabytes:.1f}", f"{gigaflops:.1f}", str(rotations(case))])
    return table(["", "MB", "GFLOP", "input sets"], rows)


def rotations(case: Case) -> int:
    """How many sets of inputs to rotate through, the same number for every dtype."""
    return max(2, min(16, -(-ROTATION // case.bytes("forward", 2))))


def check(case: Case, dtype: str, which: str) -> Errors:
    """The largest error of each exact contestant's output and gradients against float64."""
    import torch

    given = peers.leaves(case, {name: to_device(t, dtype) for name, t in case.tensors().items()})
    grad_output = to_device(case.grad_output(), dtype)
    exact = {name: to_host(t) for name, t in given.items()}  # as rounded to the dtype
    expected = peers.run_arrays(case, which, exact, to_host(grad_output))
    errors: Errors = {}
    for name, contestant in contestants(case, which).items():
        if not contestant.exact:
            continue
        try:
            tensors = {key: contestant.carry(t) for key, t in given.items()}
            got = [to_host(t) for t in contestant.call(tensors, contestant.carry(grad_output))]
            torch.cuda.synchronize()
            error: float | str = max(relative_error(a, b) for a, b in zip(got, expected, strict=True))
        except Exception as refusal:  # a contestant's refusal is a result
            error = reason(refusal)
        errors[key(case, name, dtype, which)] = error
        print(f"{case.operator} {name} {dtype} {which}: largest error against float64 {error}", flush=True)
    return errors


def key(case: Case, name: str, dtype: str, which: str) -> tuple[str, ...]:
    return case.operator, case.attributes.get("layout", ""), name, dtype, which


def measure(
    case: Case, dtype: str, which: str, seconds: float, ceilings: dict[str, float], errors: Errors
) -> list[dict[str, Any]]:
    """One row per contestant: they take turns, a batch of calls each."""
    import torch

    count, size = rotations(case), DTYPES[dtype]
    made = [{key: to_device(t, dtype) for key, t in host_tensors(case, seed).items()} for seed in range(min(count, 2))]
    made += [{key: t.clone() for key, t in made[i % 2].items()} for i in range(count - len(made))]
    made = [peers.leaves(case, tensors) for tensors in made]
    grad_output = to_device(case.grad_output(), dtype)
    floor = max(
        case.bytes(which, size) / ceilings["copy TB/s"] / 1e9,
        case.flops(which) / ceilings[f"{dtype} TFLOP/s"] / 1e9,
    )
    base = {"operator": case.operator, "case": str(case), "dtype": dtype, "pass": which, "floor": floor}
    base |= {"bytes": case.bytes(which, size), "flops": case.flops(which)}
    rows, calls = {}, {}
    for name, (carry, call, _) in contestants(case, which).items():
        rows[name] = {**base, "name": name, "error": errors.get(key(case, name, dtype, which))}
        try:
            sets = [{key: carry(t) for key, t in tensors.items()} for tensors in made]
            grad = carry(grad_output)
            for tensors in sets[:3] * 2:  # warm-up: compiles, picks algorithms, fills allocators
                call(tensors, grad)
            torch.cuda.synchronize()
            calls[name] = (call, sets, grad)
        except Exception as refusal:  # a contestant's refusal is a result
            rows[name]["refused"] = reason(refusal)
    device: dict[str, list[float]] = {name: [] for name in calls}
    eager: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while calls and (rounds < 3 or time.perf_counter() < end):
        for name, (call, sets, grad) in calls.items():
            turn = [sets[(rounds * BATCH + i) % count] for i in range(BATCH)]
            device[name] += device_times(call, turn, grad)
            eager[name].append(eager_time(call, turn, grad))
        rounds += 1
    for name, (call, sets, grad) in calls.items():
        rows[name] |= {
            "peak": peak_bytes(call, sets[0], grad),
            "device": median(device[name]),
            "least": min(device[name]),
            "eager": median(eager[name]),
        }
        rows[name] |= {"calls": len(device[name])}
    return list(rows.values())


@functools.lru_cache(maxsize=2)
def host_tensors(case: Case, seed: int) -> dict[str, np.ndarray]:
    return case.tensors(seed)


def device_times(call: Call, turn: list[Tensors], grad: Any) -> list[float]:
    """Milliseconds between events around each call, queued while the device sleeps."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turn) + 1)]
    torch.cuda._sleep(SLEEP)
    events[0].record()
    for tensors, event in zip(turn, events[1:], strict=True):
        call(tensors, grad)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairwise(events)]


def peak_bytes(call: Call, tensors: Tensors, grad: Any) -> int:
    """The most that one call has allocated at a time, of torch's memory and of CuPy's."""
    import torch

    with of_cupy() as held:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(tensors, grad)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + held.peak


def of_cupy() -> Any:
    """A hook that follows the memory of CuPy's pool; not of torch's, which the torch adapter makes CuPy take."""
    import cupy

    class Held(cupy.cuda.memory_hook.MemoryHook):
        now = peak = 0

        def malloc_postprocess(self, **given: Any) -> None:
            self.now += given["mem_size"]
            self.peak = max(self.peak, self.now)

        def free_postprocess(self, **given: Any) -> None:
            self.now -= given["mem_size"]

    return Held()


def eager_time(call: Call, turn: list[Tensors], grad: Any) -> float:
    """Wall-clock milliseconds per call of one batch."""
    import torch

    start = time.perf_counter()
    for tensors in turn:
        call(tensors, grad)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / len(turn)


def measure_ceilings() -> dict[str, float]:
    """The speed of a large copy, bytes read plus written, and of a large matmul of each dtype."""
    import torch

    large = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    copies = device_times(lambda tensors, grad: large[0].copy_(large[1]), [{}] * 20, None)
    ceilings = {"copy TB/s": large.numel() / median(copies) / 1e9}
    for dtype in DTYPES:
        side = 4096 if dtype == "float32" else 8192
        a, b = (torch.randn(side, side, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        a @ b
        products = device_times(lambda tensors, grad, a=a, b=b: a @ b, [{}] * 20, None)
        ceilings[f"{dtype} TFLOP/s"] = 2 * side**3 / median(products) / 1e9
    return ceilings


def report(results: list[dict[str, Any]]) -> str:
    parts = []
    for title, rows in grouped(results).items():
        ours = rows[OURS].get("device")
        parts.append(table([title, *FIELDS], [[name, *cells(row, ours)] for name, row in rows.items()]))
    return "\n\n".join(parts)


def summary(results: list[dict[str, Any]]) -> str:
    """One line per case: cudcn against each of the others and the floor."""
    lines = []
    for title, rows in grouped(results).items():
        ours = rows[OURS].get("device", float("nan"))
        others = {n: row["device"] for n, row in rows.items() if "device" in row and not n.startswith("cudcn")}
        ratios = ", ".join(f"{name} {time / ours:.2f}" for name, time in others.items())
        lines.append([title, f"{ours:.3f}", f"{100 * rows[OURS]['floor'] / ours:.0f}", ratios])
    return table(["", "cudcn ms", "% of best", "others' time by cudcn's"], lines)


def grouped(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Title of the comparison -> contestant -> row."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results:
        title = f"{row['operator']} {row['case']} {row['dtype']} {row['pass']}"
        groups.setdefault(title, {})[row["name"]] = row
    return groups


def cells(row: dict[str, Any], ours: float | None) -> list[str]:
    if "refused" in row:
        return [f"refused: {row['refused'][:60]}", *[""] * (len(FIELDS) - 1)]
    ratio = f"{row['device'] / ours:.2f}" if ours else ""
    times = [f"{row['device']:.3f}", f"{row['eager']:.3f}", ratio, f"{row['floor']:.3f}"]
    error = row["error"]
    peak = f"{row['peak'] / 1e6:.1f}"
    if error is None:
        return [*times[:3], "", "", peak, "another operator"]
    error = f"{error:.1e}" if isinstance(error, float) else error[:40]
    return [*times, f"{100 * row['floor'] / row['device']:.0f}", peak, error]


def verdict(results: list[dict[str, Any]], errors: Errors) -> int:
    """1, with a sentence each, if cudcn refused a case or was wrong."""
    problems = []
    for (operator, layout, name, dtype, which), error in errors.items():
        if name.startswith("cudcn") and not (isinstance(error, float) and error <= BOUNDS[dtype]):
            what = " ".join((operator, layout, name, dtype, which))
            problems.append(f"{what}: error {error}, at most {BOUNDS[dtype]:.1e} is expected")
    for row in results:
        if row["name"].startswith("cudcn") and "refused" in row:
            problems.append(
                f"{row['operator']} {row['name']} {row['case']} {row['dtype']} {row['pass']}: {row['refused']}"
            )
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def machine(commit: str) -> dict[str, str]:
    import torch

    facts = {
        "device": torch.cuda.get_device_name(),
        "driver": nvidia_smi("driver_version"),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "cudcn": cudcn.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
    for name in ("torchvision", "cupy"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError:
            facts[name] = "not installed"
    return facts


def nvidia_smi(field: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class Contestant(NamedTuple):
    carry: Callable[[Any], Any]  # one of torch's tensors to where it is used, before the clock starts
    call: Call
    exact: bool = True


def contestants(case: Case, which: str) -> dict[str, Contestant]:
    found = {
        OURS: Contestant(as_it_is, functools.partial(peers.run_torch, peers.ours, case, which)),
        CUPY: Contestant(to_cupy, functools.partial(peers.run_arrays, case, which)),
    }
    for name, peer in peers.PEERS[case.operator].items():
        found[name] = Contestant(as_it_is, functools.partial(peers.run_torch, peer.call, case, which), peer.exact)
    return found


def as_it_is(tensor: Any) -> Any:
    return tensor


OURS, CUPY = "cudcn (torch)", "cudcn (CuPy)"


# Carrying tensors


def reason(refusal: BaseException) -> str:
    lines = str(refusal).strip().splitlines() or [""]
    return f"{type(refusal).__name__}: {lines[0][:200]}"


def to_device(array: np.ndarray, dtype: str) -> Any:
    import torch

    return torch.from_numpy(array).to("cuda", getattr(torch, dtype) if array.dtype.kind == "f" else None)


def to_host(tensor: Any) -> np.ndarray:
    """float64, or integers, of a torch or CuPy array."""
    array = tensor.get() if hasattr(tensor, "get") else tensor.detach().cpu()
    if hasattr(array, "numpy"):
        array = (array.double() if array.is_floating_point() else array).numpy()
    return array if array.dtype.kind in "iu" else array.astype(np.float64)


def to_cupy(tensor: Any) -> Any:
    """Without a copy; by way of int16 for bfloat16, which DLPack does not carry everywhere."""
    import cupy
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return cupy.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return cupy.from_dlpack(tensor)


if __name__ == "__main__":
    sys.exit(main())
