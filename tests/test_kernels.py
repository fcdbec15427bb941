"""The NVRTC gate: every kernel instance compiles for every GPU we name, within its registers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cudcn import launch, nvrtc

pytest.importorskip("cupy")
SOURCES = sorted({kernel.source for kernel in nvrtc.kernels()})
TEST_KERNELS = Path(__file__).parent / "kernels"


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills_or_stack(source: str, architecture: str) -> None:
    expressions = [k.expression for k in nvrtc.kernels() if k.source == source]
    resources = nvrtc.compile_kernels(launch.SOURCES / f"{source}.cu", expressions, architecture)
    assert set(resources) == set(expressions)
    for expression, used in resources.items():
        assert (used.stack, used.spills) == (0, 0), expression
        assert 0 < used.registers <= 128, expression  # 256 threads a block, two blocks at the least
        assert used.shared <= 48 << 10, expression


def test_every_source_is_in_the_list() -> None:
    assert sorted(path.stem for path in launch.SOURCES.glob("*.cu")) == SOURCES


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
def test_fragments_compile(architecture: str) -> None:
    """mma, ldmatrix and cp.async as inline PTX; the bfloat16 and TF32 ones are for sm_80 and later."""
    expressions = ["multiply_by_hand<__half>", "multiply_by_ldmatrix<__half, true>", "reverse_asynchronously"]
    if architecture != "sm_75":
        expressions += ["multiply_by_hand<__nv_bfloat16>", "multiply_tf32", "reduce_warps"]
    resources = nvrtc.compile_kernels(TEST_KERNELS / "fragments.cu", expressions, architecture)
    assert set(resources) == set(expressions)


def test_the_gate_sees_a_stack_frame(tmp_path: Path) -> None:
    source = tmp_path / "stack.cu"
    source.write_text(
        """__global__ void indexed(float *out, const int *at) {
             float local[64];
             for (int i = 0; i < 64; ++i) local[at[i] & 63] = out[i];
             out[threadIdx.x] = local[at[threadIdx.x] & 63];
           }"""
    )
    assert nvrtc.compile_kernels(source, ["indexed"], "sm_80")["indexed"].stack > 0


def test_an_error_shows_the_log(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken(float *out) { out[0] = missing; }")
    with pytest.raises(RuntimeError, match=r"(?s)broken.cu does not compile for sm_80.*missing"):
        nvrtc.compile_kernels(source, ["broken"], "sm_80")


def test_a_changed_header_changes_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's cache key covers the options, not the headers: an old kernel must not run after an edit."""
    for path in launch.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(launch, "SOURCES", tmp_path)
    before = launch.sources_hash.__wrapped__()
    header = tmp_path / "bilinear.cuh"
    header.write_text(header.read_text() + "\n")
    assert launch.sources_hash.__wrapped__() != before
    assert any(launch.sources_hash() in option for option in launch.compile_options())


def test_the_table_can_be_printed() -> None:
    command = [sys.executable, "-m", "cudcn", "kernels", "--arch", "sm_80"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel in nvrtc.kernels():
        assert f"| `{kernel.expression}` | " in printed
    assert " regs, " in printed
