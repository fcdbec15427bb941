"""torch.nn modules call the operators as they say, also where the originals they follow cannot."""

from __future__ import annotations

from typing import Any

import pytest

import cudcn

torch = pytest.importorskip("torch")
from frameworks import formulas  # noqa: E402
from frameworks.modules import agree, rand, results, shaken  # noqa: E402

from cudcn.torch import nn  # noqa: E402

torchs_warning = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def has_gradients(module: Any, out: Any) -> None:
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# --- convolutions


@pytest.mark.parametrize("kind", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
@pytest.mark.parametrize("padding", [((1, 0), (1, 1)), ((0, 2), (3, 1)), ((1, 1), (0, 2))])
def test_packs_pad_unevenly(kind: str, padding: Any) -> None:
    window = {"stride": (1, 2), "dilation": (2, 1)}
    module = shaken(getattr(nn, kind)(4, 6, 3, padding=padding, groups=2, deform_groups=2, **window))
    (top, bottom), (left, right) = padding
    x = rand(2, 4, 7, 8)
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    channels = torch.nn.functional.conv2d(padded, module.conv_offset.weight, module.conv_offset.bias, **window)
    mask = channels[:, 36:].sigmoid() if kind.startswith("Modulated") else None
    out = module(x)
    torch.testing.assert_close(
        out, cudcn.deform_conv2d(x, channels[:, :36], module.weight, module.bias, mask, padding=padding, **window)
    )
    has_gradients(module, out)


@torchs_warning
@pytest.mark.parametrize(("kind", "share"), [("DeformConv2dPack", 1), ("ModulatedDeformConv2dPack", 0.5)])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_packs_start_as_convolutions(kind: str, share: float, padding: Any) -> None:
    """A mask's at half weight: its sigmoid's start."""
    module, x = getattr(nn, kind)(4, 6, (3, 2), 1, padding, (2, 1), 2), torch.randn(2, 4, 7, 8)
    want = torch.nn.functional.conv2d(x, module.weight * share, module.bias, 1, padding, (2, 1), 2)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


@torchs_warning
@pytest.mark.parametrize("kernel_size", [3, 2, (4, 1), (1, 6), (3, 4)])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1)])
def test_same_padding_is_torchs(kernel_size: Any, dilation: Any) -> None:
    """An even kernel's odd pixel lies below and on the right."""
    module = nn.DeformConv2d(4, 6, kernel_size, padding="same", dilation=dilation).double()
    x = rand(2, 4, 7, 8)
    taps = module.weight[0, 0].numel()
    want = torch.nn.functional.conv2d(x, module.weight, module.bias, padding="same", dilation=dilation)
    torch.testing.assert_close(module(x, torch.zeros(2, 2 * taps, 7, 8, dtype=torch.float64)), want)


def test_valid_padding() -> None:
    assert nn.DeformConv2d(4, 6, 3, 2, "valid").padding == (0, 0)


