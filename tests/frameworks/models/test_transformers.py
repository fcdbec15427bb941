"""`patch` on models of Hugging Face transformers: the same outputs and gradients, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[models]'")
from frameworks.models import zoo  # noqa: E402

from cudcn.torch import patch  # noqa: E402

pytestmark = [
    pytest.mark.models,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers' own, which are not ours to mend
]


def made(name: str, dtype: Any = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, and its inputs.

    All weights are shaken: at its own start a model samples whole pixels, where the slope is that of one side or of the
    other as the last bit of a position has it.
    """
    make, inputs, _ = zoo.MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs().items()}
    return model.to(dtype), given


def results(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs, and the gradients of one random number that hangs on all of them."""
    model.zero_grad()
    outputs = {key: t for key, t in model(**inputs).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for t in outputs.values():
        if t.requires_grad:
            shares = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            loss = loss + torch.where(t.isfinite(), t * shares, 0).sum()  # what a mask rules out is -inf
    loss.backward()
    return {**outputs, **{f"the gradient of {key}": p.grad for key, p in model.named_parameters()}}


def agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if expected is None:
            assert ours[key] is None, key
        else:
            scale = max(1.0, expected[expected.isfinite()].abs().max().item())
            torch.testing.assert_close(
                ours[key], expected, rtol=0, atol=tolerance * scale, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_outputs_and_gradients(name: str, dtype: Any, tolerance: float) -> None:
    model, inputs = made(name, dtype)
    theirs = results(copy.deepcopy(model), inputs)  # a copy, as OmDet-Turbo keeps what it made of the text
    assert len(patch(model)) == zoo.MODELS[name][2]
    agree(results(model, inputs), theirs, tolerance)


@pytest.mark.parametrize("name", ["rt_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_the_rest_of_the_model_stays(name: str) -> None:
    """One model for each way in which a module is replaced."""
    model, inputs = made(name)
    model(**inputs)  # transformers installs hooks in its first call
    before = {key: (id(t), t.requires_grad) for key, t in model.state_dict(keep_vars=True).items()}
    modules = {key: (id(module), type(module).__name__, module.training) for key, module in model.named_modules()}
    classes = {key: type(module) for key, module in model.named_modules()}
    replaced = patch(model)
    assert {key: (id(t), t.requires_grad) for key, t in model.state_dict(keep_vars=True).items()} == before
    assert {key: (id(m), type(m).__name__, m.training) for key, m in model.named_modules()} == modules
    assert all(isinstance(module, classes[key]) for key, module in model.named_modules())
    assert {key for key, module in model.named_modules() if type(module) is not classes[key]} == set(replaced)
    assert patch(model) == {}


@pytest.mark.parametrize("name", ["rt_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_copies_and_pickles_are_patched(name: str) -> None:
    model, inputs = made(name)
    replaced = patch(model)
    again = copy.deepcopy(model)
    for key in replaced:  # not the whole, as Mask2Former's hooks have no pickle
        again.set_submodule(key, pickle.loads(pickle.dumps(model.get_submodule(key))))
    assert patch(again) == {}
    agree(results(again, inputs), results(model, inputs), 0)


@pytest.mark.parametrize("name", ["rt_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_torch_compile_sees_the_operator(name: str) -> None:
    """Not the library's own function, which it might look up in that one's module; and it compiles once."""
    model, inputs = made(name)
    replaced = patch(model)
    expected = results(model, inputs)
    seen = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    for key in replaced:
        model.get_submodule(key.rpartition(".")[0]).compile(backend=backend)  # which holds it, and inlines its forward
    agree(results(model, inputs), expected, 0)
    compiled = len(seen)
    model(**inputs)
    assert len(seen) == compiled
    assert torch.ops.cudcn.ms_deform_attn.default in seen
    assert torch.nn.functional.grid_sample not in seen
