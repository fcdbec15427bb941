"""torch.nn modules: their parameters are named as those they replace, and they call the operators as they say."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from frameworks.comparing import PLAIN

import cudcn

torch = pytest.importorskip("torch")
from cudcn.torch import nn  # noqa: E402

ATTRIBUTES = PLAIN.attributes


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def shaken(module: Any) -> Any:
    """With random parameters: many start at zero, and would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.double()


def has_gradients(module: Any, out: Any) -> None:
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# what makes each module, and the shapes of what goes in; MSDeformAttn takes its levels too
MODULES: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]]]] = {
    "DeformConv2d": (lambda: nn.DeformConv2d(4, 6, 3), [(2, 4, 5, 6), (2, 18, 3, 4), (2, 9, 3, 4)]),
    "ModulatedDeformConv2d": (lambda: nn.ModulatedDeformConv2d(4, 6, 3, padding=((1, 0), (2, 1))), [(2, 4, 5, 6)]),
    "DCNv3": (lambda: nn.DCNv3(6, group=2, center_feature_scale=True), [(2, 5, 6, 6)]),
    "DCNv4": (lambda: nn.DCNv4(6, group=2, dw_kernel_size=3, center_feature_scale=True), [(2, 5, 6, 6)]),
    "MSDeformAttn": (lambda: nn.MSDeformAttn(8, 2, 2, 3), [(2, 4, 8), (2, 4, 2, 2), (2, 39, 8)]),
}
LEVELS = [[5, 6], [3, 3]], [0, 30]


def made(name: str, batch: int = 2, dtype: Any = None) -> tuple[Any, list[Any]]:
    """A module, and random tensors that it takes; on torch's default device."""
    torch.manual_seed(0)
    make, shapes = MODULES[name]
    inputs = [torch.rand(batch, *shape[1:], dtype=dtype) for shape in shapes]
    return make().to(dtype), [*inputs, *map(torch.tensor, LEVELS if name == "MSDeformAttn" else [])]


@pytest.mark.parametrize("name", MODULES)
def test_on_meta(name: str) -> None:
    with torch.device("meta"):
        module, inputs = made(name)
        out = module(*inputs)
        out.sum().backward()
    assert out.is_meta
    assert all(p.grad.is_meta for p in module.parameters())
    real, inputs = made(name)
    assert out.shape == real(*inputs).shape


@pytest.mark.parametrize("name", MODULES)
def test_empty_batches(name: str) -> None:
    module, inputs = made(name, batch=0)
    out = module(*inputs)
    real, inputs = made(name)
    assert out.shape == (0, *real(*inputs).shape[1:])
    out.sum().backward()
    assert not any(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_copies_are_the_same(name: str) -> None:
    module, inputs = made(name)
    shaken(module).float()
    for again in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert torch.equal(again(*inputs), module(*inputs))
        assert repr(again) == repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_other_dtypes(name: str, dtype: Any) -> None:
    module, inputs = made(name, dtype=dtype)
    out = module(*inputs)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("name", MODULES)
def test_default_dtype(name: str) -> None:
    module, inputs = made(name)
    assert module(*inputs).dtype == torch.float64


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str) -> None:
    module, inputs = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*inputs)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("name", ["DeformConv2d", "ModulatedDeformConv2d"])
def test_attributes_are_pairs(name: str) -> None:
    module = getattr(nn, name)(4, 6, 3, 2, 1, np.int64(1))
    assert (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (2, 2), (1, 1), (1, 1))
    assert all(type(n) is int for n in module.dilation)
    assert "stride=(2, 2), padding=(1, 1), dilation=(1, 1)" in repr(module)
    module = getattr(nn, name)(4, 6, 3, padding=[[1, 0], 2])
    assert module.padding == ((1, 0), (2, 2))


@pytest.mark.parametrize("padding", [((1, 0), (1, 1)), ((0, 2), (3, 1)), ((1, 1), (0, 2))])
def test_modulated_deform_conv2d_pads_unevenly(padding: Any) -> None:
    settings = {"stride": (1, 2), "dilation": (2, 1), "groups": 2}
    module = nn.ModulatedDeformConv2d(4, 6, 3, padding=padding, offset_groups=2, **settings)
    (top, bottom), (left, right) = padding
    input = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    start = torch.nn.functional.conv2d(padded, module.weight.double() / 2, module.bias.double(), **settings)
    shaken(module)
    channels = torch.nn.functional.conv2d(
        padded, module.conv_offset.weight, module.conv_offset.bias, settings["stride"], 0, settings["dilation"]
    )
    want = cudcn.deform_conv2d(
        input, channels[:, :36], module.weight, module.bias, channels[:, 36:].sigmoid(),
        stride=(1, 2), padding=padding, dilation=(2, 1),
    )  # fmt: skip
    out = module(input)
    assert out.shape == start.shape
    torch.testing.assert_close(out, want)
    has_gradients(module, out)


