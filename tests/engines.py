"""Other libraries' operators, on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def onnx_runtime(operator: str, version: int, inputs: Mapping[str, np.ndarray], **attributes: Any) -> np.ndarray:
    """One ONNX operator of that version of its operator set; the inputs in its order."""
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, dict(inputs))
    return out


def openvino(build: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """`build(opset8, *parameters)`, a node of OpenVINO's, on float32 arrays."""
    import openvino
    from openvino import opset8

    parameters = [opset8.parameter(array.shape, np.float32) for array in arrays]
    model = openvino.Model([build(opset8, *parameters)], parameters)
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)[0]
