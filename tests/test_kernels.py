"""The NVRTC gate: every kernel instance compiles for every GPU we name, within its registers and its budget."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import budgets
import pytest

from cudcn import launch, nvrtc, sass, sources
from cudcn.__main__ import main
from cudcn.dtypes import DTYPES

pytest.importorskip("cupy")
SOURCES = sorted({kernel.source for kernel in nvrtc.kernels()})
TEST_KERNELS = Path(__file__).parent / "emulator" / "kernels"


def compiled(source: str, architecture: str) -> nvrtc.Compiled:
    """All instances of a source, without spills or stack."""
    expressions = [k.expression for k in nvrtc.kernels() if k.source == source]
    found = nvrtc.compiled(sources.path(source), expressions, architecture)
    assert set(found.resources) == set(expressions)
    for expression, used in found.resources.items():
        assert (used.stack, used.spills) == (0, 0), expression
        assert 0 < used.registers <= 128, expression  # 256 threads a block, two blocks at the least
        assert used.shared <= 48 << 10, expression
    return found


@pytest.mark.parametrize("architecture", sorted({*nvrtc.ARCHITECTURES} - {budgets.ARCHITECTURE}))
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills_or_stack(source: str, architecture: str) -> None:
    compiled(source, architecture)


@pytest.mark.parametrize("source", SOURCES)
def test_within_its_budget(source: str) -> None:
    """`python tests/budgets.py` writes the budgets anew."""
    found = compiled(source, budgets.ARCHITECTURE)
    if sass.nvdisasm() is None:
        pytest.skip("nvdisasm is not installed")
    version, tables = budgets.read()
    allowed, used = tables[source], budgets.used(found)
    assert set(allowed) == set(used)
    assert not {e: lack for e in used if (lack := allowed[e].lack(used[e]))}
    if version != budgets.nvrtc_version():
        pytest.skip(f"the budgets are for NVRTC {version}, this is {budgets.nvrtc_version()}")
    assert not {e: excess for e in used if (excess := allowed[e].excess(used[e]))}


def budgets_of(name: str, dtype: str) -> list[budgets.Budget]:
    """Of all instances of a template for one dtype."""
    tables = budgets.read()[1].values()
    found = [budget for table in tables for e, budget in table.items() if re.match(rf"{name}<{dtype}\b", e)]
    assert found, f"no kernel {name}<{dtype}>"
    return found


@pytest.mark.parametrize("dtype", ["__half", "__nv_bfloat16", "Tf32"])
@pytest.mark.parametrize("name", ["forward", "backward_offset", "backward_weight", "backward_input"])
def test_convolutions_use_tensor_cores(name: str, dtype: str) -> None:
    """But for those of small groups."""
    assert any(budget.products for budget in budgets_of(f"deform_conv2d_{name}", dtype))


@pytest.mark.parametrize("dtype", [dtype.ctype for dtype in DTYPES.values()])
@pytest.mark.parametrize("name", ["forward", "backward_offset", "backward_weight", "backward_input"])
def test_convolutions_load_16_bytes(name: str, dtype: str) -> None:
    assert all(budget.wide_loads for budget in budgets_of(f"deform_conv2d_{name}", dtype))


@pytest.mark.parametrize("dtype", [dtype.ctype for dtype in DTYPES.values()])
@pytest.mark.parametrize("name", ["aggregate_forward", "aggregate_backward_places", "aggregate_backward_input"])
def test_aggregates_load_16_bytes(name: str, dtype: str) -> None:
    """Where the channels allow it."""
    assert any(budget.wide_loads for budget in budgets_of(name, dtype))


@pytest.mark.parametrize(
    ("used", "excess", "lack"),
    [
        ((64, 1024, 500, 16, 4), None, None),
        ((60, 1000, 400, 8, 2), None, None),
        ((65, 1024, 500, 16, 4), "65 registers, budgeted are 64", None),
        ((64, 1028, 500, 16, 4), "1028 shared, budgeted are 1024", None),
        ((64, 1024, 501, 16, 4), "501 instructions, budgeted are 500", None),
        ((64, 1024, 399, 16, 4), "399 instructions, budgeted are 500", None),
        ((64, 1024, 500, 0, 4), None, "0 products, budgeted are 16"),
        ((64, 1024, 500, 16, 0), None, "0 wide_loads, budgeted are 4"),
    ],
)
def test_budgets_are_held(used: tuple, excess: str | None, lack: str | None) -> None:
    budget = budgets.Budget(64, 1024, 500, 16, 4)
    assert budget.excess(budgets.Budget(*used)) == excess
    assert budget.lack(budgets.Budget(*used)) == lack


def test_every_source_is_in_the_list() -> None:
    assert sorted(path.stem for path in sources.FOLDER.glob("*.cu")) == SOURCES


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
    for path in sources.FOLDER.glob("*.cu*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    before = sources.digest.__wrapped__()
    header = tmp_path / "bilinear.cuh"
    header.write_text(header.read_text() + "\n")
    assert sources.digest.__wrapped__() != before
    assert any(sources.digest() in option for option in launch.compile_options())


def test_the_table_can_be_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some = [
        kernel for kernel in nvrtc.kernels() if "conv2d_count<" in kernel.expression or "Average>" in kernel.expression
    ]
    monkeypatch.setattr(nvrtc, "kernels", lambda: some)
    monkeypatch.setattr("sys.argv", ["cudcn", "kernels", "--arch", "sm_80", "--arch", "sm_90"])
    main()
    printed = capsys.readouterr()
    assert "| kernel | sm_80 | sm_90 |" in printed.out
    for kernel in some:
        assert re.search(rf"\| `{re.escape(kernel.expression)}` (\| \d+ regs, \d+ B shared ){{2}}\|", printed.out)
    counts = Counter(kernel.source for kernel in some)
    assert printed.err.splitlines() == [
        f"{source}.cu for {architecture}: {n} kernels"
        for source, n in counts.items()
        for architecture in ("sm_80", "sm_90")
    ]


@pytest.fixture
def failure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `python -m cudcn kernels` says when it cannot go on."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["cudcn", "kernels", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return str(stopped.value)

    return run


def test_missing_cupy(failure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    message = r"cudcn kernels: CuPy cannot be imported .*pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime"
    assert re.fullmatch(f"python -m {message}", failure())


def test_missing_compiler(failure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found() -> None:
        raise OSError("no libnvrtc.so.13\nin twenty places")

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", not_found)
    assert failure().endswith("NVRTC was not found (no libnvrtc.so.13): install nvidia-cuda-nvrtc")


def test_missing_headers(failure: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvrtc._nvrtc()  # loads the library, which lies beside the headers
    monkeypatch.setitem(sys.modules, "nvidia", None)
    for place in (None, str(tmp_path)):
        if place:
            monkeypatch.setenv("CUDA_PATH", place)
        else:
            monkeypatch.delenv("CUDA_PATH", raising=False)
        assert failure().endswith("cuda_fp16.h was not found: install nvidia-cuda-runtime, or set CUDA_PATH")


def test_unknown_architecture(failure: Callable) -> None:
    message = ".cu does not compile for sm_8: nvrtc: error: invalid value for --gpu-architecture (-arch)"
    assert " ".join(failure("--arch", "sm_8").split()).endswith(message)
