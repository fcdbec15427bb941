"""torch.nn modules: what all of them can do, and what they refuse."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from frameworks.modules import shaken  # noqa: E402

from cudcn import ops  # noqa: E402
from cudcn.torch import nn  # noqa: E402

FAMILIES = ops.deform_conv2d, ops.deform_roi_pool, ops.deform_psroi_pool, ops.dcnv3, ops.dcnv4, ops.ms_deform_attn
OPERATORS = [family.OP.function for family in FAMILIES]
ROI = [1.3, 0.6, 5.7, 4.9]


# what makes each module, and the shapes of what goes in; "rois" one in each image, "levels" of MSDeformAttn
MODULES: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "DeformConv2d": (
        lambda **where: nn.DeformConv2d(4, 6, 3, **where), [(2, 4, 5, 6), (2, 18, 3, 4), (2, 9, 3, 4)]
    ),
    "DeformConv2dPack": (
        lambda **where: nn.DeformConv2dPack(4, 6, 3, 1, 1, 1, 2, 2, **where), [(2, 4, 5, 6)]
    ),
    "ModulatedDeformConv2d": (
        lambda **where: nn.ModulatedDeformConv2d(4, 6, 3, **where), [(2, 4, 5, 6), (2, 18, 3, 4), (2, 9, 3, 4)]
    ),
    "ModulatedDeformConv2dPack": (
        lambda **where: nn.ModulatedDeformConv2dPack(4, 6, 3, padding=((1, 0), (2, 1)), **where), [(2, 4, 5, 6)]
    ),
    "DeformRoIPoolPack": (lambda **where: nn.DeformRoIPoolPack(2, 3, 8, **where), [(2, 3, 6, 7), "rois"]),
    "ModulatedDeformRoIPoolPack": (
        lambda **where: nn.ModulatedDeformRoIPoolPack((2, 3), 3, 8, sampling_ratio=2, **where), [(2, 3, 6, 7), "rois"]
    ),
    "DeformPSRoIPool": (lambda **where: nn.DeformPSRoIPool(3, 4, (2, 3), 2, **where), [(2, 3, 6, 7), "rois"]),
    "DCNv3": (lambda **where: nn.DCNv3(6, group=2, center_feature_scale=True, **where), [(2, 5, 6, 6)]),
    "DCNv4": (lambda **where: nn.DCNv4(6, group=2, dw_kernel_size=3, center_feature_scale=True, **where), [(2, 9, 6)]),
    "MSDeformAttn": (
        lambda **where: nn.MSDeformAttn(8, 2, 2, 3, **where), [(2, 4, 8), (2, 4, 2, 2), (2, 39, 8), "levels"]
    ),
}  # fmt: skip


def made(name: str, batch: int = 2, dtype: Any = None) -> tuple[Any, list[Any]]:
    """A module, and random tensors that it takes; on torch's default device."""
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    inputs = []
    for kind in kinds:
        if kind == "levels":
            inputs += [torch.tensor([[5, 6], [3, 3]]), torch.tensor([0, 30])]
        elif kind == "rois":
            inputs.append(torch.tensor([[n, *ROI] for n in range(batch)], dtype=dtype).reshape(batch, 5))
        else:
            inputs.append(torch.rand(batch, *kind[1:], dtype=dtype))
    return make(dtype=dtype), inputs


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
def test_device_and_dtype(name: str) -> None:
    module = MODULES[name][0](device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())


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


@pytest.mark.parametrize("name", MODULES)
def test_one_step_of_training(name: str) -> None:
    """Downhill by the gradient's length, as far as a small step tells."""
    module, inputs = made(name, dtype=torch.float64)
    shaken(module)
    before = module(*inputs).square().mean()
    before.backward()
    assert all(p.grad.any() for p in module.parameters())
    slope = sum(p.grad.square().sum() for p in module.parameters())
    rate = 1e-6 * float(before.detach() / slope)
    torch.optim.SGD(module.parameters(), rate).step()
    after = module(*inputs).square().mean()
    torch.testing.assert_close(before - after, rate * slope, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_compile(name: str, dynamic: bool) -> None:
    module, inputs = made(name)
    shaken(module).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("DCNv4", "MSDeformAttn")])
def test_jit_trace(name: str) -> None:
    """Without a warning, as nothing depends on a shape; DCNv4's does, and MSDeformAttn's."""
    module, inputs = made(name)
    shaken(module).float()
    assert torch.equal(torch.jit.trace(module, tuple(inputs))(*inputs), module(*inputs))


@pytest.mark.parametrize("name", MODULES)
def test_symbolic_tracing(name: str) -> None:
    """Nothing depends on a value, but on whether MSDeformAttn has a mask."""
    module, inputs = made(name)
    shaken(module).float()
    absent = {"input_padding_mask": None} if name == "MSDeformAttn" else None
    graph = torch.fx.symbolic_trace(module, absent)
    assert torch.equal(graph(*inputs), module(*inputs))
    assert any(node.target in OPERATORS for node in graph.graph.nodes)


