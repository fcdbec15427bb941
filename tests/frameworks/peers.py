"""Stand-ins for other libraries' modules: names, arguments, attributes and layers as published, forwards by formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from frameworks import formulas
from torch import nn


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class torchvision:
    class DeformConv2d(nn.Module):
        def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1, bias: bool = True,
        ) -> None:  # fmt: skip
            super().__init__()
            self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
            self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
            self.padding, self.dilation = _pair(padding), _pair(dilation)
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
            self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

        def forward(self, input: Any, offset: Any, mask: Any = None) -> Any:
            offset_groups = offset.shape[1] // (2 * math.prod(self.kernel_size))
            return formulas.deform_conv2d(
                input, offset, self.weight, self.bias, mask, self.stride, self.padding, self.dilation, self.groups,
                offset_groups,
            )  # fmt: skip


class mmcv:
    class DeformConv2d(nn.Module):
        def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1, deform_groups: int = 1, bias: bool = False, im2col_step: int = 32,
        ) -> None:  # fmt: skip
            super().__init__()
            self.in_channels, self.out_channels = in_channels, out_channels
            self.groups, self.deform_groups, self.im2col_step = groups, deform_groups, im2col_step
            self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
            self.padding, self.dilation = _pair(padding), _pair(dilation)
            self.transposed, self.output_padding = False, (0,)
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))

        def _convolve(self, x: Any, offset: Any, mask: Any = None, bias: Any = None) -> Any:
            return formulas.deform_conv2d(
                x, offset, self.weight, bias, mask, self.stride, self.padding, self.dilation, self.groups,
                self.deform_groups,
            )  # fmt: skip

        def _predictor(self, per_tap: int) -> nn.Conv2d:
            channels = self.deform_groups * per_tap * math.prod(self.kernel_size)
            return nn.Conv2d(self.in_channels, channels, self.kernel_size, self.stride, self.padding, self.dilation)

        def forward(self, x: Any, offset: Any) -> Any:
            return self._convolve(x, offset)

    class DeformConv2dPack(DeformConv2d):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.conv_offset = self._predictor(2)

        def forward(self, x: Any) -> Any:
            return self._convolve(x, self.conv_offset(x))

    class ModulatedDeformConv2d(DeformConv2d):
        def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1, deform_groups: int = 1, bias: bool = True,
        ) -> None:  # fmt: skip
            super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups)
            del self.im2col_step
            self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

        def forward(self, x: Any, offset: Any, mask: Any) -> Any:
            return self._convolve(x, offset, mask, self.bias)

    class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.conv_offset = self._predictor(3)

        def forward(self, x: Any) -> Any:
            o1, o2, mask = self.conv_offset(x).chunk(3, 1)
            return self._convolve(x, torch.cat([o1, o2], 1), mask.sigmoid(), self.bias)

    class DeformRoIPool(nn.Module):
        def __init__(
            self, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
        ) -> None:
            super().__init__()
            self.output_size, self.spatial_scale = _pair(output_size), spatial_scale
            self.sampling_ratio, self.gamma = sampling_ratio, gamma

        def _pool(self, input: Any, rois: Any, offset: Any) -> Any:
            return formulas.deform_roi_pool(
                input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma
            )

        def forward(self, input: Any, rois: Any, offset: Any = None) -> Any:
            return self._pool(input, rois, offset)

    class DeformRoIPoolPack(DeformRoIPool):
        def __init__(
            self, output_size: Any, output_channels: int, deform_fc_channels: int = 1024, spatial_scale: float = 1.0,
            sampling_ratio: int = 0, gamma: float = 0.1,
        ) -> None:  # fmt: skip
            super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
            self.output_channels, self.deform_fc_channels = output_channels, deform_fc_channels
            bins = math.prod(self.output_size)
            self.offset_fc = nn.Sequential(
                nn.Linear(bins * output_channels, deform_fc_channels), nn.ReLU(inplace=True),
                nn.Linear(deform_fc_channels, deform_fc_channels), nn.ReLU(inplace=True),
                nn.Linear(deform_fc_channels, 2 * bins),
            )  # fmt: skip

        def _moved(self, input: Any, rois: Any) -> tuple[Any, Any]:
            pooled = self._pool(input, rois, None).flatten(1)
            offset = self.offset_fc(pooled).unflatten(1, (2, *self.output_size))
            return pooled, self._pool(input, rois, offset)

        def forward(self, input: Any, rois: Any) -> Any:
            return self._moved(input, rois)[1]

    class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
        def __init__(self, output_size: Any, output_channels: int, *arguments: Any, **keywords: Any) -> None:
            super().__init__(output_size, output_channels, *arguments, **keywords)
            bins = math.prod(self.output_size)
            self.mask_fc = nn.Sequential(
                nn.Linear(bins * output_channels, self.deform_fc_channels), nn.ReLU(inplace=True),
                nn.Linear(self.deform_fc_channels, bins), nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, input: Any, rois: Any) -> Any:
            pooled, moved = self._moved(input, rois)
            return moved * self.mask_fc(pooled).unflatten(1, (1, *self.output_size))

    class MultiScaleDeformableAttention(nn.Module):
        def __init__(
            self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4,
            im2col_step: int = 64, dropout: float = 0.1, batch_first: bool = False, norm_cfg: Any = None,
            init_cfg: Any = None, value_proj_ratio: float = 1.0,
        ) -> None:  # fmt: skip
            super().__init__()
            self._is_init, self.init_cfg = False, init_cfg  # mmengine's BaseModule has them
            self.norm_cfg, self.dropout, self.batch_first = norm_cfg, nn.Dropout(dropout), batch_first
            self.im2col_step, self.embed_dims = im2col_step, embed_dims
            self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
            _add_layers(self, embed_dims, int(embed_dims * value_proj_ratio), num_heads, num_levels, num_points)

        def forward(
            self, query: Any, key: Any = None, value: Any = None, identity: Any = None, query_pos: Any = None,
            key_padding_mask: Any = None, reference_points: Any = None, spatial_shapes: Any = None,
            level_start_index: Any = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            identity = query if identity is None else identity
            out = groundingdino.attend(
                self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes
            )
            return self.dropout(out) + identity


class groundingdino:
    class MultiScaleDeformableAttention(nn.Module):
        def __init__(
            self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4,
            img2col_step: int = 64, batch_first: bool = False,
        ) -> None:  # fmt: skip
            super().__init__()
            self.batch_first, self.im2col_step, self.embed_dim = batch_first, img2col_step, embed_dim
            self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
            _add_layers(self, embed_dim, embed_dim, num_heads, num_levels, num_points)

        def forward(
            self, query: Any, key: Any = None, value: Any = None, query_pos: Any = None, key_padding_mask: Any = None,
            reference_points: Any = None, spatial_shapes: Any = None, level_start_index: Any = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            return groundingdino.attend(
                self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes
            )

    @staticmethod
    def attend(
        module: Any, query: Any, value: Any, query_pos: Any, key_padding_mask: Any, reference_points: Any, shapes: Any
    ) -> Any:
        value = query if value is None else value
        if query_pos is not None:
            query = query + query_pos
        if not module.batch_first:
            query, value = query.permute(1, 0, 2), value.permute(1, 0, 2)
        sizes = module.num_heads, module.num_levels, module.num_points
        out = _attend(module, query, reference_points, value, shapes, key_padding_mask, *sizes)
        return out if module.batch_first else out.permute(1, 0, 2)


class deformable_detr:
    class MSDeformAttn(nn.Module):
        def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
            super().__init__()
            self.im2col_step = 64
            self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
            _add_layers(self, d_model, d_model, n_heads, n_levels, n_points)

        def forward(
            self, query: Any, reference_points: Any, input_flatten: Any, input_spatial_shapes: Any,
            input_level_start_index: Any, input_padding_mask: Any = None,
        ) -> Any:  # fmt: skip
            return _attend(
                self, query, reference_points, input_flatten, input_spatial_shapes, input_padding_mask,
                self.n_heads, self.n_levels, self.n_points,
            )  # fmt: skip


class rfdetr:
    class MSDeformAttn(deformable_detr.MSDeformAttn):
        """RF-DETR's takes one argument more."""

        def __init__(self, *arguments: int) -> None:
            super().__init__(*arguments)
            self._export = False

        def forward(
            self, query: Any, reference_points: Any, input_flatten: Any, input_spatial_shapes: Any,
            input_level_start_index: Any, input_padding_mask: Any = None, input_spatial_shapes_hw: Any = None,
        ) -> Any:  # fmt: skip
            return super().forward(
                query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
                input_padding_mask,
            )  # fmt: skip


