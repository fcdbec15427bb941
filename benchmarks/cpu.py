"""Compare the operators on the CPU with other libraries', and see how the time grows with size.

Usage: python benchmarks/cpu.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from common import PASSES, DeformConv2d, Unavailable, commit, interleaved, relative_error, table, write_json

import cudcn
from cudcn.cpu.parallel import threads

Runs = dict[str, Callable[[], Any]]  # pass -> a call that runs it
Contestant = Callable[[Any], Runs]

MODULES = ("numpy", "scipy", "torch", "torchvision", "onnxruntime", "openvino")
BOUND = 1e-4  # float32 sums of up to 6272 products, in each library's own order; a wrong rule gives 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes, under 20 s")
    parser.add_argument("--json", metavar="FILE", help="write all times there too")
    options = parser.parse_args()
    seconds = 1.5 if options.quick else 5.0

    facts = machine()
    print(f"cudcn {cudcn.__version__}, commit {facts['commit']}; " + ", ".join(facts["versions"]))
    print(f"{facts['processor']}, {facts['threads']} threads for each library, taking turns call by call\n")
    results = []
    for case, contestants in COMPARED:
        for which in PASSES:
            rows = compare(case, which, contestants, seconds)
            results += rows
            print(f"{case.operator} {case}, 3x3, mask, float32: {which}\n\n{comparison(rows)}\n")
    for title, cases in growth(options.quick):
        rows = [row for case in cases for row in compare(case, "forward", GROWING, seconds / 4)]
        results += rows
        print(f"How the forward pass grows with {title}\n\n{growth_table(rows)}\n")
    if options.json:
        write_json(options.json, {**facts, "results": results})


def compare(case: Any, which: str, contestants: dict[str, Contestant], seconds: float) -> list[dict[str, Any]]:
    """One row per contestant, after a check that all compute the same as the first."""
    runs: Runs = {}
    reasons = {}
    for name, contestant in contestants.items():
        try:
            prepared = contestant(case)
            if which in prepared:
                runs[name] = prepared[which]
        except Unavailable as reason:
            reasons[name] = str(reason)
    outputs = {name: run() for name, run in runs.items()}
    first = next(iter(outputs.values()))
    for name, output in outputs.items():
        if name != FLOOR:
            for got, expected in zip(output, first, strict=True):
                error = relative_error(got, expected)
                if not error <= BOUND:
                    raise SystemExit(f"{case}, {which}: {name} differs from cudcn by {error:.1e}, not timed")
    times = interleaved(runs, seconds)
    ours = median(next(iter(times.values())))
    base = {"operator": case.operator, "case": str(case), "pass": which, "pixels": case.height * case.width}
    base |= {"batch": case.batch, "channels": case.channels}
    rows = [
        {
            **base,
            "name": name,
            "median": median(t),
            "least": min(t),
            "ratio": median(t) / ours,
            "rounds": len(t),
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
            str(row["rounds"]),
        ]

    return table(["", "median ms", "least ms", "median / cudcn's", "rounds"], list(map(cells, rows)))


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Linear growth shows as the same number all the way down the column per work."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["name"]: row for row in rows if row["case"] == case and "median" in row}
        line = [case]
        for name in names:
            row = found.get(name)
            work = row and row["batch"] * row["channels"] * row["pixels"] / 1e6
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
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
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


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable("not installed") from None


# deform_conv2d: each contestant returns its passes; a pass returns (output, *gradients) as NumPy arrays.


def ours(case: DeformConv2d) -> Runs:
    tensors, grad_output = list(case.tensors().values()), case.grad_output()

    def forward() -> list[np.ndarray]:
        return [cudcn.deform_conv2d(*tensors, padding=case.padding)]

    def both() -> list[np.ndarray]:
        return [*forward(), *cudcn.deform_conv2d_backward(grad_output, *tensors, padding=case.padding)]

    return {"forward": forward, "forward+backward": both}


def ours_torch(case: DeformConv2d) -> Runs:
    return with_autograd(case, lambda *tensors: cudcn.deform_conv2d(*tensors, padding=case.padding))


def torchvision(case: DeformConv2d) -> Runs:
    ops = module("torchvision.ops")

    def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
        return ops.deform_conv2d(input, offset, weight, bias, padding=case.padding, mask=mask)

    return with_autograd(case, call)


def plain(case: DeformConv2d) -> Runs:
    torch = module("torch")

    def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
        return torch.nn.functional.conv2d(input, weight, bias, padding=case.padding)

    return with_autograd(case, call)


def with_autograd(case: DeformConv2d, call: Callable[..., Any]) -> Runs:
    torch = module("torch")
    torch.set_num_threads(threads())
    tensors = [torch.from_numpy(t) for t in case.tensors().values()]
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad_output = torch.from_numpy(case.grad_output())

    def forward() -> list[np.ndarray]:
        with torch.no_grad():
            return [call(*tensors).numpy()]

    def both() -> list[np.ndarray]:
        for leaf in leaves:
            leaf.grad = None
        out = call(*leaves)
        out.backward(grad_output)
        return [t.detach().numpy() for t in (out, *(leaf.grad for leaf in leaves)) if t is not None]

    return {"forward": forward, "forward+backward": both}


def onnx_runtime(case: DeformConv2d) -> Runs:
    onnx, runtime = module("onnx"), module("onnxruntime")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    order = ["input", "weight", "offset", "bias", "mask"]  # the standard's X, W, offset, B, mask
    node = helper.make_node("DeformConv", order, ["output"], pads=[case.padding] * 4)
    inputs = [helper.make_tensor_value_info(name, real, case.shapes[name]) for name in order]
    output = helper.make_tensor_value_info("output", real, case.output)
    graph = helper.make_graph([node], "deform_conv", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    feeds = case.tensors()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads()
    # Its idle threads would otherwise spin on into the next contestant's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {"forward": lambda: session.run(None, feeds)}


def openvino(case: DeformConv2d) -> Runs:
    ov, ops = module("openvino"), module("openvino.opset8")
    nodes = {name: ops.parameter(shape, np.float32, name=name) for name, shape in case.shapes.items()}
    one, pad = [1, 1], [case.padding] * 2
    product = ops.deformable_convolution(
        nodes["input"], nodes["offset"], nodes["weight"], one, pad, pad, one,
        mask=nodes["mask"], bilinear_interpolation_pad=True,
    )  # fmt: skip
    bias = ops.reshape(nodes["bias"], [1, case.channels, 1, 1], False)
    model = ov.Model([ops.add(product, bias)], list(nodes.values()), "deform_conv")
    config = {
        "INFERENCE_NUM_THREADS": threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.compile_model(model, "CPU", config).create_infer_request()
    feeds = list(case.tensors().values())
    return {"forward": lambda: [request.infer(feeds, share_inputs=True, share_outputs=True)[0]]}


FLOOR = "plain convolution (torch)"
GROWING: dict[str, Contestant] = {"cudcn": ours, "ONNX Runtime": onnx_runtime}
COMPARED: list[tuple[Any, dict[str, Contestant]]] = [
    (
        DeformConv2d(2, 64, 56, 56),
        {
            "cudcn": ours,
            "cudcn (torch)": ours_torch,
            "ONNX Runtime": onnx_runtime,
            "OpenVINO": openvino,
            "torchvision": torchvision,
            FLOOR: plain,
        },
    ),
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
