"""What is installed, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from cudcn import emulator

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "cudcn": "cudcn",
    "kernels_cu": "cudcn/kernels_cu",
    "adapters/torch": "cudcn/torch",
    "adapters/jax": "cudcn/jax",
}
KINDS = {".md", ".py", ".cu", ".cuh", ".h", ".cpp", ".typed"}

IMPORT = """
import json, sys, time
import numpy, scipy.sparse
before, start = set(sys.modules), time.process_time()
import cudcn
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_import_is_light() -> None:
    """No framework, no CuPy, and under 0.3 s beyond NumPy and SciPy."""
    runs = []
    for _ in range(3):  # the best of three: the machine does other things too
        printed = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
        seconds, modules = json.loads(printed)
        runs.append(seconds)
        for framework in ("torch", "jax", "cupy", "tvm_ffi", "ml_dtypes"):
            assert framework not in {m.split(".")[0] for m in modules}
    assert min(runs) < 0.3


def test_no_cuda_library_is_needed() -> None:
    """With CuPy, torch and JAX missing altogether."""
    code = """
import sys
for name in ("cupy", "torch", "jax", "ml_dtypes"):
    sys.modules[name] = None
import numpy as np, cudcn
x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 1, 1))
assert cudcn.deform_conv2d(x, np.zeros((1, 2, 3, 3)), w).sum() == 9
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist of a copy of the tree (a build leaves files in it)."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def wanted() -> set[str]:
    """Every source file of the package, under the name that it is installed by."""
    names = set()
    for source, installed in FOLDERS.items():
        for path in (ROOT / source).rglob("*"):
            if path.suffix in KINDS and "__pycache__" not in path.parts:
                names.add(f"{installed}/{path.relative_to(ROOT / source).as_posix()}")
    return names


def test_the_wheel_holds_the_tree(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == wanted()


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    """The tree of the sdist."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(built / "unpacked", filter="data")
    (tree,) = (built / "unpacked").iterdir()
    return tree


def test_the_sdist_is_the_repository(unpacked: Path) -> None:
    for folder in (*FOLDERS, "tests", "examples", "benchmarks", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts:
                assert (unpacked / path.relative_to(ROOT)).is_file(), path
    documents = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
    for name in (*documents, "pyproject.toml", "MANIFEST.in", "Makefile", ".gitignore"):
        assert (unpacked / name).is_file(), name
    assert not list(unpacked.rglob("*.pyc"))


def test_the_tests_of_the_sdist_run(unpacked: Path) -> None:
    """All can be imported, and two files' that need the tree around them pass."""
    pytest_there = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    for arguments in (["--collect-only"], ["tests/test_makefile.py", "tests/test_examples.py"]):
        done = subprocess.run([*pytest_there, *arguments], cwd=unpacked, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_oldest_python_has_every_extra() -> None:
    """jax-tvm-ffi's floor is the highest."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        ours = tomllib.load(file)["project"]["requires-python"]
    theirs = importlib.metadata.metadata("jax-tvm-ffi")["Requires-Python"]
    assert SpecifierSet(theirs).contains(ours.removeprefix(">=")), (ours, theirs)


def test_the_wheel_works_where_it_is_installed(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    devices = ["cpu"] if emulator.unavailable() else ["cpu", "emulator"]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, cudcn, cudcn.sources
assert cudcn.__file__.startswith({str(tmp_path)!r}), cudcn.__file__
assert cudcn.sources.path("deform_conv2d").exists() and cudcn.sources.FOLDER.parent.name == "cudcn"
import os
x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 1, 1))
for os.environ["CUDCN_DEVICE"] in {devices}:
    assert cudcn.deform_conv2d(x, np.zeros((1, 2, 3, 3)), w).sum() == 9
"""
    subprocess.run([sys.executable, "-S", "-c", _with_site_packages() + code], check=True)


def _with_site_packages() -> str:
    """Without -S the editable install's finder comes first, whatever sys.path says."""
    import numpy

    return f"import sys; sys.path.append({str(Path(numpy.__file__).parent.parent)!r})\n"


def test_what_the_contributors_guide_names_is_there() -> None:
    """But the operator that it invents."""
    named = re.findall(
        r"`((?:cudcn|adapters|kernels_cu|tests|benchmarks)/[\w/.]*)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert len(named) > 20
    lacking = [path for path in named if "window_sum" not in path and not (ROOT / path).exists()]
    assert lacking in ([], ["benchmarks/results/"])  # which the first run on a GPU makes
