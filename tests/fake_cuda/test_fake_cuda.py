"""What the operators ask of CUDA, and when: by CuPy on the fake CUDA device; what needs no record, on a GPU too."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import EACH
from cases.case import Case, Tensors

import fake_cuda
from cudcn import launch
from cudcn.plan import Launch, Plan
from fake_cuda import ALLOCATING, STREAMED, WAITING, build, launches, noted_calls, run_by_turns

pytestmark = pytest.mark.gpu
PASSES = ("forward", "backward")


def on_device(case: Case) -> tuple[Tensors, Any]:
    """The case's tensors and its output's gradient."""
    import cupy

    tensors = {name: None if t is None else cupy.asarray(t) for name, t in case.tensors().items()}
    return tensors, cupy.asarray(case.grad_output())


def passing(which: str, case: Case, tensors: Tensors, grad_output: Any) -> Tensors:
    """The results of one pass by name."""
    return {"output": case.forward(tensors)} if which == "forward" else case.backward(tensors, grad_output)


def check(which: str, case: Case, got: Tensors) -> None:
    """Results against the CPU's."""
    want = passing(which, case, case.tensors(), case.grad_output())
    for name, array in want.items():
        if array is not None:
            case.close(got[name].get(), array, "float64")


# ---- the operators


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_all_is_done_on_the_current_stream(case: Case, which: str) -> None:
    """Nothing waits, and where CuPy's pool has memory enough, none is asked of CUDA."""
    import cupy

    given = on_device(case)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        passing(which, case, *given)  # compiles, and fills the pool
        with noted_calls() as calls:
            got = passing(which, case, *given)
        stream.synchronize()
    check(which, case, got)
    names = {call.name for call in calls}
    assert "cuLaunchKernel" in names
    assert {call.stream for call in calls if call.name in STREAMED} == {stream.ptr}
    assert not names & {"cudaMemset", *WAITING, *ALLOCATING}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_scratch_is_not_reused_while_it_is_in_use(case: Case, which: str) -> None:
    """Calls on three streams, none of which has run when the last is made; then they run by turns."""
    import cupy

    other = replace(case, name=f"{case.name} again")  # other numbers of the same shapes
    given = {each: on_device(each) for each in (case, other)}
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)]
    results = []
    for _ in range(2):
        for each in case, other:
            for stream in streams:
                with stream:
                    results.append((each, passing(which, each, *given[each])))
                gc.collect()
    run_by_turns(streams)
    for each, got in results:
        check(which, each, got)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_runs_on_the_device_of_its_tensors(case: Case, which: str) -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    with cupy.cuda.Device(1):
        given = on_device(case)
    got = passing(which, case, *given)
    assert cupy.cuda.runtime.getDevice() == 0
    cupy.cuda.Device(1).synchronize()
    assert all(array.device.id == 1 for array in got.values() if array is not None)
    check(which, case, got)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_six_threads_at_once(case: Case, which: str) -> None:
    import cupy

    given = on_device(case)
    cupy.cuda.Device().synchronize()

    def run(_: int) -> Tensors:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            got = passing(which, case, *given)
            stream.synchronize()
        return got

    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(run, range(12)):
            check(which, case, got)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_capture_into_a_graph(case: Case, which: str) -> None:
    """The graph computes anew, from what its tensors hold when it is launched."""
    import cupy

    other = replace(case, name=f"{case.name} again")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:  # from the first copy on: other streams would not wait for it
        tensors, grad_output = on_device(case)
        passing(which, case, tensors, grad_output)  # compiles
        stream.begin_capture()
        try:
            got = passing(which, case, tensors, grad_output)
        finally:
            graph = stream.end_capture()
        for name, array in tensors.items():
            if array is not None:
                array.set(other.tensors()[name])
        own = [cupy.full(1 << size, 7, np.uint8) for size in range(8, 18)]  # the graph's scratch memory is not theirs
        graph.launch()
        stream.synchronize()
    check(which, other, got)
    assert all((array.get() == 7).all() for array in own)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_arguments_are_as_large_as_the_cubin_says(case: Case, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    taken: list[list[int]] = []

    def see(_: Any, plan: Plan, device: int) -> None:
        given.extend([*map(_size, step.arguments)] for step in plan.steps if isinstance(step, Launch))

    _spy(monkeypatch, launch._Prepared, "__init__", see)
    _spy(monkeypatch, launches, "_run_emulated", lambda name, launched, values: taken.append([*map(len, values)]))
    passing(which, case, *on_device(case))
    fake_cuda.synchronize()
    assert given
    assert taken == given


def _size(argument: Any) -> int:
    return argument.nbytes if isinstance(argument, np.ndarray | np.generic) else 8


def _spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, see: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def seen(*args: Any) -> Any:
        see(*args)
        return original(*args)

    monkeypatch.setattr(owner, name, seen)


# ---- the fake device itself


def array_at(address: int) -> Any:
    """Four numbers there."""
    import cupy

    return cupy.ndarray(4, np.float32, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 16, None, 0), 0))


