"""Compare the operators on an NVIDIA GPU with torchvision's and with what the device could do at best.

Usage: python benchmarks/gpu.py [--quick] [--dry-run] [--folder benchmarks/results] [--commit HASH]

"device ms" is the device's own time, by CUDA events, with work queued ahead so that the host has no share in
it; "eager ms" is the wall-clock time of one of ten calls in a row, host included. The inputs rotate through
several sets, more than the L2 cache holds. The floor of a row is the longer of its compulsory bytes at the
speed of a large copy and of its matrix products' FLOPs at that of a large matmul of the same dtype (float32
without TF32), both measured in the same run; "% of best" is that floor by the device's time.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import PASSES, ROOT, DeformConv2d, Unavailable, commit, relative_error, table, write_json

import cudcn

Tensors = dict[str, Any]
Call = Callable[[Tensors, Any], Any]  # (tensors, grad_output) -> [output, *gradients]; some gradients are None
Contestant = Callable[[Any, str], Call]  # (case, pass) -> what to time

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
BATCH = 10  # calls queued behind one sleep of the device
SLEEP = 30_000_000  # cycles, some 17 ms: longer than the host needs to queue a batch
ROTATION = 192 << 20  # bytes of input sets to rotate through; an H100's L2 holds 50 MB
FIELDS = ("device ms", "eager ms", "x cudcn", "floor ms", "% of best", "error")

# ResNet-50's 3x3 convolutions at 224x224 (DCN deforms the last three stages), and the 256 channels of a
# detector's stride-8 pyramid level for two images of 800x1216.
CASES = [
    DeformConv2d(32, 64, 56, 56),
    DeformConv2d(32, 128, 28, 28),
    DeformConv2d(32, 256, 14, 14),
    DeformConv2d(32, 512, 7, 7),
    DeformConv2d(2, 256, 100, 152),
]
CHECKED = DeformConv2d(2, 64, 14, 15)
# The largest error accepted of cudcn, by the largest value. Sums are float32; the half types round the
# sampled values and the results, by 5e-4 and 4e-3 of each.
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the repeats")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and their work, touching no GPU")
    parser.add_argument("--folder", default=str(ROOT / "benchmarks" / "results"), help="where the JSON goes")
    parser.add_argument("--commit", help="the commit to name in it, where git cannot tell")
    options = parser.parse_args()
    if options.dry_run:
        print(dry_run())
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

    errors = {key: check(*key) for key in [(n, d, p) for d in DTYPES for p in PASSES for n in CONTESTANTS]}
    device = re.sub(r"\W+", "-", facts["device"].lower()).strip("-")
    path = Path(options.folder) / f"{device}-{facts['commit']}.json"
    checks = [{"name": n, "dtype": d, "pass": p, "error": error} for (n, d, p), error in errors.items()]
    results: list[dict[str, Any]] = []
    for case in CASES:
        for dtype in DTYPES:
            for which in PASSES:
                print(f"{case.operator} {case} {dtype} {which}", flush=True)
                results += measure(case, dtype, which, seconds, ceilings, errors)
        write_json(path, {**facts, "ceilings": ceilings, "checks": checks, "results": results})
    print(f"{report(results)}\n\n{summary(results)}\n\nWritten to {path}")
    return verdict(results, errors)


def dry_run() -> str:
    rows = []
    for case in CASES:
        for dtype, size in DTYPES.items():
            for which in PASSES:
                megabytes, gigaflops = case.bytes(which, size) / 1e6, case.flops(which) / 1e9
                rows.append([f"{case} {dtype} {which}", f"{megabytes:.1f}", f"{gigaflops:.1f}", str(rotations(case))])
    return table(["deform_conv2d, 3x3, mask, bias", "MB", "GFLOP", "input sets"], rows)


def rotations(case: Any) -> int:
    """How many sets of inputs to rotate through, the same number for every dtype."""
    return max(2, min(16, -(-ROTATION // case.bytes("forward", 2))))


def check(name: str, dtype: str, which: str) -> float | str:
    """The largest error of a contestant's output and gradients against float64, or why it has none."""
    import torch

    if name in FLOORS:
        return "not deformed"
    tensors, grad_output = CHECKED.tensors(), CHECKED.grad_output()
    on_device = {key: to_device(t, dtype) for key, t in tensors.items()}
    grad = to_device(grad_output, dtype)
    try:
        call = CONTESTANTS[name](CHECKED, which)
        got = [
            None if t is None else to_host(t)
            for t in call(prepare(name, on_device), prepare_one(name, "grad_output", grad))
        ]
        torch.cuda.synchronize()
    except Exception as refusal:  # a contestant's refusal is a result
        return reason(refusal)
    exact = [to_host(t).astype(np.float64) for t in on_device.values()]  # as rounded to the dtype
    expected = [cudcn.deform_conv2d(*exact, padding=CHECKED.padding)]
    if which != "forward":
        expected += cudcn.deform_conv2d_backward(to_host(grad).astype(np.float64), *exact, padding=CHECKED.padding)
    if name in CHANNELS_LAST:
        got = [t.transpose(0, 3, 1, 2) if i in (0, 1, 2, 5) else t for i, t in enumerate(got)]
    error = max(relative_error(a, b) for a, b in zip(got, expected, strict=True))
    print(f"{name} {dtype} {which}: largest error against float64 {error:.1e}", flush=True)
    return error


