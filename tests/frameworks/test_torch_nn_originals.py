"""torch.nn modules against stand-ins for those of the libraries that they follow: arguments, names, results, starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from frameworks import peers  # noqa: E402
from frameworks.modules import agree, rand, results, shaken  # noqa: E402

from cudcn.torch import nn  # noqa: E402

# in the order that each library has published
SIGNATURES = {
    "DeformConv2d": "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True",
    "DeformConv2dPack":
        "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, "
        "bias=False, im2col_step=32",
    "ModulatedDeformConv2d":
        "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=True",
    "ModulatedDeformConv2dPack":
        "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=True",
    "DeformRoIPool": "output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1",
    "DeformRoIPoolPack":
        "output_size, output_channels, deform_fc_channels=1024, spatial_scale=1.0, sampling_ratio=0, gamma=0.1",
    "ModulatedDeformRoIPoolPack":
        "output_size, output_channels, deform_fc_channels=1024, spatial_scale=1.0, sampling_ratio=0, gamma=0.1",
    "DCNv3":
        "channels=64, kernel_size=3, dw_kernel_size=None, stride=1, pad=1, dilation=1, group=4, offset_scale=1.0, "
        "act_layer='GELU', norm_layer='LN', center_feature_scale=False, remove_center=False",
    "DCNv4":
        "channels=64, kernel_size=3, stride=1, pad=1, dilation=1, group=4, offset_scale=1.0, dw_kernel_size=None, "
        "center_feature_scale=False, remove_center=False, output_bias=True, without_pointwise=False",
    "MSDeformAttn": "d_model=256, n_levels=4, n_heads=8, n_points=4",
    "FlashDeformAttn": "d_model=256, n_levels=4, n_heads=8, n_points=4",
}  # fmt: skip
FORWARDS = {
    "DeformConv2d": "input, offset, mask=None",
    "DeformConv2dPack": "x",
    "ModulatedDeformConv2d": "x, offset, mask",
    "ModulatedDeformConv2dPack": "x",
    "DeformRoIPool": "input, rois, offset=None",
    "DeformRoIPoolPack": "input, rois",
    "ModulatedDeformRoIPoolPack": "input, rois",
    "DCNv3": "input",
    "DCNv4": "input, shape=None",
    "MSDeformAttn":
        "query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, "
        "input_padding_mask=None",
    "FlashDeformAttn":
        "query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, "
        "input_padding_mask=None",
}  # fmt: skip


def written(function: Callable[..., Any], kind: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters if p.kind is kind)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    module = getattr(nn, name)
    assert written(module, inspect.Parameter.POSITIONAL_OR_KEYWORD) == SIGNATURES[name]
    where = "" if name == "DeformRoIPool" else "device=None, dtype=None"  # that has no parameters
    assert written(module, inspect.Parameter.KEYWORD_ONLY) == where
    assert written(module.forward, inspect.Parameter.POSITIONAL_OR_KEYWORD) == "self, " + FORWARDS[name]


IMAGE, PLACES, MASK = (2, 4, 6, 7), (2, 36, 4, 3), (2, 18, 4, 3)
SETTINGS = ((1, 2), (1, 0), (2, 1), 2)  # stride, padding, dilation, groups
ROIS = torch.tensor([[0, 1.3, 2.1, 8.7, 9.2], [1, 0.4, 3.3, 7.9, 6.1]], dtype=torch.float64)


def attention(boxes: bool) -> dict[str, Any]:
    places = torch.rand(2, 4, 2, 4 if boxes else 2, dtype=torch.float64, requires_grad=True)
    return {
        "query": rand(2, 4, 8), "reference_points": places, "input_flatten": rand(2, 39, 8),
        "input_spatial_shapes": torch.tensor([[5, 6], [3, 3]]), "input_level_start_index": torch.tensor([0, 30]),
        "input_padding_mask": torch.rand(2, 39) < 0.3 if boxes else None,
    }  # fmt: skip


def pooled() -> dict[str, Any]:
    return {"input": rand(*IMAGE), "rois": ROIS}


# whose class of this name, what both are made of, by position, and what goes in
ORIGINALS: dict[str, tuple[Any, tuple[Any, ...], Callable[[], dict[str, Any]]]] = {
    "DeformConv2d": (
        peers.torchvision, (4, 6, 3, *SETTINGS, False),
        lambda: {"input": rand(*IMAGE), "offset": rand(*PLACES), "mask": rand(*MASK)},
    ),
    "DeformConv2d, v1": (
        peers.torchvision, (4, 6, (3, 3)), lambda: {"input": rand(*IMAGE), "offset": rand(2, 18, 4, 5)},
    ),
    "DeformConv2dPack": (peers.mmcv, (4, 6, 3, *SETTINGS, 2, False, 16), lambda: {"x": rand(*IMAGE)}),
    "ModulatedDeformConv2d": (
        peers.mmcv, (4, 6, 3, *SETTINGS, 2),
        lambda: {"x": rand(*IMAGE), "offset": rand(*PLACES), "mask": rand(*MASK)},
    ),
    "ModulatedDeformConv2dPack": (peers.mmcv, (4, 6, 3, *SETTINGS, 2), lambda: {"x": rand(*IMAGE)}),
    "ModulatedDeformConv2dPack, no bias": (
        peers.mmcv, (4, 6, (3, 1), 1, 0, 1, 1, 1, False), lambda: {"x": rand(*IMAGE)}
    ),
    "DeformRoIPool": (
        peers.mmcv, ((2, 3), 0.5, 2, 0.2), lambda: {**pooled(), "offset": rand(2, 2, 2, 3)}
    ),
    "DeformRoIPool, still": (peers.mmcv, (2, 0.5), pooled),
    "DeformRoIPoolPack": (peers.mmcv, ((2, 3), 4, 8, 0.5, 2, 0.2), pooled),
    "ModulatedDeformRoIPoolPack": (peers.mmcv, ((2, 3), 4, 8, 0.5, 0, 0.2), pooled),
    "DCNv3": (peers.internimage, (6, 3, None, 1, 1, 1, 2), lambda: {"input": rand(2, 5, 4, 6)}),
    "DCNv3, all arguments": (
        peers.internimage, (6, 3, 5, 1, 2, 2, 3, 1.5, "SiLU", "BN", True, True), lambda: {"input": rand(2, 5, 4, 6)}
    ),
    "DCNv3, an even kernel": (
        peers.internimage, (6, 4, 3, 1, 3, 2, 2, 1.0, "ReLU"), lambda: {"input": rand(2, 5, 4, 6)}
    ),
    "DCNv4": (peers.dcnv4, (6, 3, 1, 1, 1, 2), lambda: {"input": rand(2, 16, 6)}),
    "DCNv4, all arguments": (
        peers.dcnv4, (6, 3, 1, 2, 2, 3, 1.5, 5, True, True, False), lambda: {"input": rand(2, 20, 6), "shape": (5, 4)}
    ),
    "DCNv4, without pointwise": (
        peers.dcnv4, (6, 3, 1, 1, 1, 2, 1.0, None, True, False, True, True),
        lambda: {"input": rand(2, 20, 6), "shape": (5, 4)},
    ),
    "MSDeformAttn": (peers.deformable_detr, (8, 2, 2, 3), lambda: attention(False)),
    "MSDeformAttn, boxes and padding": (peers.deformable_detr, (8, 2, 2, 3), lambda: attention(True)),
    "FlashDeformAttn": (peers.dcnv4, (8, 2, 2, 3), lambda: attention(False)),
}  # fmt: skip


def both(name: str) -> tuple[Any, Any]:
    library, arguments, _ = ORIGINALS[name]
    kind = name.partition(",")[0]
    return getattr(nn, kind)(*arguments).double(), shaken(getattr(library, kind)(*arguments))


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_same_results_from_the_same_parameters(name: str) -> None:
    ours, theirs = both(name)
    ours.load_state_dict(theirs.state_dict())
    given = ORIGINALS[name][2]()
    agree(results(ours, given), results(theirs, given))


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_takes_our_parameters(name: str) -> None:
    ours, theirs = both(name)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ORIGINALS)
def test_attributes(name: str) -> None:
    ours, theirs = both(name)
    public = {k: v for k, v in vars(theirs).items() if k not in vars(torch.nn.Module()) and not k.startswith("_")}
    assert public
    assert {k: getattr(ours, k) for k in public} == public
    children = {child for child, _ in theirs.named_children()} - {"center_feature_scale_module"}
    assert {child for child, _ in ours.named_children()} == children


PROJECTIONS = {f"{layer}.{kind}": (6, 6) if kind == "weight" else (6,)
               for layer in ("input_proj", "output_proj") for kind in ("weight", "bias")}  # fmt: skip
KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "DeformConv2d, v1": {"weight": (6, 4, 3, 3), "bias": (6,)},
    "DeformConv2dPack":
        {"weight": (6, 2, 3, 3), "conv_offset.weight": (36, 4, 3, 3), "conv_offset.bias": (36,)},
    "ModulatedDeformConv2dPack": {
        "weight": (6, 2, 3, 3), "bias": (6,), "conv_offset.weight": (54, 4, 3, 3), "conv_offset.bias": (54,),
    },
    "ModulatedDeformRoIPoolPack": {
        "offset_fc.0.weight": (8, 24), "offset_fc.0.bias": (8,), "offset_fc.2.weight": (8, 8),
        "offset_fc.2.bias": (8,), "offset_fc.4.weight": (12, 8), "offset_fc.4.bias": (12,),
        "mask_fc.0.weight": (8, 24), "mask_fc.0.bias": (8,), "mask_fc.2.weight": (6, 8), "mask_fc.2.bias": (6,),
    },
    "DCNv3": {
        "dw_conv.0.weight": (6, 1, 3, 3), "dw_conv.0.bias": (6,), "dw_conv.1.1.weight": (6,), "dw_conv.1.1.bias": (6,),
        "offset.weight": (36, 6), "offset.bias": (36,), "mask.weight": (18, 6), "mask.bias": (18,), **PROJECTIONS,
    },
    "DCNv3, all arguments": {
        "center_feature_scale_proj_weight": (3, 6), "center_feature_scale_proj_bias": (3,),
        "dw_conv.0.weight": (6, 1, 5, 5), "dw_conv.0.bias": (6,), "dw_conv.1.0.weight": (6,), "dw_conv.1.0.bias": (6,),
        "dw_conv.1.0.running_mean": (6,), "dw_conv.1.0.running_var": (6,), "dw_conv.1.0.num_batches_tracked": (),
        "offset.weight": (48, 6), "offset.bias": (48,), "mask.weight": (24, 6), "mask.bias": (24,), **PROJECTIONS,
    },
    "DCNv4, all arguments": {
        "center_feature_scale_proj_weight": (3, 6), "center_feature_scale_proj_bias": (3,),
        "offset_mask_dw.weight": (6, 1, 5, 5), "offset_mask_dw.bias": (6,),
        "offset_mask.weight": (72, 6), "offset_mask.bias": (72,),
        "value_proj.weight": (6, 6), "value_proj.bias": (6,), "output_proj.weight": (6, 6),
    },
    "MSDeformAttn": {
        "sampling_offsets.weight": (24, 8), "sampling_offsets.bias": (24,),
        "attention_weights.weight": (12, 8), "attention_weights.bias": (12,),
        "value_proj.weight": (8, 8), "value_proj.bias": (8,), "output_proj.weight": (8, 8), "output_proj.bias": (8,),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_recorded_keys(name: str) -> None:
    assert {key: tuple(t.shape) for key, t in both(name)[0].state_dict().items()} == KEYS[name]


# What makes a module, what starts it again, and how its parameters start: uniform within a bound, or all of one value.
# The numbers are the bounds that torch.nn.init's rules come to.
XAVIER, PROJECTION = math.sqrt(6 / 128), {"output_proj.bias": 0.0, "value_proj.bias": 0.0}
PROJECTION |= {"output_proj.weight": XAVIER, "value_proj.weight": XAVIER}
POOL = {"offset_fc.0.weight": 1 / 8, "offset_fc.2.weight": 1 / 10, "offset_fc.4.weight": 0.0, "offset_fc.4.bias": 0.0}
HALF = {"weight": 1 / 12, "bias": 0.0, "conv_offset.weight": 0.0, "conv_offset.bias": 0.0}
STILL = {"sampling_offsets.weight": 0.0, "attention_weights.weight": 0.0, "attention_weights.bias": 0.0}
RESTARTED: dict[str, tuple[Callable[[], Any], list[str], dict[str, float]]] = {
    "DeformConv2d": (
        lambda: nn.DeformConv2d(32, 64, 3, groups=2), ["reset_parameters"], {"weight": 1 / 12, "bias": 1 / 12}
    ),
    "DeformConv2dPack": (
        lambda: nn.DeformConv2dPack(16, 64, 3, groups=2), ["reset_parameters", "init_offset"],
        {"weight": math.sqrt(6 / 72), "conv_offset.weight": 0.0, "conv_offset.bias": 0.0},
    ),
    "ModulatedDeformConv2d": (
        lambda: nn.ModulatedDeformConv2d(16, 64, 3, groups=2), ["init_weights"], {"weight": 1 / 12, "bias": 0.0}
    ),
    "ModulatedDeformConv2dPack": (lambda: nn.ModulatedDeformConv2dPack(16, 64, 3, groups=2), ["init_weights"], HALF),
    "DCNv3": (
        lambda: nn.DCNv3(64), ["_reset_parameters"],
        {
            "offset.weight": 0.0, "offset.bias": 0.0, "mask.weight": 0.0, "mask.bias": 0.0,
            "input_proj.weight": XAVIER, "input_proj.bias": 0.0, "output_proj.weight": XAVIER, "output_proj.bias": 0.0,
        },
    ),
    "DCNv4": (
        lambda: nn.DCNv4(64), ["_reset_parameters"], {"offset_mask.weight": 0.0, "offset_mask.bias": 0.0, **PROJECTION}
    ),
    "MSDeformAttn": (lambda: nn.MSDeformAttn(64), ["_reset_parameters"], {**STILL, **PROJECTION}),
}  # fmt: skip
ONCE: dict[str, tuple[Callable[[], Any], dict[str, float]]] = {
    "DeformRoIPoolPack": (lambda: nn.DeformRoIPoolPack(2, 16, 100), POOL),
    "ModulatedDeformRoIPoolPack": (
        lambda: nn.ModulatedDeformRoIPoolPack(2, 16, 100),
        {**POOL, "mask_fc.0.weight": 1 / 8, "mask_fc.2.weight": 0.0, "mask_fc.2.bias": 0.0},
    ),
    "DCNv3": (
        lambda: nn.DCNv3(64, center_feature_scale=True),
        {
            "dw_conv.0.weight": 1 / 3, "center_feature_scale_proj_weight": 0.0, "center_feature_scale_proj_bias": 0.0,
        },
    ),
    "DCNv4": (
        lambda: nn.DCNv4(64, dw_kernel_size=3, center_feature_scale=True),
        {
            "offset_mask_dw.weight": 1 / 3, "center_feature_scale_proj_weight": 0.0,
            "center_feature_scale_proj_bias": 0.0,
        },
    ),
}  # fmt: skip


def starts(module: Any, bounds: dict[str, float]) -> None:
    for name, bound in bounds.items():
        values = module.get_parameter(name).detach().flatten()
        assert values.abs().max() <= bound, name
        if bound:
            assert len(values) >= 64, name
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.25 if len(values) < 1000 else 0.05), name


@pytest.mark.parametrize("name", RESTARTED)
def test_starts_and_starts_again(name: str) -> None:
    torch.manual_seed(0)
    make, methods, bounds = RESTARTED[name]
    module = make()
    starts(module, bounds)
    shaken(module)
    for method in methods:
        getattr(module, method)()
    starts(module, bounds)


@pytest.mark.parametrize("name", ONCE)
def test_starts(name: str) -> None:
    torch.manual_seed(0)
    make, bounds = ONCE[name]
    starts(make(), bounds)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["MSDeformAttn", "FlashDeformAttn"])
def test_attention_starts_in_all_directions(kind: str, again: bool) -> None:
    module = getattr(nn, kind)(8, n_levels=2, n_heads=4, n_points=3)
    if again:
        shaken(module)._reset_parameters()
    bias = module.float().sampling_offsets.bias.reshape(4, 2, 3, 2)
    for head, (x, y) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(3):
            expected = torch.tensor([x, y]) * (point + 1.0)
            torch.testing.assert_close(bias[head, :, point], expected.expand(2, 2), atol=1e-6, rtol=0)
    diagonal = getattr(nn, kind)(8, n_heads=8).sampling_offsets.bias.reshape(8, 4, 4, 2)[1, 0, 0]
    torch.testing.assert_close(diagonal, torch.ones(2), atol=1e-6, rtol=0)
