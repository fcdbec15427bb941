"""What the demo says of the frameworks that are there, and of those that are not."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cudcn import emulator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart() -> ModuleType:
    return example("quickstart")


def compared(quickstart: ModuleType, rng: np.random.Generator) -> bool:
    image, clean = rng.random((2, 3, 9, 11)).astype(np.float32)
    return quickstart.compare(image, *quickstart.steer(image), clean)


def test_what_each_row_proves(
    quickstart: ModuleType, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := emulator.unavailable():
        pytest.skip(reason)
    assert compared(quickstart, rng)
    printed = capsys.readouterr().out
    for row in ("torch adapter  ", "JAX adapter    ", "CUDA, emulated "):
        assert any(line.startswith(row) and line.endswith(" agrees") for line in printed.splitlines())
    assert "their rows\nprove the adapters, not the arithmetic" in printed


def test_the_emulator_is_skipped_where_it_cannot_run(
    quickstart: ModuleType,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert compared(quickstart, rng)
    assert "\nCUDA, emulated  skipped: the emulator runs on Linux on x86-64 only" in capsys.readouterr().out


def test_patch_detr_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    patch_detr = example("patch_detr")
    monkeypatch.setattr("sys.argv", ["patch_detr.py"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        patch_detr.main()


@pytest.mark.models
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_patch_detr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[models]'")
    patch_detr = example("patch_detr")
    monkeypatch.setattr("sys.argv", ["patch_detr.py", "--height", "64", "--width", "96"])
    monkeypatch.setattr(patch_detr, "TURNS", 1)
    assert patch_detr.main() == 0
    printed = capsys.readouterr().out
    assert "replaced 12 modules: transformers.MultiScaleDeformableAttention" in printed
    assert re.search(r"forward, backward +\d+\.\d\d +\d+\.\d\d   \d+\.\d times as fast", printed)


@pytest.mark.usefixtures("one_thread")
def test_train_digits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both networks train, and the picture is drawn; of so few steps nothing is learnt."""
    for package in "torch", "sklearn", "matplotlib":
        pytest.importorskip(package)
    picture = tmp_path / "digits.png"
    train_digits = example("train_digits_torch")
    monkeypatch.setattr(train_digits, "TRAINED", 64)
    monkeypatch.setattr(train_digits, "TESTED", 16)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(
        "sys.argv", ["train_digits_torch.py", "--seeds", "1", "--epochs", "1", "--picture", str(picture)]
    )
    train_digits.main()
    assert re.search(r"mean: regular \d+\.\d, deformable \d+\.\d", capsys.readouterr().out)
    assert picture.stat().st_size > 10_000