def measure(
    case: Any, dtype: str, which: str, seconds: float, ceilings: dict[str, float], errors: dict[Any, Any]
) -> list[dict[str, Any]]:
    """One row per contestant: they take turns, a batch of calls each."""
    import torch

    count, size = rotations(case), DTYPES[dtype]
    made = [{key: to_device(t, dtype) for key, t in case.tensors(seed).items()} for seed in range(min(count, 2))]
    made += [{key: t.clone() for key, t in made[i % 2].items()} for i in range(count - len(made))]
    grad_output = to_device(case.grad_output(), dtype)
    floor = max(
        case.bytes(which, size) / ceilings["copy TB/s"] / 1e9,
        case.flops(which) / ceilings[f"{dtype} TFLOP/s"] / 1e9,
    )
    base = {"operator": case.operator, "case": str(case), "dtype": dtype, "pass": which, "floor": floor}
    base |= {"bytes": case.bytes(which, size), "flops": case.flops(which)}
    rows, calls = {}, {}
    for name, contestant in CONTESTANTS.items():
        rows[name] = {**base, "name": name, "error": errors[name, dtype, which]}
        try:
            call = contestant(case, which)
            sets = [prepare(name, tensors) for tensors in made]
            grad = prepare_one(name, "grad_output", grad_output)
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
    for name in calls:
        rows[name] |= {
            "device": median(device[name]),
            "least": min(device[name]),
            "eager": median(eager[name]),
        }
        rows[name] |= {"calls": len(device[name])}
    return list(rows.values())


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
    """One line per case: the better layout of cudcn against torchvision and the floors."""
    lines = []
    for title, rows in grouped(results).items():
        times = {name: row["device"] for name, row in rows.items() if "device" in row}
        ours = min((times[name] for name in (OURS, OURS_LAST) if name in times), default=float("nan"))
        floors = min((times[name] for name in FLOORS if name in times), default=float("nan"))
        theirs = times.get("torchvision")
        faster = f"{theirs / ours:.2f}" if theirs else "refused"
        best = 100 * rows[OURS]["floor"] / ours
        lines.append([title, f"{ours:.3f}", faster, f"{ours / floors:.2f}", f"{best:.0f}"])
    return table(["", "cudcn ms", "torchvision / cudcn", "cudcn / plain convolution", "% of best"], lines)


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
    if row["name"] in FLOORS:
        return [*times[:3], "", "", ""]  # it neither reads offsets nor mask
    error = f"{row['error']:.1e}" if isinstance(row["error"], float) else row["error"][:40]
    return [*times, f"{100 * row['floor'] / row['device']:.0f}", error]


def verdict(results: list[dict[str, Any]], errors: dict[Any, Any]) -> int:
    """1, with a sentence each, if cudcn refused a case or was wrong."""
    problems = []
    for (name, dtype, which), error in errors.items():
        if name.startswith("cudcn") and not (isinstance(error, float) and error <= BOUNDS[dtype]):
            problems.append(f"{name} {dtype} {which}: error {error}, at most {BOUNDS[dtype]:.1e} is expected")
    for row in results:
        if row["name"].startswith("cudcn") and "refused" in row:
            problems.append(f"{row['name']} {row['case']} {row['dtype']} {row['pass']}: {row['refused']}")
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
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
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


