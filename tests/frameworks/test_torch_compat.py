"""Drop-ins: other libraries' calls and modules, of which stand-ins are here, against the operators' formulas."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from frameworks import formulas, peers  # noqa: E402
from frameworks.modules import agree, rand, results, shaken  # noqa: E402

from cudcn.torch import compat, nn, patch  # noqa: E402

LIBRARIES = ("torchvision", "mmcv", "mmengine", "transformers", "groundingdino", "DCNv3", "DCNv4")


SHAPES = torch.tensor([[5, 6], [3, 3]])
STARTS, PIXELS = torch.tensor([0, 30]), 39
ROIS = torch.tensor([[0, 1.3, 2.1, 8.7, 9.2], [1, 0.4, 3.3, 7.9, 6.1]], dtype=torch.float64)
PADDING = torch.rand(2, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.3


def points(boxes: bool, queries: int = 4) -> Any:
    return torch.rand(2, queries, 2, 4 if boxes else 2, dtype=torch.float64, requires_grad=True)


def attention_as_mmcv(batch_first: bool, queries: int = 4, boxes: bool = False, **more: Any) -> dict[str, Any]:
    """Queries, values and the rest for those two that take them by name."""
    places = [rand(2, queries, 8), rand(2, PIXELS, 8)]
    query, value = places if batch_first else [t.detach().transpose(0, 1).requires_grad_() for t in places]
    return {
        "query": query, "value": value, "reference_points": points(boxes, queries), "spatial_shapes": SHAPES,
        "level_start_index": STARTS, **more,
    }  # fmt: skip


CONVOLUTION: dict[str, Any] = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1), "groups": 2}
IMAGE = (2, 4, 6, 7)  # to (2, 6, 4, 3)
MMCV = {**CONVOLUTION, "deform_groups": 2}
TV, MM, GD, FLASH = peers.torchvision, peers.mmcv, peers.groundingdino, peers.dcnv4
DETR = peers.deformable_detr.MSDeformAttn
DETR_INPUTS = {"input_spatial_shapes": SHAPES, "input_level_start_index": STARTS}


def detr(boxes: bool = False, **more: Any) -> dict[str, Any]:
    query, pixels = rand(2, 4, 8), rand(2, PIXELS, 8)
    return {"query": query, "reference_points": points(boxes), "input_flatten": pixels, **DETR_INPUTS, **more}


def offsets(*shape: int) -> Any:
    return rand(2, *shape)


# what it is called, what makes it, what goes in
Inputs = Callable[[], dict[str, Any]]
MODULES: dict[str, tuple[str, Callable[[], Any], Inputs]] = {
    "torchvision": (
        "torchvision.DeformConv2d", lambda: TV.DeformConv2d(4, 6, 3, **CONVOLUTION),
        lambda: {"input": rand(*IMAGE), "offset": rand(2, 36, 4, 3), "mask": rand(2, 18, 4, 3)},
    ),
    "torchvision v1, no bias": (
        "torchvision.DeformConv2d", lambda: TV.DeformConv2d(4, 6, (3, 3), bias=False),
        lambda: {"input": rand(*IMAGE), "offset": rand(2, 18, 4, 5)},
    ),
    "mmcv v1": (
        "mmcv.DeformConv2d", lambda: MM.DeformConv2d(4, 6, 3, **MMCV),
        lambda: {"x": rand(*IMAGE), "offset": rand(2, 36, 4, 3)},
    ),
    "mmcv v1, smaller than its kernel": (
        "mmcv.DeformConv2d", lambda: MM.DeformConv2d(4, 6, 3, padding=1),
        lambda: {"x": rand(2, 4, 2, 2), "offset": rand(2, 18, 2, 2)},
    ),
    "mmcv v1 pack": (
        "mmcv.DeformConv2dPack", lambda: MM.DeformConv2dPack(4, 6, 3, **MMCV), lambda: {"x": rand(*IMAGE)},
    ),
    "mmcv v2": (
        "mmcv.ModulatedDeformConv2d", lambda: MM.ModulatedDeformConv2d(4, 6, 3, **MMCV),
        lambda: {"x": rand(*IMAGE), "offset": rand(2, 36, 4, 3), "mask": rand(2, 18, 4, 3)},
    ),
    "mmcv v2 pack": (
        "mmcv.ModulatedDeformConv2dPack", lambda: MM.ModulatedDeformConv2dPack(4, 6, 3, **MMCV),
        lambda: {"x": rand(*IMAGE)},
    ),
    "mmcv v2 pack, no bias": (
        "mmcv.ModulatedDeformConv2dPack", lambda: MM.ModulatedDeformConv2dPack(4, 6, 3, bias=False),
        lambda: {"x": rand(*IMAGE)},
    ),
    "mmcv pool": (
        "mmcv.DeformRoIPool", lambda: MM.DeformRoIPool((2, 3), 0.5, 2, 0.2),
        lambda: {"input": rand(*IMAGE), "rois": ROIS, "offset": rand(2, 2, 2, 3)},
    ),
    "mmcv pool, still": (
        "mmcv.DeformRoIPool", lambda: MM.DeformRoIPool(2, 0.5), lambda: {"input": rand(*IMAGE), "rois": ROIS},
    ),
    "mmcv pool pack": (
        "mmcv.DeformRoIPoolPack", lambda: MM.DeformRoIPoolPack((2, 3), 4, 8, 0.5, 2),
        lambda: {"input": rand(*IMAGE), "rois": ROIS},
    ),
    "mmcv v2 pool pack": (
        "mmcv.ModulatedDeformRoIPoolPack", lambda: MM.ModulatedDeformRoIPoolPack((2, 3), 4, 8, 0.5),
        lambda: {"input": rand(*IMAGE), "rois": ROIS},
    ),
    "mmcv attention": (
        "mmcv.MultiScaleDeformableAttention", lambda: MM.MultiScaleDeformableAttention(8, 2, 2, 3),
        lambda: attention_as_mmcv(False),
    ),
    "mmcv attention, all arguments": (
        "mmcv.MultiScaleDeformableAttention",
        lambda: MM.MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.5, batch_first=True, value_proj_ratio=0.5),
        lambda: attention_as_mmcv(
            True, boxes=True, identity=rand(2, 4, 8), query_pos=rand(2, 4, 8), key_padding_mask=PADDING
        ),
    ),
    "mmcv attention to itself": (
        "mmcv.MultiScaleDeformableAttention", lambda: MM.MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0),
        lambda: attention_as_mmcv(False, PIXELS, value=None, key=None, query_pos=rand(PIXELS, 2, 8)),
    ),
    "Grounding DINO": (
        "groundingdino.MultiScaleDeformableAttention", lambda: GD.MultiScaleDeformableAttention(8, 2, 2, 3),
        lambda: attention_as_mmcv(False, query_pos=rand(4, 2, 8), key_padding_mask=PADDING),
    ),
    "Grounding DINO, batch first": (
        "groundingdino.MultiScaleDeformableAttention",
        lambda: GD.MultiScaleDeformableAttention(8, 2, 2, 3, batch_first=True),
        lambda: attention_as_mmcv(True, PIXELS, boxes=True, value=None),
    ),
    "Deformable DETR": ("deformable_detr.MSDeformAttn", lambda: DETR(8, 2, 2, 3), detr),
    "Deformable DETR, boxes and padding": (
        "deformable_detr.MSDeformAttn", lambda: DETR(8, 2, 2, 3), lambda: detr(True, input_padding_mask=PADDING),
    ),
    "RF-DETR": (
        "deformable_detr.MSDeformAttn", lambda: peers.rfdetr.MSDeformAttn(8, 2, 2, 3),
        lambda: detr(input_spatial_shapes_hw=SHAPES.tolist()),
    ),
    "FlashDeformAttn": ("dcnv4.FlashDeformAttn", lambda: FLASH.FlashDeformAttn(8, 2, 2, 3), detr),
    "DCNv3": ("internimage.DCNv3", lambda: peers.internimage.DCNv3(6, group=2), lambda: {"input": rand(2, 5, 4, 6)}),
    "DCNv3, all arguments": (
        "internimage.DCNv3",
        lambda: peers.internimage.DCNv3(6, 3, 5, 1, 2, 2, 3, 1.5, "SiLU", "BN", True, True),
        lambda: {"input": rand(2, 5, 4, 6)},
    ),
    "DCNv3_pytorch": (
        "internimage.DCNv3", lambda: peers.internimage.DCNv3_pytorch(6, 5, pad=2, group=3),
        lambda: {"input": rand(2, 5, 4, 6)},
    ),
    "DCNv4": ("dcnv4.DCNv4", lambda: FLASH.DCNv4(6, group=2), lambda: {"input": rand(2, 16, 6)}),
    "DCNv4, all arguments": (
        "dcnv4.DCNv4", lambda: FLASH.DCNv4(6, 3, 1, 2, 2, 3, 1.5, 5, True, True, False),
        lambda: {"input": rand(2, 20, 6), "shape": (5, 4)},
    ),
    "DCNv4, without pointwise": (
        "dcnv4.DCNv4", lambda: FLASH.DCNv4(6, group=2, without_pointwise=True), lambda: {"input": rand(2, 16, 6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_patched_modules(name: str) -> None:
    kind, make, inputs = MODULES[name]
    module, given = shaken(make()), inputs()
    theirs = results(module, given)
    assert patch(module) == {"": kind}
    agree(results(module, given), theirs)


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_patched_modules(name: str) -> None:
    _, make, inputs = MODULES[name]
    module, given = shaken(make()), inputs()
    original = type(module)
    patch(module)
    assert isinstance(module, original)
    for again in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert type(again) is type(module)
        assert again.state_dict().keys() == module.state_dict().keys()
        agree(results(again, given), results(module, given))


def test_mmcvs_older_name_of_identity() -> None:
    module = shaken(MM.MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0))
    inputs, identity = attention_as_mmcv(False), rand(4, 2, 8)
    expected = module(**inputs, identity=identity)
    patch(module)
    torch.testing.assert_close(module(**inputs, residual=identity), expected)


# --- patch


class Model(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.inner, self.last = torch.nn.Linear(8, 8), inner, torch.nn.Linear(8, 8)


def test_patch_keeps_everything_else() -> None:
    model = Model(DETR(8, 2, 2, 3)).eval()
    model.inner.register_buffer("_kept", torch.ones(1))
    seen = []
    model.inner.register_forward_hook(lambda *_: seen.append("forward"))
    model.inner.value_proj.register_forward_pre_hook(lambda *_: seen.append("value_proj"))
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    names, text = [name for name, _ in model.named_modules()], repr(model)
    assert patch(model) == {"inner": "deformable_detr.MSDeformAttn"}
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert [name for name, _ in model.named_modules()] == names
    assert repr(model) == text
    assert isinstance(model.inner, DETR)
    assert not model.inner.training
    model.double().inner(**detr())
    assert seen == ["value_proj", "forward"]
    assert patch(model) == {}


def test_patch_leaves_our_own_modules() -> None:
    """Which bear the names of those that it replaces, and may do more."""
    model = torch.nn.ModuleList([nn.DCNv4(8, group=2), nn.DeformConv2d(4, 4, 3), DETR(8, 2, 2, 3)])
    assert patch(model) == {"2": "deformable_detr.MSDeformAttn"}
    assert model[0](torch.ones(1, 4, 5, 8)).shape == (1, 4, 5, 8)


def test_patch_finds_nothing() -> None:
    with pytest.raises(ValueError, match=r"patch: nothing to replace in Linear, .* known are dcnv4\.DCNv4, "):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got dict"):
        patch({})


class Heir(peers.deformable_detr.MSDeformAttn):
    """With a method more, which does not matter."""

    def sizes(self) -> list[int]:
        return [self.n_heads, self.n_levels]


class Rewritten(peers.deformable_detr.MSDeformAttn):
    def forward(self, *arguments: Any) -> Any:
        return 2 * super().forward(*arguments)


def test_subclasses() -> None:
    model = torch.nn.ModuleList([Heir(8, 2, 2, 3), Rewritten(8, 2, 2, 3)])
    assert patch(model) == {"0": "deformable_detr.MSDeformAttn"}
    assert model[0].sizes() == [2, 2]
    assert type(model[1]) is Rewritten


def fork(**more: Any) -> Any:
    module = DETR(8, 2, 2, 3)
    for name, value in more.items():
        setattr(module, name, value)
    return module


def without_layer() -> Any:
    module = DETR(8, 2, 2, 3)
    del module.output_proj
    return module


class ultralytics:
    class MSDeformAttn(DETR):
        def forward(self, query: Any, refer_bbox: Any, value: Any, value_shapes: Any, value_mask: Any = None) -> Any:
            raise NotImplementedError


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (lambda: fork(out_proj_scale=2.0), "it has out_proj_scale, which is not known, and may mean another forward"),
        (lambda: fork(use_4D_normalizer=True), "its use_4D_normalizer is True, and must be False"),
        (lambda: fork(forward=len), "it has been given a forward of its own"),
        (without_layer, "it has no output_proj"),
        (lambda: ultralytics.MSDeformAttn(8, 2, 2, 3), r"its forward takes \(query, refer_bbox, .*, and not \(query, "),
    ],
)
def test_look_alikes_stay_as_they_are(odd: Callable[[], Any], why: str) -> None:
    model = torch.nn.ModuleList([odd(), fork(use_4D_normalizer=False)])
    before = type(model[0])
    with pytest.warns(
        UserWarning, match=f"patch: 0 is left as it is: it might be deformable_detr.MSDeformAttn, but {why}"
    ):
        assert patch(model) == {"1": "deformable_detr.MSDeformAttn"}
    assert type(model[0]) is before


# --- functions, in the order that each library has published

SIGNATURES = {
    "torchvision.deform_conv2d":
        "input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None",
    "mmcv.deform_conv2d":
        "input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False, im2col_step=32",
    "mmcv.modulated_deform_conv2d":
        "input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1",
    "mmcv.deform_roi_pool": "input, rois, offset, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1",
    "deformable_detr.MSDeformAttnFunction.apply":
        "value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step",
    "dcnv4.DCNv4Function.apply":
        "input, offset_mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, "
        "group_channels, offset_scale, im2col_step, remove_center",
    "dcnv4.FlashDeformAttnFunction.apply":
        "value, value_spatial_shapes, value_level_start_index, sampling_loc_attn, im2col_step, K=8",
    "internimage.dcnv3_core_pytorch":
        "input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, "
        "group_channels, offset_scale, remove_center=False",
    "transformers.multi_scale_deformable_attention":
        "value, value_spatial_shapes, sampling_locations, attention_weights",
    "transformers.multi_scale_deformable_attention_v2":
        "value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method='default'",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    function: Any = compat
    for part in name.split("."):
        function = getattr(function, part)
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert ", ".join(map(str, bare)) == SIGNATURES[name]


def same(function: Callable[..., Any], reference: Callable[..., Any], *tensors: Any) -> None:
    """The same output and gradients."""
    pairs = []
    for compute in function, reference:
        out = compute(*tensors)
        shares = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        pairs.append([out, *torch.autograd.grad((out * shares).sum(), tensors)])
    for ours, theirs in zip(*pairs, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def convolution() -> tuple[list[Any], tuple[Any, ...]]:
    """input, offset, weight, bias, mask; and stride, padding, dilation."""
    torch.manual_seed(0)
    tensors = [rand(*IMAGE), rand(2, 36, 4, 3), rand(6, 2, 3, 3), rand(6), rand(2, 18, 4, 3)]
    return tensors, ((1, 2), (1, 0), (2, 1))


def test_deform_conv2d_of_torchvision() -> None:
    (x, offset, weight, bias, mask), attributes = convolution()
    same(
        lambda *t: compat.torchvision.deform_conv2d(*t[:4], *attributes, t[4]),
        lambda *t: formulas.deform_conv2d(*t, *attributes, 2, 2),
        x, offset, weight, bias, mask,
    )  # fmt: skip


def test_deform_conv2d_of_mmcv() -> None:
    (x, offset, weight, bias, mask), attributes = convolution()
    same(
        lambda *t: compat.mmcv.deform_conv2d(*t, *attributes, 2, 2, False, 1),
        lambda *t: formulas.deform_conv2d(*t, None, None, *attributes, 2, 2),
        x, offset, weight,
    )  # fmt: skip
    same(
        lambda *t: compat.mmcv.modulated_deform_conv2d(*t, *attributes, 2, 2),
        lambda x, offset, mask, weight, bias: formulas.deform_conv2d(x, offset, weight, bias, mask, *attributes, 2, 2),
        x, offset, mask, weight, bias,
    )  # fmt: skip


def test_mmcv_takes_the_offsets_dtype() -> None:
    (x, offset, weight, bias, mask), attributes = convolution()
    out = compat.mmcv.modulated_deform_conv2d(x, offset.half(), mask, weight, bias, *attributes, 2, 2)
    assert out.dtype == torch.float16


def test_mmcv_refuses() -> None:
    (x, offset, weight, _, mask), attributes = convolution()
    with pytest.raises(ValueError, match="deform_conv2d: bias must be False, as in mmcv, got True"):
        compat.mmcv.deform_conv2d(x, offset, weight, *attributes, 2, 2, True)
    with pytest.raises(ValueError, match=r"deform_conv2d: input must have groups \* .* = 2 channels, got 4"):
        compat.mmcv.deform_conv2d(x, offset, weight, *attributes)
    with pytest.raises(
        ValueError, match=r"modulated_deform_conv2d: offset must have 2 \* deform_groups .* = 18 channels, got 36"
    ):
        compat.mmcv.modulated_deform_conv2d(x, offset, mask, weight, None, *attributes, 2)


@pytest.mark.parametrize("ratio", [0, 2])
def test_deform_roi_pool_of_mmcv(ratio: int) -> None:
    torch.manual_seed(0)
    same(
        lambda x, offset: compat.mmcv.deform_roi_pool(x, ROIS, offset, (2, 3), 0.5, ratio, 0.2),
        lambda x, offset: formulas.deform_roi_pool(x, ROIS, offset, (2, 3), 0.5, ratio, 0.2),
        rand(*IMAGE), rand(2, 2, 2, 3),
    )  # fmt: skip


def attention() -> tuple[Any, Any, Any]:
    """value, locations (in and beyond the image) and weights."""
    torch.manual_seed(0)
    locations = 1.4 * torch.rand(2, 4, 2, 2, 3, 2, dtype=torch.float64) - 0.2
    return rand(2, PIXELS, 2, 4), locations.requires_grad_(), rand(2, 4, 2, 2, 3)


def by_formula(value: Any, locations: Any, weights: Any) -> Any:
    return formulas.ms_deform_attn(value, SHAPES, locations, weights)


@pytest.mark.parametrize(
    "function",
    [
        lambda v, *t: compat.deformable_detr.MSDeformAttnFunction.apply(v, SHAPES, STARTS, *t, 64),
        lambda v, *t: compat.transformers.multi_scale_deformable_attention(v, SHAPES, *t),
        lambda v, *t: compat.transformers.multi_scale_deformable_attention(v, [(5, 6), (3, 3)], *t),
        lambda v, x, w: compat.transformers.multi_scale_deformable_attention_v2(
            v, [(5, 6), (3, 3)], x.flatten(3, 4), w.flatten(3), [3, 3]
        ),
    ],
    ids=["MSDeformAttnFunction", "tensor of shapes", "list of shapes", "v2"],
)
def test_attention(function: Callable[..., Any]) -> None:
    same(function, by_formula, *attention())


def uneven(method: str) -> Callable[..., Any]:
    """transformers' v2 by its formula: three levels, with 3, 1 and 3 points."""

    def compute(value: Any, locations: Any, weights: Any) -> Any:
        total, start = 0, 0
        for shape, count in (([5, 6], 3), ([3, 3], 1), ([2, 1], 3)):
            size, here = torch.tensor(shape), slice(start, start + count)
            x, level = locations[..., here, :], LEVELS[tuple(shape)]
            if method == "discrete":
                pixel = (x * size.flip(0) + 0.5).floor().clamp(min=0).minimum(size.flip(0) - 1)
                x = ((pixel + 0.5) / size.flip(0)).detach()
            part = formulas.ms_deform_attn(value[:, level], size[None], x[:, :, :, None], weights[..., None, here])
            total, start = total + part, start + count
        return total

    return compute


