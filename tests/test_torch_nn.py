"""torch.nn modules: their parameters are named as those they replace, and they call the operators as they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from adapter_cases import PLAIN

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
    with pytest.raises(ValueError, match="MSDeformAttn: n_heads must divide d_model, got n_heads=3, d_model=8"):
        nn.MSDeformAttn(8, n_heads=3)
    module = nn.MSDeformAttn(8, n_levels=1)
    index = torch.tensor([[2, 2]]), torch.tensor([0])
    with pytest.raises(ValueError, match="MSDeformAttn: reference_points must be"):
        module(torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 3), torch.zeros(1, 4, 8), *index)
