"""`python -m cudcn warmup`."""

from __future__ import annotations

import io
from typing import Any

import pytest
from cases import EACH

from cudcn import launch, nvrtc, warmup
from cudcn.__main__ import main
from cudcn.dtypes import DTYPES
from cudcn.ops import OPS

CASE = next(case for case in EACH if case.op.name == "roi_avg_pool")


def test_every_kernel_is_of_one_dtype_or_of_all() -> None:
    names = [op.name for op in OPS]
    by_dtype = [warmup.kernels(names, [dtype]) for dtype in DTYPES]
    of_all = set.intersection(*map(set, by_dtype))
    assert {kernel.source for kernel in of_all} == {"sort", "aggregate"}
    own = [kernel for kernels in by_dtype for kernel in kernels if kernel not in of_all]
    assert sorted([*own, *of_all]) == sorted(nvrtc.kernels())
    assert all(by_dtype)


@pytest.mark.gpu
def test_calls_find_their_kernels_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    launch.compiled.cache_clear()
    report = io.StringIO()
    count = warmup.warm_up([CASE.op.name], ["float16"], report)
    lines = report.getvalue().splitlines()
    assert len(lines) == count == launch.compiled.cache_info().misses
    assert lines[-1].startswith(f"[{'#' * 30}] {count}/{count} ")

    def refuse(self: Any, *given: Any) -> Any:
        assert "RoI pooling" not in self.src, "a kernel was compiled that should be in the cache"
        return compile_one(self, *given)

    launch.compiled.cache_clear()
    compile_one = cupy.cuda.compiler._NVRTCProgram.compile
    monkeypatch.setattr("cupy.cuda.compiler._NVRTCProgram.compile", refuse)
    arrays = {name: cupy.asarray(t) for name, t in CASE.tensors("float16").items()}
    CASE.forward(arrays)
    CASE.backward(arrays, cupy.asarray(CASE.grad_output("float16")))
    assert 0 < launch.compiled.cache_info().misses <= count


@pytest.mark.gpu
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    monkeypatch.setattr(warmup, "warm_up", lambda *given: asked.append(given) or 7)
    monkeypatch.setattr("sys.argv", ["cudcn", "warmup", "--op", "dcnv3", "--op", "dcnv4", "--dtype", "float16"])
    main()
    monkeypatch.setattr("sys.argv", ["cudcn", "warmup"])
    main()
    assert asked == [(["dcnv3", "dcnv4"], ["float16"]), ([op.name for op in OPS], list(DTYPES))]
    assert capsys.readouterr().out == "7 kernels are ready\n" * 2
