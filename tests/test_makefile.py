"""The Makefile's way to a .venv, with stand-ins for Python: nothing is downloaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Writes down what it is called with. In .venv it stands for Python with pip; two installs at once fail.
IN_VENV = """#!/bin/sh
echo "$@" >> calls
case "$*" in *"pip install"*) mkdir installing || exit 9; sleep 0.3; rmdir installing;; esac
"""
# What Debian leaves behind without python3-venv: an interpreter, no pip.
HALF_MADE = "#!/bin/sh\nexit 1\n"
SYSTEM = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} "$@"; fi
mkdir -p .venv/bin && cp {venv} .venv/bin/python && exit {status}
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "-C", str(checkout), *arguments], capture_output=True, text=True, env=clean)


def system_python(checkout: Path, venv: str, status: int) -> str:
    inside = script(checkout / f"in_venv_{status}", venv)
    text = SYSTEM.format(python=sys.executable, venv=inside, status=status)
    return f"PYTHON={script(checkout / f'python_{status}', text)}"


def test_a_half_made_venv_is_completed(checkout: Path) -> None:
    for _ in range(2):
        failed = make(checkout, "demo", system_python(checkout, HALF_MADE, 1))
        assert failed.returncode != 0
        assert ".venv could not be made. On Debian and Ubuntu: apt-get install python3-venv." in failed.stdout
    assert (checkout / ".venv/bin/python").exists()
    done = make(checkout, "demo", system_python(checkout, IN_VENV, 0))
    assert done.returncode == 0, done.stderr
    assert "examples/quickstart.py" in (checkout / "calls").read_text()


def test_demo_and_test_at_once(checkout: Path) -> None:
    done = make(checkout, "-j2", "demo", "test", system_python(checkout, IN_VENV, 0))
    assert done.returncode == 0, done.stderr
    calls = (checkout / "calls").read_text()
    assert "install --editable .[demo]" in calls
    assert "install --editable .[test]" in calls
    assert "quiet" not in calls


def test_an_old_python_is_told_before_it_makes_a_venv(checkout: Path) -> None:
    floor = re.search(r'^requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert floor
    minor = int(floor[1]) - 1
    pretend = f"import sys; sys.version_info, sys.version = (3, {minor}, 7), '3.{minor}.7 (main)'; exec(sys.argv[1])"
    old = script(checkout / "old", f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    failed = make(checkout, "demo", f"PYTHON={old}")
    assert failed.returncode != 0
    assert f"cudcn needs Python 3.{floor[1]} or later, this is 3.{minor}.7; another: make PYTHON=" in failed.stderr
    assert "python3-venv" not in failed.stdout
    assert not (checkout / ".venv").exists()


def test_gpu_says_what_must_be_installed(checkout: Path) -> None:
    failed = make(checkout, "gpu", f"PYTHON={sys.executable} -S")
    assert failed.returncode != 0
    assert "lacks numpy, scipy, ml_dtypes, cupy, torch, pytest, hypothesis" in failed.stderr
    assert "pip install --editable '.[torch,cuda13]' pytest hypothesis" in failed.stderr
    assert "Traceback" not in failed.stderr