NO_INTEGER = (4.0, "4", None, True)
NO_PAIR = (3.0, "3", "33", None, True, (1, 2, 3))
NO_FLAG = (1, 0.5, None, "True", torch.ones(2))
CONVOLUTION = {
    **dict.fromkeys(["in_channels", "out_channels", "groups"], NO_INTEGER),
    **dict.fromkeys(["kernel_size", "stride", "padding", "dilation"], NO_PAIR),
    "bias": NO_FLAG,
}
DCN = {
    **dict.fromkeys(["channels", "kernel_size", "stride", "dilation", "group"], (*NO_INTEGER, (3, 3))),
    "dw_kernel_size": (3.0, "3", True, (3, 3), 0),
    "offset_scale": ("1", None, True, math.inf),
    **dict.fromkeys(["center_feature_scale", "remove_center"], NO_FLAG),
}
# of each module: arguments that are right, and for each argument values of a wrong type
ARGUMENTS: dict[str, tuple[tuple[int, ...], dict[str, tuple[Any, ...]]]] = {
    "DeformConv2d": ((4, 4, 3), CONVOLUTION),
    "ModulatedDeformConv2d": ((4, 4, 3), {**CONVOLUTION, "offset_groups": NO_INTEGER}),
    "DCNv3": ((8, 3), DCN),
    "DCNv4": ((8, 3), {**DCN, **dict.fromkeys(["output_bias", "without_pointwise"], NO_FLAG)}),
    "MSDeformAttn": ((), dict.fromkeys(["d_model", "n_levels", "n_heads", "n_points"], NO_INTEGER)),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, wrong) in ARGUMENTS.items() for argument in wrong]
)
def test_arguments_of_wrong_types(name: str, argument: str) -> None:
    module, (values, wrong) = getattr(nn, name), ARGUMENTS[name]
    right = inspect.signature(module).bind(*values).arguments
    module(**right)
    for value in wrong[argument]:
        with pytest.raises((TypeError, ValueError), match=f"{name}: {argument}.* must be .*, got"):
            module(**{**right, argument: value})


def test_a_count_of_groups_is_no_bias() -> None:
    with pytest.raises(TypeError, match="ModulatedDeformConv2d: bias must be True or False, got 4"):
        nn.ModulatedDeformConv2d(16, 16, 3, 1, 1, 1, 1, 4)  # in mmcv's order: deform_groups


def test_dcnv3() -> None:
    settings = {"kernel_size": 3, "stride": 2, "dilation": 2, "group": 2, "offset_scale": 0.5, "remove_center": True}
    module = shaken(nn.DCNv3(6, dw_kernel_size=5, **settings))
    assert shapes(module) == {
        "dw_conv.0.weight": (6, 1, 5, 5), "dw_conv.0.bias": (6,), "dw_conv.1.1.weight": (6,), "dw_conv.1.1.bias": (6,),
        "offset.weight": (32, 6), "offset.bias": (32,), "mask.weight": (16, 6), "mask.bias": (16,),
        "input_proj.weight": (6, 6), "input_proj.bias": (6,), "output_proj.weight": (6, 6), "output_proj.bias": (6,),
    }  # fmt: skip
    input = torch.randn(2, 7, 8, 6, dtype=torch.float64)
    features = module.dw_conv(input.permute(0, 3, 1, 2))
    mask = module.mask(features).reshape(2, 4, 4, 2, 8).softmax(-1).reshape(2, 4, 4, 16)
    sampled = cudcn.dcnv3(module.input_proj(input), module.offset(features), mask, padding=2, **settings)
    out = module(input)
    torch.testing.assert_close(out, module.output_proj(sampled))
    has_gradients(module, out)


def test_dcnv3_with_center_feature_scale() -> None:
    module = shaken(nn.DCNv3(6, group=2, center_feature_scale=True))
    assert shapes(module)["center_feature_scale_proj_weight"] == (2, 6)
    input = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    has_gradients(module, module(input))
    with torch.no_grad():
        module.center_feature_scale_proj_weight.zero_()
        module.center_feature_scale_proj_bias.copy_(torch.tensor([1e3, -1e3]))  # all of group 0 from the projection
        plain = nn.DCNv3(6, group=2).double()
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if "center" not in k})
        module.output_proj, plain.output_proj = torch.nn.Identity(), torch.nn.Identity()
        out = module(input)
        torch.testing.assert_close(out[..., :3], module.input_proj(input)[..., :3])
        torch.testing.assert_close(out[..., 3:], plain(input)[..., 3:])


