"""Models of Hugging Face transformers with deformable attention: tiny, with random weights, and what goes into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

IMAGE = (2, 3, 64, 64)


def _resnet(**more: Any) -> Any:
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic", **more
    )


def _rt_detr_resnet() -> Any:
    return hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )


def _hgnet(stages: list[int]) -> Any:
    return hf.HGNetV2Config(
        embedding_size=8, depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 20], stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 12, 16], stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 12, 16, 20],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], out_indices=stages,
    )  # fmt: skip


def _swin(**more: Any) -> Any:
    return hf.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0,
        **more,
    )  # fmt: skip


def _bert() -> Any:
    return hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=2000
    )


DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_layers": 2,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 6, "decoder_n_points": 3,
}  # fmt: skip
RT_DETR = {
    **DETR, "encoder_hidden_dim": 32, "encoder_in_channels": [12, 16, 20], "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0, "auxiliary_loss": False,
}  # fmt: skip
GROUNDING = {**DETR, "encoder_n_points": 2, "num_feature_levels": 3, "fusion_droppath": 0.0, "max_text_len": 16}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.rand(IMAGE)}


def _with_text() -> dict[str, Any]:
    # [CLS] a cat . [SEP]: the models cut at the full stop
    ids = torch.tensor([[101, 1037, 1012, 1038, 1012, 102]] * 2)
    return {**_image(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _deformable_detr() -> Any:
    config = hf.DeformableDetrConfig(
        **DETR, encoder_n_points=2, num_feature_levels=3, two_stage=True, with_box_refine=True,
        two_stage_num_proposals=6, backbone_config=_resnet(out_indices=[2, 3, 4]),
    )  # fmt: skip
    return hf.DeformableDetrForObjectDetection(config)


def _grounding_dino() -> Any:
    config = hf.GroundingDinoConfig(**GROUNDING, backbone_config=_swin(out_indices=[2, 3, 4]), text_config=_bert())
    return hf.GroundingDinoForObjectDetection(config)


def _mm_grounding_dino() -> Any:
    config = hf.MMGroundingDinoConfig(**GROUNDING, backbone_config=_swin(out_indices=[2, 3, 4]), text_config=_bert())
    return hf.MMGroundingDinoForObjectDetection(config)


def _omdet_turbo() -> Any:
    config = hf.OmDetTurboConfig(
        backbone_config=_swin(out_indices=[2, 3, 4]), text_projection_in_dim=24, text_projection_out_dim=24,
        text_config=hf.CLIPTextConfig(
            hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=100,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=2,
        ),
        image_size=64, task_encoder_hidden_dim=32, class_embed_dim=24, num_queries=6, encoder_hidden_dim=16,
        vision_features_channels=[16, 16, 16], encoder_in_channels=[16, 32, 64], encoder_attention_heads=2,
        encoder_dim_feedforward=16, decoder_hidden_dim=16, decoder_num_heads=2, decoder_num_layers=2,
        decoder_dim_feedforward=16, decoder_num_points=3, apply_layernorm_after_vision_backbone=False,
    )  # fmt: skip
    return hf.OmDetTurboForObjectDetection(config)


def _classes_and_tasks() -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 7, 2]])
    ones = torch.ones_like(ids)
    return {
        **_image(), "classes_input_ids": ids.repeat(2, 1), "classes_attention_mask": ones.repeat(2, 1),
        "tasks_input_ids": ids, "tasks_attention_mask": ones, "classes_structure": torch.tensor([2, 2]),
    }  # fmt: skip


SEGMENTATION: dict[str, Any] = {
    "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 2, "decoder_layers": 3,
    "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 6, "dropout": 0.0,
}  # fmt: skip


def _mask2former() -> Any:
    config = hf.Mask2FormerConfig(
        **SEGMENTATION, backbone_config=_swin(out_indices=[1, 2, 3, 4]), feature_size=32, mask_feature_size=32
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def _oneformer() -> Any:
    config = hf.OneFormerConfig(
        **SEGMENTATION, backbone_config=_swin(out_indices=[1, 2, 3, 4]), conv_dim=32, mask_dim=32,
        text_encoder_width=32, text_encoder_num_layers=1, text_encoder_vocab_size=50, task_seq_len=8,
        text_encoder_context_length=8,
    )  # fmt: skip
    return hf.OneFormerForUniversalSegmentation(config)


def _with_task() -> dict[str, Any]:
    return {**_image(), "task_inputs": torch.randint(0, 50, (2, 8)).float()}


def _rt_detr() -> Any:
    return hf.RTDetrForObjectDetection(hf.RTDetrConfig(**RT_DETR, backbone_config=_rt_detr_resnet()))


def _rt_detr_v2(method: str) -> Any:
    config = hf.RTDetrV2Config(**RT_DETR, backbone_config=_rt_detr_resnet(), decoder_method=method)
    return hf.RTDetrV2ForObjectDetection(config)


UNEVEN = {**RT_DETR, "decoder_n_points": [3, 6, 3]}


def _d_fine(method: str) -> Any:
    config = hf.DFineConfig(**UNEVEN, backbone_config=_hgnet([2, 3, 4]), decoder_method=method)
    return hf.DFineForObjectDetection(config)


def _deimv2() -> Any:
    config = hf.Deimv2Config(**UNEVEN, backbone_config=_hgnet([2, 3, 4]))
    return hf.Deimv2ForObjectDetection(config)


LW_DETR: dict[str, Any] = {
    "d_model": 32, "decoder_ffn_dim": 16, "decoder_n_points": 2, "decoder_layers": 2, "num_queries": 6,
    "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 4, "group_detr": 1, "dropout": 0.0,
}  # fmt: skip


def _lw_detr() -> Any:
    backbone = hf.LwDetrViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64,
        num_windows=4, window_block_indices=[0], out_indices=[1, 2],
    )  # fmt: skip
    config = hf.LwDetrConfig(**LW_DETR, backbone_config=backbone, projector_scale_factors=[2.0, 0.5])
    return hf.LwDetrForObjectDetection(config)


def _rf_detr() -> Any:
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, num_windows=2,
        out_indices=[1, 2],
    )  # fmt: skip
    return hf.RfDetrForObjectDetection(hf.RfDetrConfig(**LW_DETR, backbone_config=backbone))


def _pp_doclayout(version: int, stages: list[int], **more: Any) -> Any:
    config = getattr(hf, f"PPDocLayoutV{version}Config")(
        **{name: value for name, value in RT_DETR.items() if name != "auxiliary_loss"},
        backbone_config=_hgnet(stages), **more,
    )  # fmt: skip
    return getattr(hf, f"PPDocLayoutV{version}ForObjectDetection")(config)


# its twenty classes, and a small head for the reading order
V2 = {
    "class_thresholds": [0.0] * 20, "class_order": list(range(20)),
    "reading_order_config": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
    "intermediate_size": 16, "global_pointer_head_size": 8, "coordinate_size": 3, "shape_size": 2},
}  # fmt: skip


# what makes each model, what goes into it, and how many modules of it are replaced
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], int]] = {
    "deformable_detr": (_deformable_detr, _image, 3),
    "grounding_dino": (_grounding_dino, _with_text, 3),
    "mm_grounding_dino": (_mm_grounding_dino, _with_text, 3),
    "omdet_turbo": (_omdet_turbo, _classes_and_tasks, 2),
    "mask2former": (_mask2former, _image, 2),
    "oneformer": (_oneformer, _with_task, 2),
    "rt_detr": (_rt_detr, _image, 2),
    "rt_detr_v2": (lambda: _rt_detr_v2("default"), _image, 2),
    "rt_detr_v2 discrete": (lambda: _rt_detr_v2("discrete"), _image, 2),
    "d_fine": (lambda: _d_fine("default"), _image, 2),
    "d_fine discrete": (lambda: _d_fine("discrete"), _image, 2),
    "deimv2": (_deimv2, _image, 2),
    "lw_detr": (_lw_detr, _image, 2),
    "rf_detr": (_rf_detr, _image, 2),
    "pp_doclayout_v2": (lambda: _pp_doclayout(2, [2, 3, 4], **V2), _image, 2),
    "pp_doclayout_v3": (lambda: _pp_doclayout(3, [1, 2, 3, 4], x4_feat_dim=8), _image, 2),
    "pp_doclayout_v4": (lambda: _pp_doclayout(4, [2, 3, 4]), _image, 2),
}
