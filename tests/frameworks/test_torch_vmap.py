"""torch.func.vmap of the operators against a loop over the items, in one call of the operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
from cases import ADAPTED, EACH
from cases.case import Case, Tensors
from frameworks.comparing import PLAIN, assert_close, double

from cudcn.op import Op

torch = pytest.importorskip("torch")
from frameworks.torch_tensors import differentiable, forward_of, loss_of, tensors, to_torch  # noqa: E402

LEVELS = {"spatial_shapes", "level_start_index"}
SIZE = 3


def kinds(case: Case) -> Any:
    return case.op.name, tuple(case.tensors()[name] is None for name in case.op.tensors), getattr(case, "layout", None)


CASES = [*{kinds(case): case for case in ADAPTED}.values()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the raw pair is called."""
    seen = {"forward": 0, "backward": 0}
    for name in seen:
        original = getattr(Op, name)

        def spy(*arguments: Any, name: str = name, original: Any = original) -> None:
            seen[name] += 1
            original(*arguments)

        monkeypatch.setattr(Op, name, spy)
    return seen


def subsets(names: Any) -> Iterator[tuple[str, ...]]:
    """All but the empty one."""
    return chain.from_iterable(combinations(names, count) for count in range(1, len(names) + 1))


def items(case: Case) -> list[Tensors]:
    """The tensors of SIZE items, with other numbers."""
    some = [tensors(replace(case, name=f"{case.name} {i}"), grad=False) for i in range(SIZE)]
    if some[0].keys() >= LEVELS:
        some[1]["spatial_shapes"] = some[1]["spatial_shapes"].flip(1)
        if some[2]["level_start_index"] is not None:
            some[2]["level_start_index"] = 0 * some[2]["level_start_index"]
    return some


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_combination_of_mapped_tensors(case: Case, calls: dict[str, int]) -> None:
    """Along the last axis of one, the first of the next, and so on; output and every gradient, of one call each."""
    each = items(case)
    given = {name: t for name, t in each[0].items() if t is not None}
    wanted = list(differentiable(case))
    grad_output = to_torch(case.grad_output())

    def both(given: Tensors) -> Any:
        def forward(*values: Any) -> Any:
            return case.forward({**dict.fromkeys(case.op.tensors), **given, **dict(zip(wanted, values, strict=True))})

        output, pull = torch.func.vjp(forward, *(given[name] for name in wanted))
        return output, pull(grad_output)

    for mapped in subsets(given):
        dims = {name: -1 if i % 2 else 0 for i, name in enumerate(mapped)}
        stacked = {name: torch.stack([item[name] for item in each], dims[name]) for name in mapped}
        calls.update(forward=0, backward=0)
        outputs, grads = torch.vmap(both, in_dims=({**dict.fromkeys(given), **dims},), out_dims=(1, 0))(
            {**given, **stacked}
        )
        count = 1 if LEVELS.isdisjoint(mapped) else SIZE
        assert calls == {"forward": count, "backward": count}, mapped
        for i, item in enumerate(each):
            want, wants = both({**given, **{name: item[name] for name in mapped}})
            assert_close(outputs[:, i], double(want))
            for got, expected in zip(grads, wants, strict=True):
                assert_close(got[i], double(expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_gradient_alone(case: Case, calls: dict[str, int]) -> None:
    """Of each tensor, while each other one is mapped."""
    each = items(case)
    for name in differentiable(case):
        for mapped in set(differentiable(case)) - {name}:
            gradient = torch.func.grad(loss_of(case, [name, mapped]))
            own = torch.stack([item[mapped] for item in each])
            calls.update(forward=0, backward=0)
            grads = torch.vmap(gradient, in_dims=(None, 0))(each[0][name], own)
            assert calls == {"forward": 1, "backward": 1}
            for got, other in zip(grads, own, strict=True):
                assert_close(got, double(gradient(each[0][name], other)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nested(case: Case, calls: dict[str, int]) -> None:
    """One axis of the first tensor, another of the last, and gradients through both."""
    given = differentiable(case)
    first, last = next(iter(given)), next(reversed(given))
    ones = torch.stack([given[first], 2 * given[first]])
    others = torch.stack([item[last] for item in items(case)], -1)
    if first == last:
        alone = forward_of(case, [first])
        function = lambda one, other: alone(one + other)  # noqa: E731
    else:
        function = forward_of(case, [first, last])
    nested = torch.vmap(torch.vmap(function, in_dims=(None, -1), out_dims=-1), in_dims=(0, None))
    calls.update(forward=0, backward=0)
    outputs, pull = torch.func.vjp(nested, ones, others)
    grads = pull(torch.ones_like(outputs))
    assert calls == {"forward": 1, "backward": 1}

    leaves = [ones.clone().requires_grad_(), others.clone().requires_grad_()]
    want = torch.stack([torch.stack([function(one, other) for other in leaves[1].unbind(-1)], -1) for one in leaves[0]])
    assert_close(outputs, double(want))
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        assert_close(got, double(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in EACH if "rois" in case.op.tensors], ids=str)
def test_images_beyond_what_half_types_count(case: Case, dtype: str) -> None:
    """Item i has the images 2 * i and 2 * i + 1 of all: 2,999 is no number of float16."""
    size = 1500
    given = tensors(case, dtype, grad=False)
    given["rois"] = given["rois"].roll(1, 0)
    stacked = torch.zeros(size, *given["input"].shape, dtype=given["input"].dtype)
    stacked[-1] = given["input"]
    outputs = torch.vmap(lambda input: case.forward({**given, "input": input}))(stacked)
    assert torch.equal(outputs[-1], case.forward(given))
    assert not outputs[:-1].any()


@pytest.mark.parametrize("image", [-1.0, 2.0, 0.5, float("nan")])
@pytest.mark.parametrize("case", [case for case in EACH if "rois" in case.op.tensors], ids=str)
def test_rois_of_no_image_of_their_item(case: Case, image: float) -> None:
    """That the batch has more images once it is folded makes none of them theirs."""
    given = tensors(case, grad=False)
    given["rois"][1, 0] = image
    stacked = torch.stack([given["input"]] * 2)
    with pytest.raises(ValueError, match=r"rois\[1, 0\] must be an image's index"):
        torch.vmap(lambda input: case.forward({**given, "input": input}))(stacked)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_refuses_an_axis_of_length_0(case: Case) -> None:
    name, tensor = next(iter(differentiable(case).items()))
    with pytest.raises(NotImplementedError, match=f"{case.op.name}: vmap over an axis of length 0"):
        torch.vmap(forward_of(case, [name]))(tensor[None][:0])


def test_gradients_of_each_sample() -> None:
    """Of weights that all samples share: what torch.func.vmap is most used for."""
    given = tensors(PLAIN, grad=False)
    weights = {name: given.pop(name) for name in ("weight", "bias")}
    images = {name: t[:, None] for name, t in given.items()}
    gradient = torch.func.grad(lambda weights, images: PLAIN.forward({**images, **weights}).square().sum())
    grads = torch.vmap(gradient, in_dims=(None, 0))(weights, images)
    for i in range(PLAIN.batch):
        want = gradient(weights, {name: t[i] for name, t in images.items()})
        for name in weights:
            assert_close(grads[name][i], double(want[name]))
