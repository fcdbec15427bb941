"""Devices to test on, and the GPU tests' skip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cudcn import emulator

pytest.register_assert_rewrite("operator_case")


@functools.cache
def no_gpu() -> str | None:
    """Why no CUDA device can be used; None if one can."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver or no device: each raises its own
        return f"no CUDA device: {error}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := no_gpu()):
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


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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
