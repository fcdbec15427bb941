"""The torch adapter's CUDA side, with CPU tensors in the fake device's memory that say they are on cuda:0."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_cuda
import pytest
from cases import ADAPTED, EACH
from cases.case import HALVES, Case, Tensors
from fake_cuda import STREAMED, WAITING, noted_calls, run_by_turns
from frameworks.comparing import PLAIN, assert_close, double, expected

import cudcn

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import gradients, tensors, to_torch  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fake")]


@pytest.fixture
def cuda(fake: None) -> Iterator[Any]:
    """torch's CUDA, whose current stream is one of its own; afterwards none of its memory is in use."""
    import cupy
    from fake_cuda.posing import posing

    pool = cupy.get_default_memory_pool()
    gc.collect()
    held = pool.used_bytes()
    with posing() as cuda, cupy.cuda.Stream(non_blocking=True) as stream:
        cuda.streams[0] = stream
        yield cuda
        gc.collect()
        assert cuda.alive == {}
        assert pool.used_bytes() == held
        stream.synchronize()


def moved(cuda: Any, given: Tensors, device: int = 0) -> Tensors:
    return {name: cuda.cuda(t, device) for name, t in given.items()}


def check(case: Case, cuda: Any, given: Tensors, dtype: str = "float64", device: int = 0) -> None:
    """Output, gradients and the raw backward of the adapter against NumPy."""
    grad_output = to_torch(case.grad_output(dtype))
    want, wants = expected(case, given, grad_output)
    there, grad_there = moved(cuda, given, device), cuda.cuda(grad_output, device)
    out = case.forward(there)
    out.backward(grad_there)
    raw = case.backward(moved(cuda, given, device), grad_there)
    assert out.device == torch.device("cuda", device)
    fake_cuda.synchronize()
    case.close(double(out), want, dtype)
    for name, got in gradients(there).items():
        if wants[name] is None:
            assert_close(got, None)
            assert_close(raw[name], None)
        else:
            assert raw[name].dtype == given[name].dtype
            case.close(double(got), wants[name], dtype)
            case.close(double(raw[name]), wants[name], dtype)


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_agrees_with_numpy(case: Case, cuda: Any) -> None:
    check(case, cuda, tensors(case))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_half_types(case: Case, dtype: str, cuda: Any) -> None:
    check(case, cuda, tensors(case, dtype), dtype)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_takes_views_as_they_are(case: Case, cuda: Any) -> None:
    given = {name: None if t is None else torch.stack([t, t], -1)[..., 0].detach() for name, t in tensors(case).items()}
    for name, tensor in given.items():
        if tensor is not None:
            tensor.requires_grad_(name not in case.op.non_differentiable)
    check(case, cuda, given)


def test_empty_batch(cuda: Any) -> None:
    given = moved(cuda, tensors(replace(PLAIN, batch=0)))
    out = PLAIN.forward(given)
    out.backward(cuda.cuda(torch.zeros(out.shape, dtype=out.dtype)))
    fake_cuda.synchronize()
    assert out.shape == (0, 6, 4, 3)
    assert not given["weight"].grad.any()


@pytest.mark.parametrize("case", EACH, ids=str)
def test_all_is_done_on_torchs_stream_in_its_memory(case: Case, cuda: Any) -> None:
    """CuPy's current stream is another, and CUDA is asked for no memory."""
    import cupy

    given, grad_output = moved(cuda, tensors(case)), cuda.cuda(to_torch(case.grad_output()))
    case.forward(given).backward(grad_output)  # compiles
    cupy.get_default_memory_pool().free_all_blocks()
    with cupy.cuda.Stream(non_blocking=True), noted_calls() as calls:
        before = cuda.allocations
        out = case.forward(given)
        out.backward(grad_output)
    names = [call.name for call in calls]
    assert "cuLaunchKernel" in names
    assert {call.stream for call in calls if call.name in STREAMED} == {cuda.streams[0].ptr}
    assert not {"cudaMalloc", "cudaMemset", "cudaHostAlloc", *WAITING} & {*names}
    assert names.count("cudaMallocAsync") == cuda.allocations - before  # torch's own


@pytest.mark.parametrize("case", EACH, ids=str)
def test_runs_on_the_device_of_its_tensors(case: Case, cuda: Any) -> None:
    import cupy

    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
    cuda.streams[1] = stream
    check(case, cuda, tensors(case), device=1)
    assert cupy.cuda.runtime.getDevice() == 0
    stream.synchronize()


@pytest.mark.parametrize("case", EACH, ids=str)
def test_scratch_is_not_reused_while_it_is_in_use(case: Case, cuda: Any) -> None:
    """Calls on two streams, none of which has run when the last is made; then they run by turns."""
    import cupy

    numbers = [case, replace(case, name=f"{case.name} again")]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    given = [
        (each, moved(cuda, tensors(each, grad=False)), cuda.cuda(to_torch(each.grad_output()))) for each in numbers
    ]
    results = []
    for stream in streams:
        cuda.streams[0] = stream
        results += [(each, case.forward(t), case.backward(t, grad)) for each, t, grad in given]
        gc.collect()
    run_by_turns(streams)
    for each, out, grads in results:
        want, wants = expected(each, tensors(each), to_torch(each.grad_output()))
        assert_close(out, want)
        for name, got in grads.items():
            assert_close(got, wants[name])


def test_two_devices_are_refused(cuda: Any) -> None:
    given = moved(cuda, tensors(grad=False))
    with pytest.raises(ValueError, match="all tensors must be on one device, got input: cuda:1, offset: cuda:0"):
        cudcn.deform_conv2d(cuda.cuda(given["input"], 1), *[*given.values()][1:], **PLAIN.attributes)