class internimage:
    class DCNv3(nn.Module):
        def __init__(
            self, channels: int = 64, kernel_size: int = 3, dw_kernel_size: Any = None, stride: int = 1, pad: int = 1,
            dilation: int = 1, group: int = 4, offset_scale: float = 1.0, act_layer: str = "GELU",
            norm_layer: str = "LN", center_feature_scale: bool = False, remove_center: bool = False,
        ) -> None:  # fmt: skip
            super().__init__()
            dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
            self.offset_scale, self.channels, self.kernel_size = offset_scale, channels, kernel_size
            self.dw_kernel_size, self.stride, self.dilation, self.pad = dw_kernel_size, stride, dilation, pad
            self.group, self.group_channels = group, channels // group
            self.center_feature_scale, self.remove_center = center_feature_scale, int(remove_center)
            norm = [_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6)]
            if norm_layer == "BN":
                norm = [nn.BatchNorm2d(channels), _ChannelsLast()]
            self.dw_conv = nn.Sequential(
                nn.Conv2d(channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels),
                nn.Sequential(*norm),
                {"GELU": nn.GELU, "SiLU": nn.SiLU, "ReLU": nn.ReLU}[act_layer](),
            )
            taps = group * (kernel_size**2 - self.remove_center)
            self.offset, self.mask = nn.Linear(channels, 2 * taps), nn.Linear(channels, taps)
            self.input_proj, self.output_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
            if center_feature_scale:
                _add_center_feature_scale(self)

        def forward(self, input: Any) -> Any:
            projected = self.input_proj(input)
            features = self.dw_conv(input.permute(0, 3, 1, 2))
            offset = self.offset(features).unflatten(-1, (self.group, -1, 2))
            mask = self.mask(features).unflatten(-1, (self.group, -1)).softmax(-1)
            out = formulas.dcn(
                projected, offset, mask, self.kernel_size, self.pad, self.dilation, self.group, self.offset_scale,
                bool(self.remove_center),
            )  # fmt: skip
            return self.output_proj(_blended(self, out, projected, features))

    class DCNv3_pytorch(DCNv3):
        def forward(self, input: Any) -> Any:
            return super().forward(input)


