"""Devices to test on, and the GPU tests' skip."""

from __future__ import annotations

import functools

import pytest


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