@pytest.mark.usefixtures("fake")
def test_work_waits_until_somebody_waits_for_it() -> None:
    import cupy

    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with first:
        x = cupy.zeros(4, np.float32)
        x += 1
    first.synchronize()
    with first:
        x += 1
    with second:
        y = x + 1  # on a stream that does not wait for the first
        second.synchronize()
        assert (y.get() == 2).all()
    first.synchronize()
    assert (x.get() == 2).all()
    with first:
        x += 1
        event = first.record()
    second.wait_event(event)
    with second:
        assert (x + 1).get().tolist() == [4] * 4


@pytest.mark.usefixtures("fake")
def test_the_default_stream_waits_for_blocking_ones() -> None:
    import cupy

    with cupy.cuda.Stream():
        x = cupy.zeros(4, np.float32)
        x += 1
    y = x + 1
    with cupy.cuda.Stream():
        z = y + 1
        assert (z.get() == 3).all()


@pytest.mark.usefixtures("fake")
def test_memory_freed_on_another_stream_is_lost() -> None:
    import cupy
    from cupy.cuda import runtime

    owner, user = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    address = runtime.mallocAsync(16, owner.ptr)
    x = array_at(address)
    with user:
        x.fill(1)
        y = x + 1
        user.synchronize()
        assert (y.get() == 2).all()
        z = x + 1
        runtime.freeAsync(address, owner.ptr)
    owner.synchronize()
    with user, pytest.raises(runtime.CUDARuntimeError, match="is memory that has been freed"):
        z.get()


@pytest.mark.usefixtures("fake")
def test_memory_freed_by_one_thread_serves_what_runs_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from cupy.cuda import runtime

    started, freed = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        started.set()
        assert freed.wait(30)

    stream = cupy.cuda.Stream(non_blocking=True)
    address = runtime.malloc(16)
    with stream:
        x = array_at(address)
        x.fill(1)
        stream.synchronize()
        y = x + 1
    _spy(monkeypatch, launches, "_run_cupy", pause)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stream.synchronize)
        assert started.wait(30)
        runtime.free(address)
        freed.set()
        waiting.result()
    assert (y.get() == 2).all()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("size", "device", "message"), [(8, 0, "is not within its memory"), (16, 1, "is memory of device 1, the kernel")]
)
def test_kernels_get_memory_of_their_own_device(size: int, device: int, message: str) -> None:
    import cupy
    from cupy.cuda import runtime

    with cupy.cuda.Device(device):
        address = runtime.mallocAsync(size, 0)
    y = array_at(address) + 1
    with pytest.raises(runtime.CUDARuntimeError, match=message):
        y.get()


@pytest.mark.usefixtures("fake")
def test_launches_that_cuda_would_refuse() -> None:
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    for grid, block, shared in [((1,), (1025,), 0), ((1, 65536), (1,), 0), ((1,), (1,), (48 << 10) + 1)]:
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match="error 1 of the fake CUDA driver"):
            kernel(grid, block, (), shared_mem=shared)
    kernel((1,), (1,), ())
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"no \.cu file defines nothing"):
        cupy.cuda.Stream.null.synchronize()


@pytest.mark.usefixtures("fake")
def test_what_is_not_implemented_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    from cupy.cuda import runtime

    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorNotSupported"):
        runtime.memcpyPeer(0, 0, 0, 1, 4)
    assert "cudaMemcpyPeer is not implemented" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (build.shutil, "which", lambda tool: None, r"g\+\+ was not found"),
        (build, "CUPY", "13.0", "it is written for CuPy 13.0, this is cupy-cuda13x 14"),
        (build, "TOOLS", ("no-such-tool",), "no-such-tool is not installed"),
        (build.platform, "machine", lambda: "aarch64", "on x86-64 only, this is linux on aarch64"),
        (build, "_cupy_source", lambda folder: build._run(["false"]), "this failed: false"),  # as pip when offline
    ],
)
def test_says_why_it_cannot_be_built(
    owner: Any, name: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDCN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(fake_cuda.Unavailable, match=reason):
        build.build()
    assert not [*tmp_path.rglob("*.so*")]