class dcnv4:
    class DCNv4(nn.Module):
        def __init__(
            self, channels: int = 64, kernel_size: int = 3, stride: int = 1, pad: int = 1, dilation: int = 1,
            group: int = 4, offset_scale: float = 1.0, dw_kernel_size: Any = None, center_feature_scale: bool = False,
            remove_center: bool = False, output_bias: bool = True, without_pointwise: bool = False, **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__()
            self.offset_scale, self.channels, self.kernel_size = offset_scale, channels, kernel_size
            self.stride, self.dilation, self.pad = stride, dilation, pad
            self.group, self.group_channels, self.dw_kernel_size = group, channels // group, dw_kernel_size
            self.center_feature_scale, self.remove_center = center_feature_scale, int(remove_center)
            self.without_pointwise = without_pointwise
            self.K = group * (kernel_size**2 - self.remove_center)
            if dw_kernel_size is not None:
                self.offset_mask_dw = nn.Conv2d(
                    channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels
                )
            self.offset_mask = nn.Linear(channels, math.ceil(3 * self.K / 8) * 8)
            if not without_pointwise:
                self.value_proj = nn.Linear(channels, channels)
                self.output_proj = nn.Linear(channels, channels, bias=output_bias)
            if center_feature_scale:
                _add_center_feature_scale(self)

        def forward(self, input: Any, shape: Any = None) -> Any:
            batch, length, _ = input.shape
            height, width = [math.isqrt(length)] * 2 if shape is None else shape
            projected = (input if self.without_pointwise else self.value_proj(input)).reshape(batch, height, width, -1)
            features = input.reshape(batch, height, width, -1)
            if self.dw_kernel_size is not None:
                features = self.offset_mask_dw(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            packed = self.offset_mask(features)[..., : 3 * self.K].unflatten(-1, (self.group, -1))
            taps = self.K // self.group
            out = formulas.dcn(
                projected, packed[..., : 2 * taps].unflatten(-1, (taps, 2)), packed[..., 2 * taps :],
                self.kernel_size, self.pad, self.dilation, self.group, self.offset_scale, bool(self.remove_center),
            )  # fmt: skip
            out = _blended(self, out, projected, out).reshape(batch, length, -1)
            return out if self.without_pointwise else self.output_proj(out)

    class FlashDeformAttn(deformable_detr.MSDeformAttn):
        def forward(
            self, query: Any, reference_points: Any, input_flatten: Any, input_spatial_shapes: Any,
            input_level_start_index: Any, input_padding_mask: Any = None,
        ) -> Any:  # fmt: skip
            return super().forward(
                query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index,
                input_padding_mask,
            )  # fmt: skip


class _ChannelsLast(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1)


class _CenterFeatureScale(nn.Module):
    def forward(self, query: Any, weight: Any, bias: Any) -> Any:
        return nn.functional.linear(query, weight, bias).sigmoid()


def _add_center_feature_scale(module: Any) -> None:
    module.center_feature_scale_proj_weight = nn.Parameter(torch.empty(module.group, module.channels))
    module.center_feature_scale_proj_bias = nn.Parameter(torch.empty(module.group))
    module.center_feature_scale_module = _CenterFeatureScale()


def _blended(module: Any, out: Any, projected: Any, features: Any) -> Any:
    if not module.center_feature_scale:
        return out
    weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
    share = module.center_feature_scale_module(features, weight, bias)[..., None]
    out, projected = (t.unflatten(-1, (module.group, -1)) for t in (out, projected))
    return (out * (1 - share) + projected * share).flatten(-2)


def _add_layers(module: Any, channels: int, value_channels: int, heads: int, levels: int, points: int) -> None:
    module.sampling_offsets = nn.Linear(channels, 2 * heads * levels * points)
    module.attention_weights = nn.Linear(channels, heads * levels * points)
    module.value_proj = nn.Linear(channels, value_channels)
    module.output_proj = nn.Linear(value_channels, channels)


def _attend(
    module: Any, query: Any, reference_points: Any, value: Any, shapes: Any, padding_mask: Any,
    heads: int, levels: int, points: int,
) -> Any:  # fmt: skip
    value = module.value_proj(value)
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0.0)
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
    weights = module.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
    if reference_points.shape[-1] == 2:
        sizes = torch.stack([shapes[:, 1], shapes[:, 0]], -1)
        locations = reference_points[:, :, None, :, None] + offsets / sizes[:, None]
    else:
        centres, boxes = reference_points[:, :, None, :, None].split(2, -1)
        locations = centres + offsets / points * boxes * 0.5
    heads_of_value = value.unflatten(-1, (heads, -1))
    out = formulas.ms_deform_attn(heads_of_value, shapes, locations, weights.unflatten(-1, (levels, points)))
    return module.output_proj(out)
