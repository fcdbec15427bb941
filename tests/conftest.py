"""Devices to test on: a GPU or else the fake one, the emulator, the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import fake_cuda
import numpy as np
import pytest

from cudcn import emulator, launch

pytest.register_assert_rewrite("cases.case", "every_case", "frameworks.comparing")


@functools.cache
def no_fake() -> str | None:
    """Why there is no fake CUDA device; None if there is one, or a real one."""
    try:
        fake_cuda.install_without_gpu()
    except fake_cuda.Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def no_gpu() -> str | None:
    """Why the tests marked gpu cannot run; None if they can, on a CUDA device or on the fake one."""
    if reason := no_fake():
        return f"no CUDA device, and no fake one: {reason}"
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, or one for another CUDA: each raises its own
        return f"no CUDA device: {error}"
    return None


def pytest_collection() -> None:
    no_fake()  # the fake device must be there before a test file imports CuPy


def skips(item: pytest.Item) -> str | None:
    """Why this test marked gpu cannot run."""
    reason = no_gpu()
    if reason is None and fake_cuda.installed() and item.path.name in ("test_torch.py", "test_jax.py"):
        return f"the fake CUDA device has no {item.path.stem.removeprefix('test_')}"
    return reason


@pytest.hookimpl(trylast=True)  # once -m has left out what is not wanted
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := skips(item)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skips a test at its first emulated launch where the emulator cannot run."""
    try:
        return (yield)
    except emulator.EmulatorError:
        if reason := emulator.unavailable():
            pytest.skip(reason)
        raise


@pytest.fixture(autouse=True)
def finished(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test marked gpu has launched runs before the test ends, so that it fails there if it fails."""
    yield
    if request.node.get_closest_marker("gpu") and fake_cuda.installed():
        fake_cuda.synchronize()


@pytest.fixture
def fake() -> None:
    """For tests of what a real CUDA device keeps no record of."""
    if not fake_cuda.installed():
        pytest.skip("this is for the fake CUDA device")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {
        outcome: sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error", "skipped", "xfailed")
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    terminalreporter.write_line(f"of these marked gpu: {told or 'none'}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch's tensors so small that threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_DEVICE", "emulator")


@pytest.fixture(params=["cpu", "fast", "check"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "cpu":
        yield
    else:
        monkeypatch.setenv("CUDCN_DEVICE", "emulator")
        with emulator.settings(build=request.param):
            yield


@pytest.fixture
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's own, whatever the environment says; its tests are skipped where it cannot run."""
    if reason := emulator.unavailable():
        pytest.skip(reason)
    monkeypatch.delenv("CUDCN_EMULATOR_BUILD", raising=False)
    monkeypatch.delenv("CUDCN_EMULATOR_ORDER", raising=False)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """None that an earlier test made, with another workspace perhaps."""
    launch.forget()
