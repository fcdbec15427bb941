"""The CPU path's threads."""

from __future__ import annotations

import pytest
from deform_conv2d_cases import BY_NAME, PLAIN

from cudcn.cpu import parallel


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_any_number_of_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_NUM_THREADS", threads)
    case = BY_NAME["groups NCHW"]
    case.close(case.forward(case.tensors()), case.expected(), "float64")


def test_blas_gets_its_threads_back() -> None:
    """From several callers at once too, and after an error."""
    blas = parallel._openblas()
    if blas is None:
        pytest.skip("NumPy's BLAS is not OpenBLAS")
    get, set_ = blas
    before = get()
    set_(2)
    try:
        with parallel.single_threaded_blas(), parallel.single_threaded_blas():
            assert get() == 1
        assert get() == 2
        with pytest.raises(RuntimeError), parallel.single_threaded_blas():
            raise RuntimeError
        assert get() == 2
    finally:
        set_(before)


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_thread_count(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDCN_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"CUDCN_NUM_THREADS must be a positive number, got '{value}'"):
        PLAIN.forward(PLAIN.tensors())