EXTRA = {
    "DeformConv2d": "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, bias=True",
    "DeformConv2dPack":
        "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2, bias=False, "
        "deform_groups=2",
    "ModulatedDeformConv2dPack":
        "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=((1, 0), (2, 1)), dilation=(1, 1), groups=1, bias=True, "
        "deform_groups=1",
    "DeformRoIPoolPack": "output_size=(2, 2), spatial_scale=1.0, sampling_ratio=0, gamma=0.1",
    "DeformPSRoIPool":
        "3, 4, output_size=(2, 3), classes=2, sample_per_part=4, trans_std=0.1, spatial_scale=1.0",
    "DCNv3":
        "channels=6, kernel_size=3, dw_kernel_size=3, stride=1, pad=1, dilation=1, group=2, offset_scale=1.0, "
        "center_feature_scale=True",
    "MSDeformAttn": "8, n_levels=2, n_heads=2, n_points=3",
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
def test_extra_repr(name: str) -> None:
    assert made(name)[0].extra_repr() == EXTRA[name]


CONVOLUTIONS = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_attributes_are_pairs(name: str) -> None:
    module = getattr(nn, name)(4, 6, 3, 2, 1, np.int64(1))
    assert (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (2, 2), (1, 1), (1, 1))
    assert all(type(n) is int for n in module.dilation)
    module = getattr(nn, name)(4, 6, 3, padding=[[1, 0], 2])
    assert module.padding == ((1, 0), (2, 2))


NO_INTEGER = (4.0, "4", None, True)
NO_PAIR = (3.0, "3", "33", None, True, (1, 2, 3))
NO_FLAG = (1, 0.5, None, "True", torch.ones(2))
NO_NUMBER = ("1", None, True, math.inf)
CONVOLUTION = {
    **dict.fromkeys(["in_channels", "out_channels", "groups"], NO_INTEGER),
    **dict.fromkeys(["kernel_size", "stride", "padding", "dilation"], NO_PAIR),
    "bias": NO_FLAG,
}
OF_MMCV = {**CONVOLUTION, "deform_groups": NO_INTEGER}
DCN = {
    **dict.fromkeys(["channels", "kernel_size", "stride", "pad", "dilation", "group"], (*NO_INTEGER, (3, 3))),
    "dw_kernel_size": (3.0, "3", True, (3, 3), 0, 2),
    "offset_scale": NO_NUMBER,
    **dict.fromkeys(["center_feature_scale", "remove_center"], NO_FLAG),
}
POOL = {
    "output_size": NO_PAIR,
    "sampling_ratio": (0.5, "4", None, True, 2**23 + 1),
    **dict.fromkeys(["spatial_scale", "gamma"], NO_NUMBER),
}
POOL_PACK = {**POOL, **dict.fromkeys(["output_channels", "deform_fc_channels"], NO_INTEGER)}
# of each module: arguments that are right, and for each argument values of a wrong type
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, tuple[Any, ...]]]] = {
    "DeformConv2d": ((4, 4, 3), CONVOLUTION),
    "DeformConv2dPack": ((4, 4, 3), {**OF_MMCV, "bias": (*NO_FLAG, True), "im2col_step": (*NO_INTEGER, 0)}),
    "ModulatedDeformConv2d": ((4, 4, 3), OF_MMCV),
    "ModulatedDeformConv2dPack": ((4, 4, 3), OF_MMCV),
    "DeformRoIPool": ((2,), POOL),
    "DeformRoIPoolPack": ((2, 4), POOL_PACK),
    "ModulatedDeformRoIPoolPack": ((2, 4), POOL_PACK),
    "DeformPSRoIPool": (
        (4, 4, 2),
        {
            **dict.fromkeys(["in_channels", "out_channels", "classes"], NO_INTEGER), "output_size": NO_PAIR,
            "sample_per_part": (*NO_INTEGER, 0), **dict.fromkeys(["trans_std", "spatial_scale"], NO_NUMBER),
        },
    ),
    "DCNv3": (
        (8, 3), {**DCN, **dict.fromkeys(["act_layer", "norm_layer"], (None, "gelu", torch.nn.ReLU, ["LN"]))},
    ),
    "DCNv4": ((8, 3), {**DCN, **dict.fromkeys(["output_bias", "without_pointwise"], NO_FLAG)}),
    "MSDeformAttn": ((), dict.fromkeys(["d_model", "n_levels", "n_heads", "n_points"], NO_INTEGER)),
    "FlashDeformAttn": ((), dict.fromkeys(["d_model", "n_levels", "n_heads", "n_points"], NO_INTEGER)),
}  # fmt: skip


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
    with pytest.raises(TypeError, match="DeformConv2d: bias must be True or False, got 4"):
        nn.DeformConv2d(16, 16, 3, 1, 1, 1, 1, 4)  # in mmcv's order: deform_groups


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "groups": (
        lambda: nn.DeformConv2d(4, 6, 3, groups=4),
        "DeformConv2d: groups must divide in_channels and out_channels, got groups=4, in_channels=4, out_channels=6",
    ),
    "deform_groups": (
        lambda: nn.ModulatedDeformConv2dPack(4, 6, 3, deform_groups=3),
        "ModulatedDeformConv2dPack: deform_groups must divide in_channels, got deform_groups=3, in_channels=4",
    ),
    "same padding and stride": (
        lambda: nn.DeformConv2dPack(4, 6, 3, 2, "same"),
        r'DeformConv2dPack: padding="same" needs stride 1, got \(2, 2\)',
    ),
    "channels of a convolution": (
        lambda: nn.DeformConv2d(4, 8, 3, groups=2)(torch.ones(1, 8, 5, 5), torch.ones(1, 18, 3, 3)),
        r"DeformConv2d: input must be \(N, in_channels, H, W\) with in_channels = 4, got \(1, 8, 5, 5\)",
    ),
    "offset of fewer groups": (
        lambda: nn.ModulatedDeformConv2d(4, 8, 3, deform_groups=2)(*(torch.ones(1, n, 3, 3) for n in (4, 18, 9))),
        r"ModulatedDeformConv2d: offset must be .* C = 2 \* deform_groups \* kh \* kw = 36, got \(1, 18, 3, 3\)",
    ),
    "channels of a pool": (
        lambda: nn.DeformRoIPoolPack(2, 4)(torch.ones(1, 3, 5, 5), torch.ones(1, 5)),
        r"DeformRoIPoolPack: input must be \(N, output_channels, H, W\) with output_channels = 4, got \(1, 3, 5, 5\)",
    ),
    "classes": (
        lambda: nn.DeformPSRoIPool(4, 6, 2, classes=4),
        "DeformPSRoIPool: classes must divide out_channels, got classes=4, out_channels=6",
    ),
    "group": (lambda: nn.DCNv3(6), "DCNv3: group must divide channels, got group=4, channels=6"),
    "pad": (
        lambda: nn.DCNv3(8, kernel_size=5),
        r"DCNv3: pad must be dilation \* \(kernel_size - 1\) / 2, .*, got pad=1, dilation=1, kernel_size=5",
    ),
    "even kernel": (lambda: nn.DCNv4(8, kernel_size=2), "DCNv4: pad must be .*, got pad=1, dilation=1, kernel_size=2"),
    "even depthwise kernel": (lambda: nn.DCNv3(8, 4, pad=3, dilation=2), "DCNv3: dw_kernel_size must be odd, got 4"),
    "center and stride": (
        lambda: nn.DCNv4(8, stride=2, dw_kernel_size=3, center_feature_scale=True),
        "DCNv4: center_feature_scale needs stride 1, got 2",
    ),
    "stride": (lambda: nn.DCNv4(8, stride=2), "DCNv4: stride above 1 needs dw_kernel_size, got stride=2"),
    "center": (
        lambda: nn.DCNv3(8, kernel_size=1, pad=0, remove_center=True),
        "DCNv3: remove_center needs a square kernel of odd size above 1",
    ),
    "shape": (
        lambda: nn.DCNv4(8)(torch.ones(1, 12, 8), (3, 5)),
        r"DCNv4: shape must be \(H, W\) with H \* W = 12, as input is \(1, 12, 8\), got \(3, 5\)",
    ),
    "no square": (lambda: nn.DCNv4(8)(torch.ones(1, 12, 8)), r"DCNv4: shape must be .* H \* W = 12, .*, got None"),
    "an image and a shape": (
        lambda: nn.DCNv4(8)(torch.ones(1, 3, 4, 8), (3, 4)),
        r"DCNv4: input must be \(N, L, channels\), or .* without a shape, got \(1, 3, 4, 8\) and \(3, 4\)",
    ),
    "one axis": (lambda: nn.DCNv4(8)(torch.ones(12, 8)), r"DCNv4: input must be .*, got \(12, 8\) and None"),
    "heads": (
        lambda: nn.FlashDeformAttn(8, n_heads=3),
        "FlashDeformAttn: n_heads must divide d_model, got n_heads=3, d_model=8",
    ),
    "reference points": (
        lambda: nn.MSDeformAttn(8, n_levels=1)(
            torch.ones(1, 1, 8), torch.ones(1, 1, 1, 3), torch.ones(1, 4, 8), torch.tensor([[2, 2]]), torch.tensor([0])
        ),
        r"MSDeformAttn: reference_points must be \(N, Q, n_levels, 2\) or .*, got \(1, 1, 1, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
