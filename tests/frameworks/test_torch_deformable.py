"""deformable_: the 3x3 convolutions of a network's stages, made deformable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.nn.utils import parametrizations, prune  # noqa: E402

from cudcn.torch import nn  # noqa: E402
from cudcn.torch.nn import deformable_  # noqa: E402

SWAPPED = [
    "layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2", "layer3.1.conv2", "layer4.0.conv2", "layer4.1.conv2",
]  # fmt: skip


class Bottleneck(torch.nn.Module):
    def __init__(self, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, 4, 1, bias=False)
        self.conv2 = torch.nn.Conv2d(4, 4, 3, stride, dilation, dilation, groups=2, bias=False)
        self.bn2, self.conv3 = torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 8, 1)
        self.downsample = torch.nn.Conv2d(channels, 8, 1, stride)

    def forward(self, x: Any) -> Any:
        return self.conv3(self.bn2(self.conv2(self.conv1(x))).relu()) + self.downsample(x)


class ResNet(torch.nn.Module):
    """Small, with torchvision's names; the last stage dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1 = torch.nn.Conv2d(3, 8, 7, 2, 3), self._stage(1, 1)
        self.layer2, self.layer3, self.layer4 = self._stage(2, 1), self._stage(2, 1), self._stage(1, 2)
        self.fc = torch.nn.Linear(8, 5)

    def _stage(self, stride: int, dilation: int) -> Any:
        return torch.nn.Sequential(Bottleneck(8, stride, dilation), Bottleneck(8, 1, dilation))

    def forward(self, x: Any) -> Any:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.ModulatedDeformConv2dPack)]


def test_swaps_conv3_to_conv5() -> None:
    model = ResNet()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert deformable_(model) == SWAPPED == names(model)
    after = {name: id(p) for name, p in model.named_parameters()}
    added = {f"{name}.conv_offset.{kind}" for name in SWAPPED for kind in ("weight", "bias")}
    assert after.keys() - before.keys() == added
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("stages", [["layer3"], "layer3", ("layer3.0", "layer3"), iter(["layer3"])])
def test_other_stages(stages: Any) -> None:
    assert deformable_(ResNet(), stages) == ["layer3.0.conv2", "layer3.1.conv2"]


def test_stages_within_a_model() -> None:
    model = torch.nn.ModuleDict({"backbone": ResNet()})
    assert deformable_(model, ["backbone.layer4"]) == ["backbone.layer4.0.conv2", "backbone.layer4.1.conv2"]


def test_a_stage_may_be_a_convolution() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    assert deformable_(model, ["1"]) == ["1"] == names(model)


def test_computes_half_and_the_same_with_double_weights() -> None:
    model, x = ResNet().double(), torch.randn(2, 3, 33, 35, dtype=torch.float64)
    model.eval()
    convolutions = {name: model.get_submodule(name) for name in SWAPPED}
    want = model(x)
    assert deformable_(model) == SWAPPED
    for name, conv in convolutions.items():
        given = torch.randn(2, 4, 9, 8, dtype=torch.float64)
        torch.testing.assert_close(model.get_submodule(name)(given), conv(given) / 2)
        assert not model.get_submodule(name).training
        with torch.no_grad():
            conv.weight *= 2
    torch.testing.assert_close(model(x), want)


def test_training_moves_what_was_added() -> None:
    """The output does not depend on conv_offset's weights at first, but its gradient does."""
    torch.manual_seed(0)
    model, x = ResNet(), torch.randn(2, 3, 33, 35)
    deformable_(model)
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(model.get_submodule(name).conv_offset.weight.any() for name in SWAPPED)


def test_device_and_dtype() -> None:
    model = ResNet().to("meta", torch.float64)
    deformable_(model)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())


def convolution(**settings: Any) -> Any:
    return torch.nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 0)}, {"groups": 2, "bias": False},
        {"padding": "same", "dilation": 2}, {"padding": "valid"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_stay(settings: dict[str, Any]) -> None:
    conv, x = convolution(**settings).double(), torch.randn(2, 4, 7, 8, dtype=torch.float64)
    model = torch.nn.Sequential(conv)
    deformable_(model, ["0"])
    for name in "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups":
        assert getattr(model[0], name) == getattr(conv, name), name
    if conv.bias is not None:
        torch.nn.init.zeros_(conv.bias)
    torch.testing.assert_close(model(x), conv(x) / 2)


def test_a_convolution_of_two_names_stays_one() -> None:
    shared = convolution()
    model = torch.nn.ModuleDict({"layer2": torch.nn.Sequential(shared), "layer3": torch.nn.Sequential(shared)})
    assert deformable_(model, ["layer2", "layer3"]) == ["layer2.0", "layer3.0"]
    assert model["layer2"][0] is model["layer3"][0]


class Standardized(torch.nn.Conv2d):
    pass


ODD: dict[str, Callable[[], Any]] = {
    "another window": lambda: convolution(kernel_size=5, padding=2),
    "a row": lambda: convolution(kernel_size=(1, 3)),
    "another padding": lambda: convolution(padding_mode="reflect"),
    "a subclass": lambda: Standardized(4, 4, 3),
    "a weight norm": lambda: parametrizations.weight_norm(convolution()),
    "a pruned one": lambda: prune.l1_unstructured(convolution(), "weight", 3),
    "our own, and what predicts its offsets": lambda: nn.ModulatedDeformConv2dPack(4, 4, 3),
}


@pytest.mark.parametrize("odd", ODD)
def test_others_stay(odd: str) -> None:
    model = torch.nn.ModuleDict({"layer2": torch.nn.Sequential(ODD[odd](), convolution())})
    before = model["layer2"][0]
    assert deformable_(model, ["layer2"]) == ["layer2.1"]
    assert model["layer2"][0] is before
    assert not hasattr(before, "conv_offset") or type(before.conv_offset) is torch.nn.Conv2d


def test_once_more_finds_nothing() -> None:
    model = ResNet()
    deformable_(model)
    with pytest.raises(ValueError, match="deformable_: no 3x3 convolution in layer2, layer3, layer4 of ResNet"):
        deformable_(model)


def test_refusals() -> None:
    model = ResNet()
    with pytest.raises(
        ValueError,
        match=r"deformable_: stages must be names of modules, got \['layer5', ''\], where there are conv1, layer1, ",
    ):
        deformable_(model, ["layer2", "layer5", ""])
    with pytest.raises(ValueError, match="deformable_: no 3x3 convolution in  of ResNet"):
        deformable_(model, [])
    assert names(model) == []
    with pytest.raises(TypeError, match=r"deformable_: model must be a torch\.nn\.Module, got list"):
        deformable_([model])
