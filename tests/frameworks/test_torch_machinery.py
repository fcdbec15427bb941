"""The torch operators in what a model is put into: memory formats, compilers, tracers, processes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import ADAPTED, EACH
from cases.case import Case, Tensors
from frameworks.comparing import PLAIN, assert_close, double

import cudcn

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import flat, gradients, overload, tensors, to_torch  # noqa: E402

import cudcn.torch.nn  # noqa: E402

jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
PLANAR = [case for case in ADAPTED if "rois" in case.op.tensors or getattr(case, "layout", None) == "NCHW"]


def channels_last(given: Tensors, grad: bool = True) -> Tensors:
    """Each tensor of four axes in this format."""
    return {
        name: t
        if t is None or t.ndim != 4
        else t.detach().to(memory_format=torch.channels_last).requires_grad_(grad and t.requires_grad)
        for name, t in given.items()
    }


@pytest.mark.parametrize("device", ["cpu", "emulator"])
@pytest.mark.parametrize("case", PLANAR, ids=str)
def test_channels_last(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients keep the format of their tensors, and the values; torch.compile is told the same."""
    monkeypatch.setenv("CUDCN_DEVICE", device)
    plain = tensors(case)
    given = channels_last(plain)
    assert not given["input"].is_contiguous()
    grad_output = to_torch(case.grad_output())
    out, want = case.forward(given), case.forward(plain)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert want.is_contiguous()
    assert_close(out, double(want))
    raw = case.backward(given, grad_output.to(memory_format=torch.channels_last))
    want.backward(grad_output)
    for name, want in gradients(plain).items():
        assert_close(raw[name], double(want))
        if want is not None:
            assert raw[name].stride() == given[name].stride()


@pytest.mark.parametrize("case", PLANAR, ids=str)
def test_opcheck_channels_last(case: Case) -> None:
    given = channels_last(tensors(case))
    torch.library.opcheck(overload(case.op.name), (*given.values(), *flat(case)))
    given = {name: None if t is None else t.detach() for name, t in given.items()}
    grad_output = torch.ones_like(case.forward(given))
    needs = case.op.differentiable([*given.values()])
    torch.library.opcheck(overload(f"{case.op.name}_backward"), (grad_output, *given.values(), *flat(case), needs))


@pytest.mark.parametrize("case", PLANAR, ids=str)
def test_compiled_channels_last(case: Case) -> None:
    torch._dynamo.reset()
    given = channels_last(tensors(case, grad=False), grad=False)
    compiled = torch.compile(lambda given: case.forward(given).relu(), fullgraph=True, backend="aot_eager")
    out = compiled(given)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, double(case.forward(given).relu()))


@pytest.mark.parametrize("case", [PLAIN, *(case for case in EACH if "rois" not in case.op.tensors)], ids=str)
def test_no_recompilation_for_another_size(case: Case) -> None:
    """One graph for every batch, and for every height and width."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(case.forward, fullgraph=True, dynamic=True, backend=backend)
    # of sizes that are no other sizes by chance, which torch would take for the same
    sizes = [{"size": (31, 33)}, {"size": (41, 47)}] if hasattr(case, "size") else [{}, {}]
    for batch, size in zip((13, 17), sizes, strict=True):
        other = replace(case, batch=batch, **size)  # type: ignore[call-arg]
        given = tensors(other, grad=False)
        assert_close(compiled(given), double(other.forward(given)))
    assert len(graphs) == 1


@jit_is_deprecated
@pytest.mark.parametrize("name", [f"{case.op.name}{end}" for case in EACH for end in ("", "_backward")])
def test_script_is_refused_in_words(name: str) -> None:
    match = f"{name}: torch.jit.script is not supported; use torch.export"
    for module in cudcn, cudcn.torch:
        with pytest.raises(NotImplementedError, match=match):
            torch.jit.script(getattr(module, name))


@jit_is_deprecated
@pytest.mark.parametrize("case", EACH, ids=str)
def test_jit_trace(case: Case, tmp_path: Path) -> None:
    """Saved and loaded, with other numbers and gradients."""
    given = {name: t for name, t in tensors(case, grad=False).items() if t is not None}
    function = lambda *t: case.forward({**dict.fromkeys(case.op.tensors), **dict(zip(given, t, strict=True))})  # noqa: E731
    torch.jit.trace(function, tuple(given.values())).save(str(tmp_path / "traced.pt"))
    traced = torch.jit.load(str(tmp_path / "traced.pt"))
    others = [t for t in tensors(replace(case, name=f"{case.name} again")).values() if t is not None]
    out = traced(*others)
    assert_close(out, double(function(*others)))
    wanted = [t for t in others if t.requires_grad]
    want = torch.autograd.grad(function(*others).square().sum(), wanted)
    for got, expected in zip(torch.autograd.grad(out.square().sum(), wanted), want, strict=True):
        assert_close(got, double(expected))


class Network(torch.nn.Module):
    """Of modules whose convolution is PLAIN's operator, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = cudcn.torch.nn.ModulatedDeformConv2dPack(3, 4, 3, padding=1)
        self.second = cudcn.torch.nn.ModulatedDeformConv2dPack(4, 2, 3, padding=1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.double()

    def forward(self, input: Any) -> Any:
        return self.second(self.first(input).relu())


def test_pickled_and_copied() -> None:
    network, input = Network(), torch.rand(2, 3, 5, 6, dtype=torch.float64)
    for other in copy.deepcopy(network), pickle.loads(pickle.dumps(network)):
        assert torch.equal(other(input), network(input))


def test_symbolic_tracing_with_the_layers_as_leaves() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: Any, name: str) -> bool:
            return isinstance(module, cudcn.torch.nn.ModulatedDeformConv2dPack) or super().is_leaf_module(module, name)

    network, input = Network(), torch.rand(2, 3, 5, 6, dtype=torch.float64)
    graph = Tracer().trace(network)
    (relu,) = (node for node in graph.nodes if node.name == "relu")
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ({"features": relu, "out": output.args[0]},)  # as create_feature_extractor does
    found = torch.fx.GraphModule(network, graph)(input)
    assert torch.equal(found["features"], network.first(input).relu())
    assert torch.equal(found["out"], network(input))


def train(network: Any, input: Any) -> None:
    network(input).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.5).step()


def one_of_two_processes(rank: int, rendezvous: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    network = Network()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(network.first, mesh=mesh)
        fully_shard(network, mesh=mesh)
        train(network, batch()[2 * rank : 2 * rank + 2])
        found = {name: t.full_tensor() for name, t in network.state_dict().items()}
    else:
        train(torch.nn.parallel.DistributedDataParallel(network), batch()[2 * rank : 2 * rank + 2])
        found = network.state_dict()
    alone = Network()
    train(alone, batch())
    before = Network().state_dict()
    for name, want in alone.state_dict().items():
        torch.testing.assert_close(found[name], want)
        assert not torch.equal(want, before[name])
    torch.distributed.destroy_process_group()


def batch() -> Any:
    return torch.rand(4, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two_processes, args=(str(tmp_path / "rendezvous"), kind), nprocs=2)