LEVELS = {(5, 6): slice(0, 30), (3, 3): slice(30, 39), (2, 1): slice(39, 41)}


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_attention_v2(method: str) -> None:
    torch.manual_seed(0)
    value, weights = rand(2, 41, 2, 4), rand(2, 4, 2, 7)
    locations = (1.4 * torch.rand(2, 4, 2, 7, 2, dtype=torch.float64) - 0.2).requires_grad_(method == "default")
    tensors = [value, locations, weights] if method == "default" else [value, weights]

    def call(core: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: core(t[0], locations, t[-1])

    def ours(value: Any, locations: Any, weights: Any) -> Any:
        return compat.transformers.multi_scale_deformable_attention_v2(
            value, list(LEVELS), locations, weights, [3, 1, 3], method
        )

    same(call(ours), call(uneven(method)), *tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_discrete_attention_reads_one_pixel(dtype: Any) -> None:
    """Of a level so wide that half types cannot name the middle of its pixels; and its place has no gradient."""
    width = 200
    value = torch.eye(width, dtype=dtype)[None, :, None]
    places = ((torch.arange(width) + 0.25) / width).to(dtype)
    locations = torch.stack([places, torch.zeros(width)], -1).to(dtype)[None, :, None, None].requires_grad_()
    weights = torch.ones(1, width, 1, 1, dtype=dtype, requires_grad=True)
    out = compat.transformers.multi_scale_deformable_attention_v2(
        value, [(1, width)], locations, weights, [1], "discrete"
    )
    read = (places.to(torch.promote_types(dtype, torch.float32)) * width + 0.5).long().clamp(max=width - 1)
    torch.testing.assert_close(out[0], torch.eye(width, dtype=dtype)[read])
    (grad,) = torch.autograd.grad(out.sum(), locations, allow_unused=True)
    assert grad is None


def test_attention_v2_refuses_another_method() -> None:
    value, locations, weights = attention()
    with pytest.raises(ValueError, match='attention_v2: method must be "default" or "discrete", got \'nearest\''):
        compat.transformers.multi_scale_deformable_attention_v2(
            value, SHAPES, locations.flatten(3, 4), weights.flatten(3), [3, 3], "nearest"
        )


# --- extension modules


def test_functions_of_the_attentions_extension() -> None:
    tensors = attention()
    out = by_formula(*tensors)
    grad = torch.randn_like(out)
    arguments = [tensors[0], SHAPES, STARTS, *tensors[1:]]
    torch.testing.assert_close(compat.deformable_detr.ms_deform_attn_forward(*arguments, 64), out)
    ours = compat.deformable_detr.ms_deform_attn_backward(*arguments, grad, 64)
    torch.testing.assert_close(ours, list(torch.autograd.grad(out, tensors, grad)))


def flash() -> tuple[Any, Any, Callable[..., Any]]:
    value, locations, logits = attention()
    packed = torch.cat([locations.flatten(-3), logits.flatten(-2)], -1).detach().requires_grad_()

    def reference(value: Any, packed: Any) -> Any:
        places, logits = packed[..., :12].unflatten(-1, (2, 3, 2)), packed[..., 12:]
        return by_formula(value, places, logits.softmax(-1).unflatten(-1, (2, 3)))

    return value, packed, reference


def test_flash_deform_attn_function() -> None:
    value, packed, reference = flash()
    apply = compat.dcnv4.FlashDeformAttnFunction.apply
    same(lambda v, p: apply(v, SHAPES, STARTS, p, 64, 3), reference, value, packed)


def test_functions_of_flash_deform_attns_extension() -> None:
    value, packed, reference = flash()
    out = reference(value, packed)
    grad = torch.randn_like(out)
    given = value, SHAPES, STARTS, packed
    torch.testing.assert_close(compat.dcnv4.flash_deform_attn_forward(*given, 64, 3, 8, 256), out)
    ours = compat.dcnv4.flash_deform_attn_backward(*given, grad, 64, 3, 2, 256)
    torch.testing.assert_close(ours, list(torch.autograd.grad(out, (value, packed), grad)))


WINDOW = (3, 3, 1, 1, 2, 2, 2, 2, 2, 3, 1.5)  # kernel, stride, pad, dilation, group, group_channels, offset_scale


def dcn(x: Any, offset: Any, mask: Any) -> Any:
    offset, mask = offset.unflatten(-1, (2, 8, 2)), mask.unflatten(-1, (2, 8))
    return formulas.dcn(x, offset, mask, 3, 2, 2, 2, 1.5, True)


def test_dcnv3_functions() -> None:
    torch.manual_seed(0)
    tensors = rand(2, 5, 4, 6), rand(2, 5, 4, 32), rand(2, 5, 4, 16)
    internimage = compat.internimage
    same(lambda *t: internimage.DCNv3Function.apply(*t, *WINDOW, 256, True), dcn, *tensors)
    same(lambda *t: internimage.dcnv3_core_pytorch(*t, *WINDOW, True), dcn, *tensors)
    out = dcn(*tensors)
    grad = torch.randn_like(out)
    torch.testing.assert_close(internimage.dcnv3_forward(*tensors, *WINDOW, 256, 1), out)
    ours = internimage.dcnv3_backward(*tensors, *WINDOW, grad, 256, 1)
    torch.testing.assert_close(ours, list(torch.autograd.grad(out, tensors, grad)))


def test_dcnv3s_older_extension_keeps_the_center() -> None:
    tensors = rand(2, 5, 4, 6), rand(2, 5, 4, 36), rand(2, 5, 4, 18)
    offset, mask = tensors[1].unflatten(-1, (2, 9, 2)), tensors[2].unflatten(-1, (2, 9))
    expected = formulas.dcn(tensors[0], offset, mask, 3, 2, 2, 2, 1.5, False)
    torch.testing.assert_close(compat.internimage.dcnv3_forward(*tensors, *WINDOW, 256), expected)


def dcn_packed(x: Any, packed: Any) -> Any:
    groups = packed.unflatten(-1, (2, 24))
    return dcn(x, groups[..., :16].flatten(-2), groups[..., 16:].flatten(-2))


def test_dcnv4_functions() -> None:
    torch.manual_seed(0)
    tensors = rand(2, 5, 4, 6), rand(2, 5, 4, 48)
    same(lambda *t: compat.dcnv4.DCNv4Function.apply(*t, *WINDOW, 256, True), dcn_packed, *tensors)
    out = dcn_packed(*tensors)
    grad = torch.randn_like(out)
    torch.testing.assert_close(compat.dcnv4.dcnv4_forward(*tensors, *WINDOW, 256, True, 8, 512, False), out)
    ours = compat.dcnv4.dcnv4_backward(*tensors, *WINDOW, 256, grad, True, 2, 256, False)
    torch.testing.assert_close(ours, list(torch.autograd.grad(out, tensors, grad)))


def test_modules_are_those_of_nn() -> None:
    assert (compat.dcnv4.DCNv4, compat.dcnv4.FlashDeformAttn) == (nn.DCNv4, nn.FlashDeformAttn)


def python(code: str, folder: Path) -> None:
    """In a process of its own, in which these files can be imported."""
    start = f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_library_is_imported(tmp_path: Path) -> None:
    for name in LIBRARIES:  # each would fail
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    python(
        f"""
import torch
from cudcn.torch import compat, patch
compat.install()
try:
    patch(torch.nn.Linear(2, 2))
except ValueError:
    pass
assert not set({LIBRARIES!r}) & set(sys.modules) - {{"groundingdino"}}
""",
        tmp_path,
    )


def test_install(tmp_path: Path) -> None:
    """On request only; libraries then import what they import."""
    (tmp_path / "groundingdino").mkdir()
    (tmp_path / "groundingdino" / "__init__.py").write_text("")
    python(
        """
import torch
from cudcn.torch import compat
names = ["MultiScaleDeformableAttention", "groundingdino._C", "DCNv3", "DCNv4", "DCNv4.ext"]
assert not set(names) & set(sys.modules)
assert compat.install() == names
assert compat.install() == []
import MultiScaleDeformableAttention as MSDA, DCNv3
from groundingdino import _C
from DCNv4 import DCNv4, DCNv4Function, FlashDeformAttn, FlashDeformAttnFunction, ext
import importlib.util
assert importlib.util.find_spec("DCNv3")
assert _C.ms_deform_attn_forward is MSDA.ms_deform_attn_forward is compat.deformable_detr.ms_deform_attn_forward
assert _C.ms_deform_attn_backward is MSDA.ms_deform_attn_backward is compat.deformable_detr.ms_deform_attn_backward
assert DCNv3.dcnv3_forward is compat.internimage.dcnv3_forward
assert DCNv3.dcnv3_backward is compat.internimage.dcnv3_backward
for name in "dcnv4_forward", "dcnv4_backward", "flash_deform_attn_forward", "flash_deform_attn_backward":
    assert getattr(ext, name) is getattr(compat.dcnv4, name)
assert DCNv4(32, group=2)(torch.ones(1, 16, 32)).shape == (1, 16, 32)
""",
        tmp_path,
    )


def test_install_never_hides_a_real_module(tmp_path: Path) -> None:
    """Whether it is imported by then or not; DCNv4's Python files without what they compile get that alone."""
    for name in "MultiScaleDeformableAttention", "DCNv3":
        (tmp_path / f"{name}.py").write_text("real = True")
    for package in "groundingdino", "DCNv4":
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "groundingdino" / "_C.py").write_text("real = True")
    (tmp_path / "DCNv4" / "__init__.py").write_text("from DCNv4 import ext\nreal = True")
    python(
        """
import DCNv3
from cudcn.torch import compat
assert compat.install() == ["DCNv4.ext"]
import DCNv4, MultiScaleDeformableAttention
from groundingdino import _C
assert DCNv3.real and DCNv4.real and MultiScaleDeformableAttention.real and _C.real
assert DCNv4.ext.dcnv4_forward is compat.dcnv4.dcnv4_forward
""",
        tmp_path,
    )