# Carrying tensors to the contestants.


def reason(refusal: BaseException) -> str:
    lines = str(refusal).strip().splitlines() or [""]
    return f"{type(refusal).__name__}: {lines[0][:200]}"


def to_device(array: np.ndarray, dtype: str) -> Any:
    import torch

    return torch.from_numpy(array).to("cuda", getattr(torch, dtype))


def to_host(tensor: Any) -> np.ndarray:
    """float32 NumPy of a torch or CuPy array of at most that precision."""
    if hasattr(tensor, "get"):
        return tensor.get().astype(np.float32)
    return tensor.detach().float().cpu().numpy()


def prepare(name: str, tensors: Tensors) -> Tensors:
    """The tensors in the form that the contestant takes, made before the clock starts."""
    made = {key: prepare_one(name, key, t) for key, t in tensors.items()}
    return made if name == CUPY else {key: t.detach().requires_grad_() for key, t in made.items()}


def prepare_one(name: str, key: str, tensor: Any) -> Any:
    import torch

    if name == CUPY:
        return to_cupy(tensor)
    if name in CHANNELS_LAST and tensor.ndim == 4 and key != "weight":
        return tensor.permute(0, 2, 3, 1).contiguous()
    if name == FLOOR_LAST and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def to_cupy(tensor: Any) -> Any:
    """Without a copy; by way of int16 for bfloat16, which DLPack does not carry everywhere."""
    import cupy
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return cupy.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return cupy.from_dlpack(tensor)


# The contestants of deform_conv2d.


def with_autograd(which: str, call: Callable[..., Any], used: tuple[str, ...]) -> Call:
    import torch

    def forward(tensors: Tensors, grad_output: Any) -> list[Any]:
        with torch.no_grad():
            return [call(**{name: tensors[name] for name in used})]

    def both(tensors: Tensors, grad_output: Any) -> list[Any]:
        out = call(**{name: tensors[name] for name in used})
        return [out, *torch.autograd.grad(out, [tensors[name] for name in used], grad_output)]

    return forward if which == "forward" else both


ALL = ("input", "offset", "weight", "bias", "mask")


def ours(case: DeformConv2d, which: str) -> Call:
    return with_autograd(which, lambda **t: cudcn.deform_conv2d(**t, padding=case.padding), ALL)


def ours_last(case: DeformConv2d, which: str) -> Call:
    return with_autograd(which, lambda **t: cudcn.deform_conv2d(**t, padding=case.padding, layout="NHWC"), ALL)


def ours_cupy(case: DeformConv2d, which: str) -> Call:
    def forward(tensors: Tensors, grad_output: Any) -> list[Any]:
        return [cudcn.deform_conv2d(**tensors, padding=case.padding)]

    def both(tensors: Tensors, grad_output: Any) -> list[Any]:
        gradients = cudcn.deform_conv2d_backward(grad_output, **tensors, padding=case.padding)
        return [*forward(tensors, grad_output), *gradients]

    return forward if which == "forward" else both


def torchvision(case: DeformConv2d, which: str) -> Call:
    try:
        from torchvision.ops import deform_conv2d
    except ImportError:
        raise Unavailable("not installed") from None
    return with_autograd(which, lambda **t: deform_conv2d(**t, padding=case.padding), ALL)


def plain(case: DeformConv2d, which: str) -> Call:
    from torch.nn.functional import conv2d

    return with_autograd(which, lambda **t: conv2d(**t, padding=case.padding), ("input", "weight", "bias"))


OURS, OURS_LAST, CUPY = "cudcn (torch)", "cudcn (torch, NHWC)", "cudcn (CuPy)"
FLOOR, FLOOR_LAST = "plain convolution", "plain convolution, channels_last"
FLOORS, CHANNELS_LAST = (FLOOR, FLOOR_LAST), (OURS_LAST,)
CONTESTANTS: dict[str, Contestant] = {
    OURS: ours,
    OURS_LAST: ours_last,
    CUPY: ours_cupy,
    "torchvision": torchvision,  # it copies channels_last input to NCHW first, so it is given NCHW
    FLOOR: plain,
    FLOOR_LAST: plain,
}

if __name__ == "__main__":
    sys.exit(main())
