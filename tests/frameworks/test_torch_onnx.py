"""torch.onnx.export of the operators, run by ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import EACH
from cases.case import Case
from frameworks.comparing import PLAIN, assert_close, double

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
from frameworks.torch_tensors import flat, tensors  # noqa: E402

from cudcn.torch import onnx  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def sampled(case: Case) -> Case:
    return replace(case, sampling_ratio=2) if hasattr(case, "sampling_ratio") else case  # type: ignore[call-arg]


def export(case: Case, **options: Any) -> Any:
    class Model(torch.nn.Module):
        def forward(self, given: Any) -> Any:
            return case.forward(given)

    given = {name: t for name, t in tensors(case, "float32", grad=False).items()}
    return torch.onnx.export(
        Model().eval(), kwargs={"given": given}, dynamo=True, verbose=False, optimize=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("case", [PLAIN, *map(sampled, EACH)], ids=str)
def test_onnx_runtime_agrees(case: Case) -> None:
    """Nothing but torch.onnx.export is called, and no node is of another domain than ONNX's own."""
    model = export(case, opset_version=20).model_proto
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # other numbers than those of the export
    given = tensors(replace(case, name=f"{case.name} again"), "float32", grad=False)
    inputs = [t for t in given.values() if t is not None]
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    assert_close(session.run(None, feeds)[0], double(case.forward(given)), tolerance=1e-5)
    kinds = {node.op_type for node in model.graph.node}
    assert ("DeformConv" in kinds) == (case.op.name == "deform_conv2d")


def test_refuses_as_many_samples_as_a_roi_has_pixels() -> None:
    case = replace(next(case for case in EACH if case.op.name == "deform_roi_pool"), sampling_ratio=0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="deform_roi_pool: sampling_ratio must be above 0"):
        onnx.compute(case.op, *tensors(case).values(), *flat(case))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="deform_roi_pool"):
        export(case)
