"""What the CPU path costs: bits that do not depend on the threads, bounded memory, no warnings."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases.aggregate import Attention, DCNv3, DCNv4
from cases.case import Case, Tensors
from cases.deform_conv2d import DeformConv2d
from cases.pooling import DeformPSRoIPool, DeformRoIPool, PSRoIPool, RoIAvgPool

import cudcn

NAN, INF = np.nan, np.inf
_ROIS: dict[str, Any] = {"size": (90, 100), "rois": 300, "channels": 40, "spatial_scale": 0.25}
LARGE: list[Case] = [
    DeformConv2d("large", batch=1, channels=32, size=(120, 110), out_channels=8, groups=2, offset_groups=2),
    DeformConv2d("large", batch=3, channels=16, size=(60, 61), out_channels=5, mask=False, layout="NHWC"),
    DCNv3("large", batch=1, channels=32, size=(100, 90), group=4),
    DCNv4("large", batch=3, channels=24, size=(60, 61), group=2, softmax=True),
    Attention("large", batch=2, queries=2000, heads=4, channels=16, sizes=((40, 50), (20, 25), (3, 4)), points=4),
    RoIAvgPool("large", **_ROIS),
    PSRoIPool("large", **_ROIS),
    DeformRoIPool("large", **_ROIS),
    DeformRoIPool("large", **_ROIS, sampling_ratio=0),
    DeformPSRoIPool("large", **_ROIS),
]
every_large_case = pytest.mark.parametrize("case", LARGE, ids=str)


@every_large_case
def test_bits_do_not_depend_on_the_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the run."""
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    results = []
    for threads in ("1", "2", "7", "7"):
        monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
        results.append({"out": case.forward(tensors), **case.backward(tensors, grad_output)})
    for name, first in results[0].items():
        assert all(first is None or np.array_equal(first, other[name]) for other in results[1:]), name


@dataclass(frozen=True)
class Overlapping(Attention):
    """All levels begin at the first pixel."""

    def values(self, random: np.random.Generator) -> Tensors:
        values = super().values(random)
        return {
            **values,
            "value": values["value"][:, : max(math.prod(size) for size in self.sizes)],
            "level_start_index": np.zeros_like(values["level_start_index"]),
        }


MEMORY = [
    DeformConv2d("near", 1, 32, (200, 300), 32),
    DeformConv2d("far", 1, 64, (160, 160), 64, reach=80),
    DeformConv2d("few channels", 1, 3, (400, 500), 8, reach=30),
    DeformConv2d("many images", 40, 16, (30, 30), 16, layout="NHWC"),
    DCNv3("near", 1, 64, (160, 160), group=4),
    DCNv3("far", 1, 64, (160, 160), group=4, reach=80),
    DeformConv2d("many results", 1, 4, (80, 80), 4096),
    DeformConv2d("large weights", 1, 1024, (16, 16), 1024),
    DeformConv2d("large kernel", 1, 512, (20, 20), 4, (11, 11), padding=5),
    DeformConv2d("many offset groups", 1, 128, (32, 32), 4, offset_groups=128),
    Attention("far", 1, 6000, 8, 32, ((80, 120), (40, 60), (20, 30), (10, 15)), 4),
    Attention("a large query", 1, 1, 1, 16, ((50, 50),), 1_000_000, softmax=True),
    DCNv3("many groups", 1, 40000, (4, 4), group=20000),
    PSRoIPool("whole images", 1, 1, (256, 256), 300, 7, 1.0, group_size=7, whole=True),
    RoIAvgPool("one large bin", 1, 1, (2048, 2048), 1, 1, 1.0, whole=True),
    RoIAvgPool("many bins", 1, 1, (8, 8), 10_000, 7, 1.0, whole=True),
    DeformRoIPool("whole images", 1, 16, (200, 200), 100, 7, 1.0, whole=True, mask=False),
    DeformPSRoIPool("whole images", 1, 1, (64, 64), 300, 7, 1.0, group_size=7, whole=True, mask=False),
    DeformPSRoIPool("many parts", 1, 4, (64, 64), 300, 1, 1.0, part_size=200, whole=True, mask=False),
    Overlapping("overlapping levels", 1, 500, 1, 2, ((512, 512),) * 32, 4),
]


@pytest.mark.parametrize("threads", ["1", "32"])
@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_memory_is_bounded(case: Case, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB beyond one image in float32, the weights, and the gradients of both; the weights' is summed in float64."""
    monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
    tensors, grad_output = case.tensors("float32"), case.grad_output("float32")
    image = next(iter(tensors.values()))
    bound = 2 * image[0].nbytes + (64 << 20)
    if "weight" in tensors:
        bound += 3 * tensors["weight"].nbytes
    for call in (lambda: case.forward(tensors), lambda: case.backward(tensors, grad_output)):
        assert scratch_memory(call) <= bound


def test_memory_of_views_is_bounded() -> None:
    """16 images whose rows do not follow one another."""
    image, offset, mask, grad_output = (np.ones((16, n, 200, 203), np.float32)[..., :-3] for n in (4, 18, 9, 1))
    tensors = image, offset, np.ones((1, 4, 3, 3), np.float32), None, mask
    assert scratch_memory(lambda: cudcn.deform_conv2d(*tensors, padding=1)) <= 64 << 20
    assert scratch_memory(lambda: cudcn.deform_conv2d_backward(grad_output, *tensors, padding=1)) <= 64 << 20


def scratch_memory(call: Callable[[], Any]) -> int:
    """Bytes at the peak, beyond the results."""
    tracemalloc.start()
    try:
        result = call()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    return peak - kept


@pytest.mark.parametrize("case", [case for case in LARGE if hasattr(case.op.cpu, "flattened")], ids=str)
def test_images_are_copied_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every block."""
    seen = 0
    flattened = case.op.cpu.flattened

    def spy(*args: Any) -> Any:
        nonlocal seen
        (copies := flattened(*args))
        seen += sum(copy.nbytes for copy in copies)
        return copies

    monkeypatch.setattr(case.op.cpu, "flattened", spy)
    case.forward(case.tensors("float32"))
    image = next(iter(case.tensors("float32").values()))
    assert image.nbytes <= seen <= 1.3 * image.nbytes


@pytest.mark.parametrize("threads", ["1", "3"])
@every_large_case
def test_no_warnings(case: Case, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """About NaN, infinity, or overflow; warnings are errors here."""
    monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
    for dtype, value in (("float32", NAN), ("float32", INF), ("float16", 6e4), ("float32", 3e38)):
        tensors = {name: None if t is None else t.copy() for name, t in case.tensors(dtype).items()}
        for name, tensor in tensors.items():
            if tensor is not None and name not in case.op.non_differentiable:
                tensor.ravel()[::7] = value
        if "rois" in tensors:
            tensors["rois"][:, 0] = 0
        case.forward(tensors)
        case.backward(tensors, np.full(case.output_shape(), value, tensors[next(iter(tensors))].dtype))
