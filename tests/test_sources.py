"""What Python reads in the kernels' sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cudcn import sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    sources.text.cache_clear()
    yield tmp_path
    sources.text.cache_clear()


def test_a_struct_is_laid_out_as_the_compiler_does(folder: Path) -> None:
    (folder / "a.cu").write_text(
        """
struct Other {
  int other;
};

template <typename A> struct Wanted {
  int height, width;  // of what
  A scale;
  long long first;
  bool method() const { return height; }
};
"""
    )
    wanted = sources.Struct("a", "Wanted", A=np.float64)
    assert wanted.dtype == np.dtype([("height", "i4"), ("width", "i4"), ("scale", "f8"), ("first", "i8")], align=True)
    value = wanted(first=4, height=1, width=2, scale=0.5)
    assert value.tolist() == (1, 2, 0.5, 4)
    with pytest.raises(TypeError, match="Wanted has the fields"):
        wanted(height=1, width=2, scale=0.5)
    with pytest.raises(KeyError):
        wanted(height=1, width=2, scale=0.5, frist=4)


def test_a_struct_may_hold_another(folder: Path) -> None:
    (folder / "a.cu").write_text("struct Inner {\n  unsigned a, b;\n};\nstruct Outer {\n  int c;\n  Inner d, e;\n};\n")
    inner = sources.Struct("a", "Inner").dtype
    assert inner == np.dtype([("a", "u4"), ("b", "u4")])
    outer = sources.Struct("a", "Outer", Inner=inner)
    assert outer(c=1, d=(2, 2**32 - 1), e=(4, 5)).tolist() == (1, (2, 2**32 - 1), (4, 5))


def test_a_field_may_be_an_array(folder: Path) -> None:
    (folder / "a.cu").write_text("constexpr int MOST = 3;\nstruct S {\n  int a[MOST];\n  float b;\n};\n")
    assert sources.Struct("a", "S")(a=[4, 5, 6], b=0.5)["a"].tolist() == [4, 5, 6]


def test_what_is_not_there_is_an_error(folder: Path) -> None:
    (folder / "a.cu").write_text("constexpr int THREADS = 128, HELD = 4;\nstruct S {\n  int a;\n  short b;\n};\n")
    assert sources.constant("a", "THREADS") == 128
    assert sources.constant("a", "HELD") == 4
    with pytest.raises(LookupError, match=r"a\.cu has no constexpr int STRIP"):
        sources.constant("a", "STRIP")
    with pytest.raises(LookupError, match=r"a\.cu has no struct T"):
        sources.Struct("a", "T")
    with pytest.raises(LookupError, match=r"S of a\.cu has a field of type short"):
        sources.Struct("a", "S")