# --- pooling


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_deform_psroi_pool(classes: int) -> None:
    module = shaken(nn.DeformPSRoIPool(3, 4, (2, 3), classes, 3, 0.2, 0.5))
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "conv.weight": (24, 3, 1, 1), "conv.bias": (24,),
        "conv_offset.weight": (12 * classes, 3, 1, 1), "conv_offset.bias": (12 * classes,),
    }  # fmt: skip

    class ByFormula(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.conv_offset = module.conv, module.conv_offset

        def forward(self, input: Any, rois: Any) -> Any:
            attributes = (2, 3), 3, 0.2, 0.5
            offset = formulas.deform_psroi_pool(self.conv_offset(input), rois, None, *attributes)
            return formulas.deform_psroi_pool(self.conv(input), rois, offset, *attributes)

    given = {
        "input": rand(2, 3, 6, 7), "rois": torch.tensor([[0, 1.3, 2.1, 8.7, 9.2], [1, 0.4, 3.3, 11.9, 6.1]]).double()
    }  # fmt: skip
    agree(results(module, given), results(ByFormula(), given))


@pytest.mark.parametrize("again", [False, True])
def test_deform_psroi_pool_starts_in_its_bins(again: bool) -> None:
    torch.manual_seed(0)
    module = nn.DeformPSRoIPool(16, 4, 7)
    if again:
        shaken(module).reset_parameters()
    assert module.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not any(p.any() for p in (module.conv.bias, *module.conv_offset.parameters()))


# --- DCNv3 and DCNv4


def test_strided_dcnv3() -> None:
    window = {"kernel_size": 3, "stride": 2, "dilation": 2, "group": 2, "offset_scale": 0.5, "remove_center": True}
    module = shaken(nn.DCNv3(6, dw_kernel_size=5, pad=2, **window))
    input = rand(2, 7, 8, 6)
    features = module.dw_conv(input.permute(0, 3, 1, 2))
    mask = module.mask(features).reshape(2, 4, 4, 2, 8).softmax(-1).reshape(2, 4, 4, 16)
    sampled = cudcn.dcnv3(module.input_proj(input), module.offset(features), mask, padding=2, **window)
    out = module(input)
    torch.testing.assert_close(out, module.output_proj(sampled))
    has_gradients(module, out)


def test_dcnv3_with_center_feature_scale() -> None:
    module = shaken(nn.DCNv3(6, group=2, center_feature_scale=True))
    input = rand(2, 5, 6, 6)
    with torch.no_grad():
        module.center_feature_scale_proj_weight.zero_()
        module.center_feature_scale_proj_bias.copy_(torch.tensor([1e3, -1e3]))  # all of group 0 from the projection
        plain = nn.DCNv3(6, group=2).double()
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if "center" not in k})
        module.output_proj, plain.output_proj = torch.nn.Identity(), torch.nn.Identity()
        out = module(input)
        torch.testing.assert_close(out[..., :3], module.input_proj(input)[..., :3])
        torch.testing.assert_close(out[..., 3:], plain(input)[..., 3:])


@pytest.mark.parametrize("image", [False, True])
def test_strided_dcnv4(image: bool) -> None:
    window = {"kernel_size": 3, "stride": 2, "group": 2, "offset_scale": 2.0}
    module = shaken(nn.DCNv4(6, dw_kernel_size=3, **window))
    input = rand(2, 7, 8, 6)
    features = module.offset_mask_dw(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    want = module.output_proj(cudcn.dcnv4(module.value_proj(input), module.offset_mask(features), **window))
    out = module(input) if image else module(input.flatten(1, 2), shape=(7, 8))
    torch.testing.assert_close(out, want if image else want.flatten(1, 2))
    has_gradients(module, out)


def test_dcnv4_takes_images_and_pixels() -> None:
    module = shaken(nn.DCNv4(6, group=2, center_feature_scale=True))
    image = rand(2, 4, 4, 6)
    out = module(image)
    assert out.shape == image.shape
    for shape in None, (4, 4), [4, 4]:
        assert torch.equal(module(image.flatten(1, 2), shape), out.flatten(1, 2))


def test_dcnv4_overlooks_what_the_original_overlooks() -> None:
    assert repr(nn.DCNv4(8, act_layer="GELU", norm_layer="LN")) == repr(nn.DCNv4(8))


# --- attention


def test_ms_deform_attn_takes_levels_of_numpy() -> None:
    module = shaken(nn.MSDeformAttn(8, 2, 2, 3))
    inputs = torch.rand(2, 4, 8).double(), torch.rand(2, 4, 2, 2).double(), torch.rand(2, 39, 8).double()
    shapes, starts = torch.tensor([[5, 6], [3, 3]]), torch.tensor([0, 30])
    assert torch.equal(module(*inputs, shapes.numpy(), starts.numpy()), module(*inputs, shapes, starts))
