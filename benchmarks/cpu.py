"""Compare the operators on the CPU with other libraries', and see how the time grows with size.

Usage: python benchmarks/cpu.py [--quick] [--only OPERATOR] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

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
    RoIPooling,
)
from common import PASSES, commit, interleaved, relative_error, table, write_json
from peers import Unavailable, module

import cudcn
from cudcn.cpu.parallel import threads

Runs = dict[str, Callable[[], list[np.ndarray]]]  # pass -> a call that returns (output, *gradients)
Contestant = Callable[[Any], Runs]

MODULES = ("numpy", "scipy", "torch", "torchvision", "onnxruntime", "openvino")
BOUND = 1e-4  # float32 sums of up to 6272 products, in each library's own order; a wrong rule gives 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--only", metavar="OPERATOR", choices=[case.operator for case in CASES])
    parser.add_argument("--json", metavar="FILE", help="write all times there too")
    options = parser.parse_args()
    seconds = 1.5 if options.quick else 8.0

    facts = machine()
    print(f"cudcn {cudcn.__version__}, commit {facts['commit']}; " + ", ".join(facts["versions"]))
    print(f"{facts['processor']}, {facts['threads']} threads for each library, taking turns\n")
    results = []
    for case in CASES:
        if options.only in (None, case.operator):
            for which in PASSES:
                rows = compare(case, which, contestants(case), seconds)
                results += rows
                print(f"{case.operator} {case}, float32: {which}\n\n{comparison(rows)}\n")
    for title, cases in growth(options.quick) if options.only in (None, "deform_conv2d") else ():
        rows = [row for case in cases for row in compare(case, "forward", GROWING, seconds / 4)]
        results += rows
        print(f"How the forward pass grows with {title}\n\n{growth_table(rows)}\n")
    if options.json:
        write_json(options.json, {**facts, "results": results})


def compare(case: Case, which: str, contestants: dict[str, Contestant], seconds: float) -> list[dict[str, Any]]:
    """One row per contestant, after a check that the exact ones compute the same as the first."""
    runs: Runs = {}
    outputs: dict[str, list[np.ndarray]] = {}
    reasons: dict[str, str] = {}
    for name, contestant in contestants.items():
        try:
            prepared = contestant(case)
            if which in prepared:
                outputs[name] = prepared[which]()
                runs[name] = prepared[which]
        except Unavailable as reason:
            reasons[name] = str(reason)
    first = next(iter(outputs.values()))
    for name, output in outputs.items():
        if name not in peers.PEERS[case.operator] or peers.PEERS[case.operator][name].exact:
            for got, expected in zip(output, first, strict=True):
                error = relative_error(got, expected)
                if not error <= BOUND:
                    raise SystemExit(f"{case}, {which}: {name} differs from cudcn by {error:.1e}, not timed")
    times = interleaved(runs, seconds)
    ours = median(next(iter(times.values())))
    values = math.prod(next(iter(case.specs.values())).shape)
    base = {"operator": case.operator, "case": str(case), "pass": which, "input values": values}
    rows = [
        {
            **base,
            "name": name,
            "median": median(t),
            "least": min(t),
            "ratio": median(t) / ours,
            "calls": len(t),
        }
        for name, t in times.items()
    ]
    return rows + [{**base, "name": name, "reason": reason} for name, reason in reasons.items()]


def comparison(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        if "reason" in row:
            return [row["name"], row["reason"], "", "", ""]
        return [
            row["name"],
            f"{row['median']:.2f}",
            f"{row['least']:.2f}",
            f"{row['ratio']:.2f}",
            str(row["calls"]),
        ]

    return table(["", "median ms", "least ms", "median / cudcn's", "calls"], list(map(cells, rows)))


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Linear growth shows as the same number all the way down the column per work."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["name"]: row for row in rows if row["case"] == case and "median" in row}
        line = [case]
        for name in names:
            row = found.get(name)
            work = row and row["input values"] / 1e6
            line += [f"{row['median']:.2f}", f"{row['median'] / work:.1f}"] if row else ["", ""]
        lines.append(line)
    header = [text for name in names for text in (f"{name}: ms", "ms per million input values")]
    return table(["N x C x H x W", *header], lines)


def machine() -> dict[str, Any]:
    versions = []
    for name in MODULES:
        try:
            versions.append(f"{name} {importlib.import_module(name).__version__}")
        except ImportError:
            versions.append(f"{name} not installed")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "threads": threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {threads()} cores usable"


# The contestants


def contestants(case: Case) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {"cudcn": ours, "cudcn (torch)": by_torch(peers.ours)}
    found |= ENGINES.get(case.operator, {})
    return found | {name: by_torch(peer.call) for name, peer in peers.PEERS[case.operator].items()}


def ours(case: Case) -> Runs:
    tensors, grad_output = case.tensors(), case.grad_output()
    return {which: partial(peers.run_arrays, case, which, tensors, grad_output) for which in PASSES}


def by_torch(call: Callable[..., Any]) -> Contestant:
    def contestant(case: Case) -> Runs:
        torch = module("torch")
        torch.set_num_threads(threads())
        tensors = peers.leaves(case, {name: torch.from_numpy(t) for name, t in case.tensors().items()})
        grad_output = torch.from_numpy(case.grad_output())

        def run(which: str) -> list[np.ndarray]:
            return [t.detach().numpy() for t in peers.run_torch(call, case, which, tensors, grad_output)]

        return {which: partial(run, which) for which in PASSES}

    return contestant


def onnx_runtime(case: Case, kind: str, feeds: dict[str, np.ndarray], order: Sequence[str], **attributes: Any) -> Runs:
    """The forward pass of one ONNX operator, its inputs in the standard's order."""
    onnx, runtime = module("onnx"), module("onnxruntime")
    helper = onnx.helper
    types = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, types[feeds[name].dtype.kind], feeds[name].shape) for name in order]
    output = helper.make_tensor_value_info("output", types["f"], case.output)
    node = helper.make_node(kind, order, ["output"], **attributes)
    graph = helper.make_graph([node], kind, inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads()
    # Its idle threads would otherwise spin on into the next contestant's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {"forward": lambda: session.run(None, feeds)}


def onnx_deform_conv(case: DeformConv2d) -> Runs:
    order = ["input", "weight", "offset", "bias", "mask"]
    return onnx_runtime(case, "DeformConv", case.tensors(), order, pads=[case.kernel // 2] * 4)


def openvino(case: Case, build: Callable[[Any, dict[str, Any]], Any]) -> Runs:
    """The forward pass of what `build` makes of OpenVINO's opset and one parameter node per tensor."""
    ov, ops = module("openvino"), module("openvino.opset8")
    tensors = case.tensors()
    nodes = {name: ops.parameter(t.shape, np.float32, name=name) for name, t in tensors.items()}
    model = ov.Model([build(ops, nodes)], list(nodes.values()), case.operator)
    config = {
        "INFERENCE_NUM_THREADS": threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.compile_model(model, "CPU", config).create_infer_request()
    feeds = list(tensors.values())
    return {"forward": lambda: [request.infer(feeds, share_inputs=True, share_outputs=True)[0]]}


def openvino_deform_conv(case: DeformConv2d) -> Runs:
    one, pad = [1, 1], [case.kernel // 2] * 2

    def build(ops: Any, nodes: dict[str, Any]) -> Any:
        product = ops.deformable_convolution(
            nodes["input"], nodes["offset"], nodes["weight"], one, pad, pad, one,
            mask=nodes["mask"], bilinear_interpolation_pad=True,
        )  # fmt: skip
        return ops.add(product, ops.reshape(nodes["bias"], [1, case.channels, 1, 1], False))

    return openvino(case, build)


def openvino_psroi(case: RoIPooling) -> Runs:
    def build(ops: Any, nodes: dict[str, Any]) -> Any:
        classes = case.channels // case.bins**2
        return ops.psroi_pooling(nodes["input"], nodes["rois"], classes, case.bins, case.SCALE, 1, 1, "average")

    return openvino(case, build)


def openvino_deform_psroi(case: DeformPSRoIPool) -> Runs:
    def build(ops: Any, nodes: dict[str, Any]) -> Any:
        return ops.deformable_psroi_pooling(
            nodes["input"], nodes["rois"], case.channels // case.bins**2, case.SCALE, case.bins,
            "bilinear_deformable", 4, 4, 0.1, case.bins, offsets=nodes["offset"],
        )  # fmt: skip

    return openvino(case, build)


ENGINES: dict[str, dict[str, Contestant]] = {
    "deform_conv2d": {"ONNX Runtime": onnx_deform_conv, "OpenVINO": openvino_deform_conv},
    "psroi_pool": {"OpenVINO": openvino_psroi},
    "deform_psroi_pool": {"OpenVINO": openvino_deform_psroi},
}
GROWING: dict[str, Contestant] = {"cudcn": ours, "ONNX Runtime": onnx_deform_conv}
PYRAMID = ((50, 68), (25, 34), (13, 17), (7, 9))  # strides 8 to 64 of 400x544
CASES: list[Case] = [
    DeformConv2d(2, 64, 56, 56),
    RoIAvgPool(1, 64, 100, 152, rois=100),
    PSRoIPool(1, 49 * 8, 50, 76, rois=100),
    DeformRoIPool(1, 64, 100, 152, rois=100),
    DeformPSRoIPool(1, 49 * 8, 50, 76, rois=100),
    DCNv3(2, 56, 56, 128, group=4),
    DCNv4(2, 56, 56, 128, group=4),
    MSDeformAttn(1, PYRAMID),
]


def growth(quick: bool) -> Iterator[tuple[str, list[DeformConv2d]]]:
    base = DeformConv2d(2, 64, 56, 56)
    channels, sides, batches = (
        ((16, 64, 256), (28, 56, 112), (1, 8)) if quick else ((16, 32, 64, 128, 256), (28, 56, 112), (1, 2, 4, 8))
    )
    yield (
        "channels (in and out: the product grows with their square)",
        [replace(base, channels=c) for c in channels],
    )
    yield "pixels", [replace(base, height=s, width=s) for s in sides]
    yield "batch", [replace(base, batch=n) for n in batches]


if __name__ == "__main__":
    main()
