"""Where the emulator keeps its libraries, which of them it loads, and the machines that it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulator.builds import INCLUDE

from cudcn import emulator
from cudcn.emulator import EmulatorError, build

pytestmark = pytest.mark.usefixtures("default_settings")

SOURCE = """
#include "platform.cuh"
__global__ void twice(const float *in, float *out) { out[threadIdx.x] = 2 * in[threadIdx.x]; }
"""
RUN = """
import sys
import numpy as np
from cudcn import emulator
out = np.zeros(3, np.float32)
kernel = emulator.kernel(sys.argv[1], "twice", include=sys.argv[2:])
kernel((1,), (3,), (np.arange(3, dtype=np.float32), out))
print(out.tolist())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "twice.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def filled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the runtime and one kernel, built where a umask lets the group write."""
    if reason := emulator.unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("filled") / "parent" / "cache"
    before = os.umask(0o002)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDCN_CACHE_DIR", str(folder))
            emulator.kernel(source, "twice", include=INCLUDE)
    finally:
        os.umask(before)
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for a process that has loaded nothing yet."""
    folder = tmp_path / "cache"
    shutil.copytree(filled, folder)
    monkeypatch.setenv("CUDCN_CACHE_DIR", str(folder))
    monkeypatch.setattr(build, "_kernels", {})
    return folder


@pytest.fixture
def load(source: Path) -> Callable[[], emulator.Compiled]:
    return lambda: emulator.kernel(source, "twice", include=INCLUDE)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/cudcn/emulator"),
        ({"CUDCN_CACHE_DIR": ""}, "home/.cache/cudcn/emulator"),
        ({"XDG_CACHE_HOME": "{here}/xdg"}, "xdg/cudcn/emulator"),
        ({"XDG_CACHE_HOME": "xdg"}, "home/.cache/cudcn/emulator"),
        ({"XDG_CACHE_HOME": "{here}/xdg", "CUDCN_CACHE_DIR": "{here}/mine"}, "mine"),
        ({"CUDCN_CACHE_DIR": "~/mine"}, "home/mine"),
        ({"CUDCN_CACHE_DIR": "mine"}, "mine"),
    ],
    ids=str,
)
def test_place(variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("CUDCN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(here=tmp_path))
    assert build.cache_folder() == tmp_path / expected


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "CUDCN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])  # as for a container's user that has no entry
    with pytest.raises(EmulatorError, match=r"has no place for its kernels .*: set CUDCN_CACHE_DIR"):
        build.cache_folder()


@pytest.mark.parametrize("place", [".", "cache"])
def test_relative_place(place: str, load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are found there, and their source lines, when the process has moved on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDCN_CACHE_DIR", place)
    monkeypatch.setattr(build, "_kernels", {})
    build._absolute.cache_clear()
    first = load()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load() is first
    build._absolute.cache_clear()
    if shutil.which("addr2line"):
        with pytest.raises(EmulatorError, match=r"null pointer.* \(twice\.cu:3\)"):
            first((1,), (3,), (None, np.zeros(3, np.float32)))


def test_nobody_else_can_write(cache: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in (cache, *cache.iterdir())] == [0o700] * 3


@pytest.mark.parametrize("what", ["folder", "kernel", "runtime"])
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_what_others_can_write_is_not_loaded(what: str, mode: int, cache: Path, load: Callable) -> None:
    (kernel,), (runtime,) = cache.glob("twice_*"), cache.glob("lib*")
    path = {"folder": cache, "kernel": kernel, "runtime": runtime}[what]
    path.chmod(mode)
    with pytest.raises(EmulatorError, match=f"no kernels from {path}: others can write to it .mode {mode:o}"):
        load()
    path.chmod(0o755)  # others may read
    load()


def test_what_others_own_is_not_loaded(cache: Path, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    message = f"from {cache}: it belongs to user {owner}, .* is user {owner + 1}'s. CUDCN_CACHE_DIR names another"
    with pytest.raises(EmulatorError, match=message):
        load()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no library"])
def test_what_is_not_whole_is_built_again(damage: Callable, cache: Path, source: Path) -> None:
    """In a process of its own: loading half a library is a bus error."""
    libraries = list(cache.iterdir())
    for path in libraries:
        path.write_bytes(damage(path.read_bytes()))
    command = [sys.executable, "-c", RUN, str(source), *map(str, INCLUDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[0.0, 2.0, 4.0]\n", done
    assert all(map(build._is_cached, libraries))


def test_what_does_not_load_is_named(cache: Path, load: Callable) -> None:
    (kernel,) = cache.glob("twice_*")
    kernel.write_bytes(b"no library" + build._digest(b"no library").encode())
    with pytest.raises(EmulatorError, match=rf"{kernel} does not load \(.*\): set CUDCN_CACHE_DIR"):
        load()


def test_leftovers_of_killed_builds_are_removed(cache: Path, load: Callable) -> None:
    old, new = cache / "building_old", cache / "building_new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "source.cpp").touch()
    os.utime(old, (0, 0))
    load()
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("place", ["file", "file/cache", "/proc/cudcn"])
def test_an_unwritable_place(place: str, load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUDCN_CACHE_DIR", str(tmp_path / place))
    with pytest.raises(EmulatorError, match=f"cannot write its kernels to .*{place} .*: set CUDCN_CACHE_DIR"):
        load()


def test_a_full_disk(cache: Path, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(EmulatorError, match=r"cannot write its kernels to .*No space left.*: set CUDCN_CACHE_DIR"):
        load()


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64")])
def test_other_machines(load: Callable, monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert emulator.unavailable() == f"the emulator runs on Linux on x86-64 only, this is {system} on {machine}"
    with pytest.raises(EmulatorError, match="on Linux on x86-64 only"):
        load()


def test_other_processors(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_kernels", {})
    lacking = build._processor_flags() - {"avx2", "fma"}
    monkeypatch.setattr(build, "_processor_flags", lambda: lacking)
    assert emulator.unavailable() == "the emulator needs a processor with AVX2 (x86-64-v3), this one lacks avx2, fma"
    with pytest.raises(EmulatorError, match="this one lacks avx2, fma"):
        load()


def test_emulated_tests_are_skipped_on_other_machines(tmp_path: Path) -> None:
    """A launch, and a fault that is expected of one."""
    (tmp_path / "other_machine.py").write_text("import platform\nplatform.machine = lambda: 'aarch64'\n")
    tests = Path(__file__).parent.parent
    chosen = [
        f"{tests / 'emulator' / 'test_emulator.py'}::test_null_pointer_and_stack_overflow",
        f"{tests / 'test_deform_conv2d.py'}::TestEverySmallCase::test_checking_build",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "other_machine", "-n", "0", "-rs", *chosen]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the emulator runs on Linux on x86-64 only, this is linux on aarch64" in done.stdout
    assert " passed" not in done.stdout