def test_dcnv4() -> None:
    settings = {"kernel_size": 3, "stride": 2, "group": 2, "offset_scale": 2.0}
    module = shaken(nn.DCNv4(6, dw_kernel_size=3, **settings))
    assert shapes(module) == {
        "offset_mask_dw.weight": (6, 1, 3, 3), "offset_mask_dw.bias": (6,),
        "offset_mask.weight": (56, 6), "offset_mask.bias": (56,),
        "value_proj.weight": (6, 6), "value_proj.bias": (6,), "output_proj.weight": (6, 6), "output_proj.bias": (6,),
    }  # fmt: skip
    input = torch.randn(2, 7, 8, 6, dtype=torch.float64)
    features = module.offset_mask_dw(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    sampled = cudcn.dcnv4(module.value_proj(input), module.offset_mask(features), **settings)
    torch.testing.assert_close(module(input), module.output_proj(sampled))
    has_gradients(module, module(input))


def test_dcnv4_without_projections() -> None:
    module = shaken(nn.DCNv4(6, group=2, without_pointwise=True, center_feature_scale=True))
    input = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    out = cudcn.dcnv4(input, module.offset_mask(input), group=2)
    weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
    share = torch.nn.functional.linear(out, weight, bias).sigmoid().repeat_interleave(3, -1)
    torch.testing.assert_close(module(input), out * (1 - share) + input * share)
    has_gradients(module, module(input))


def test_ms_deform_attn_takes_levels_of_numpy() -> None:
    module, (*inputs, shapes, starts) = made("MSDeformAttn")
    assert torch.equal(module(*inputs, shapes.numpy(), starts.numpy()), module(*inputs, shapes, starts))


@pytest.mark.parametrize("boxes", [False, True])
def test_ms_deform_attn(boxes: bool) -> None:
    levels = [(5, 6), (3, 3)]
    module = shaken(nn.MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3))
    assert shapes(module) == {
        "sampling_offsets.weight": (24, 8), "sampling_offsets.bias": (24,),
        "attention_weights.weight": (12, 8), "attention_weights.bias": (12,),
        "value_proj.weight": (8, 8), "value_proj.bias": (8,), "output_proj.weight": (8, 8), "output_proj.bias": (8,),
    }  # fmt: skip
    query, input = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 39, 8, dtype=torch.float64)
    points = torch.rand(2, 4, 2, 4 if boxes else 2, dtype=torch.float64)
    index = torch.tensor(levels), torch.tensor([0, 30])
    padding = torch.rand(2, 39) < 0.2
    out = module(query, points, input, *index, padding)
    has_gradients(module, out)

    offsets = module.sampling_offsets(query).reshape(2, 4, 2, 2, 3, 2)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(levels):
        unit = points[:, :, None, level, None, 2:] / 6 if boxes else 1 / torch.tensor([width, height])
        locations[:, :, :, level] = points[:, :, None, level, None, :2] + offsets[:, :, :, level] * unit
    weights = module.attention_weights(query).reshape(2, 4, 2, 6).softmax(-1).reshape(2, 4, 2, 2, 3)
    value = module.value_proj(input) * ~padding[..., None]
    want = cudcn.ms_deform_attn(value.reshape(2, 39, 2, 4), *index, locations, weights)
    torch.testing.assert_close(out, module.output_proj(want))


def test_ms_deform_attn_starts_in_all_directions() -> None:
    bias = nn.MSDeformAttn(8, n_levels=2, n_heads=4, n_points=3).sampling_offsets.bias.reshape(4, 2, 3, 2)
    for head, (x, y) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(3):
            expected = torch.tensor([x, y]) * (point + 1.0)
            torch.testing.assert_close(bias[head, :, point], expected.expand(2, 2), atol=1e-6, rtol=0)
    diagonal = nn.MSDeformAttn(8, n_heads=8).sampling_offsets.bias.reshape(8, 4, 4, 2)[1, 0, 0]
    torch.testing.assert_close(diagonal, torch.ones(2), atol=1e-6, rtol=0)
    assert math.isclose(float(diagonal.detach().abs().max()), 1, rel_tol=1e-6)


def test_modules_refuse() -> None:
    with pytest.raises(ValueError, match="DCNv3: group must divide channels, got group=4, channels=6"):
        nn.DCNv3(6)
    with pytest.raises(ValueError, match="DCNv3: kernel sizes must be odd"):
        nn.DCNv3(8, kernel_size=2)
    with pytest.raises(ValueError, match="DCNv4: center_feature_scale needs stride 1, got 2"):
        nn.DCNv4(8, stride=2, dw_kernel_size=3, center_feature_scale=True)
    with pytest.raises(ValueError, match="DCNv4: stride above 1 needs dw_kernel_size"):
        nn.DCNv4(8, stride=2)
    with pytest.raises(ValueError, match="DCNv3: remove_center needs a square kernel of odd size above 1"):
        nn.DCNv3(8, kernel_size=1, remove_center=True)
    with pytest.raises(ValueError, match="MSDeformAttn: n_heads must divide d_model, got n_heads=3, d_model=8"):
        nn.MSDeformAttn(8, n_heads=3)
    module = nn.MSDeformAttn(8, n_levels=1)
    index = torch.tensor([[2, 2]]), torch.tensor([0])
    with pytest.raises(ValueError, match="MSDeformAttn: reference_points must be"):
        module(torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 3), torch.zeros(1, 4, 8), *index)
