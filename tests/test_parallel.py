"""The CPU path's threads."""

from __future__ import annotations

import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases.deform_conv2d import BY_NAME, PLAIN

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


def test_omp_num_threads_and_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDCN_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(parallel, "_quota", lambda: math.inf)
    for text, want in (("", 16), ("3", 3), ("4,2", 4), ("64", 16), ("0", 16), ("many", 16)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert parallel.threads() == want
    with parallel.limit(5):
        assert parallel.threads() == 5
        with ThreadPoolExecutor(1) as other:
            assert other.submit(parallel.threads).result() == 16
        monkeypatch.setenv("CUDCN_NUM_THREADS", "7")
        assert parallel.threads() == 7
    monkeypatch.delenv("CUDCN_NUM_THREADS")
    monkeypatch.setattr(parallel, "_quota", lambda: 2)
    assert parallel.threads() == 2


@pytest.mark.parametrize(
    ("group", "files", "want"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", {"cpu.max": "400000 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/a\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("3:cpuset:/", {"cpu.max": "100000 100000"}, math.inf),
    ],
)
def test_quota_of_the_control_groups(group: str, files: dict[str, str], want: float, tmp_path: pathlib.Path) -> None:
    for name, text in {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{name}": t for name, t in files.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert parallel._quota(str(tmp_path)) == want


def test_no_control_groups(tmp_path: pathlib.Path) -> None:
    assert parallel._quota(str(tmp_path)) == math.inf


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_is_inside() -> None:
    """The child's BLAS has its threads, and its lock is free."""
    blas = parallel._openblas()
    if blas is None:
        pytest.skip("NumPy's BLAS is not OpenBLAS")
    get, set_ = blas
    before = get()
    set_(2)
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with parallel.single_threaded_blas():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        inside.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends the child if it hangs
            right = get() == 2
            with parallel.single_threaded_blas():
                right = right and get() == 1
            os._exit(0 if right and get() == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert get() == 1  # the parent's is still in use
    finally:
        leave.set()
        thread.join()
        assert get() == 2
        set_(before)


FAULTS = """
import resource
import numpy as np, cudcn
image, offset = np.ones((2, 56, 56, 128), np.float32), np.zeros((2, 56, 56, 72), np.float32)
mask, faults = np.ones((2, 56, 56, 36), np.float32), []
for _ in range(6):
    cudcn.dcnv3_backward(image, image, offset, mask)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-4])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_kept_from_call_to_call() -> None:
    """In a process that has freed no large array yet: fetching it anew took a third of the time."""
    environment = {**os.environ, "CUDCN_NUM_THREADS": "2", "CUDCN_DEVICE": "cpu"}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 3000  # pages in three calls, which hold some 8000 at a time
