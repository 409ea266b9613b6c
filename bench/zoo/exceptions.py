"""Where the rules of `configs` and `inputs` fail: what to take instead, by model type."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rope(*sections: int) -> dict[str, Any]:
    """Rotary places in three axes, which the classes would take wide ones of."""
    return {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}
_FOUR = {
    "backbone_config": {
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
    }
}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_DETR = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_RT_DETR = {
    "backbone_config": {**_RESNET, "model_type": "rt_detr_resnet"},
    "encoder_in_channels": [16, 16, 16],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
}
_PICTURES = {
    "vq_config.base_channels": 32,
    "vq_config.channel_multiplier": [1, 1, 1, 1, 1],
    "vq_config.num_res_blocks": 1,
}
_SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_SAM = {"*.output_channels": 32, "*.hidden_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": {**_SERIES, "moving_average": 3},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 5},
    "bros": {"hidden_size": 128},
    "chameleon": {
        **_PICTURES,
        "vocabulary_map": {"<image>": 5}
        | {f"IMGIMG{chr(65 + number // 10)}{chr(65 + number % 10)}Z": 10 + number for number in range(64)},
        "vq_config.num_embeddings": 64,
    },
    "clap": {
        "audio_config.hidden_size": 64,
        "audio_config.patch_embeds_hidden_size": 8,
        "audio_config.spec_size": 64,
        "audio_config.num_mel_bins": 32,
    },
    "clvp": {
        "text_config.hidden_size": 64,
        "text_config.num_attention_heads": 2,
        "speech_config.hidden_size": 64,
        "speech_config.num_attention_heads": 2,
    },
    "conditional_detr": _DETR,
    "cvt": {"depth": [1, 2, 3]},
    "d_fine": _RT_DETR,
    "dab-detr": _DETR,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "deformable_detr": {**_DETR, "backbone_config": _RESNET},
    "depth_anything": _FOUR,
    "detr": _DETR,
    "dinov3_convnext": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.2,
        "in_channels": [32, 16, 24, 40, 80, 112, 192],
        "out_channels": [16, 24, 40, 80, 112, 192, 320],
        "hidden_dim": 320,
        "image_size": 64,
    },
    "emu3": {
        **_PICTURES,
        "vq_config.channel_multiplier": [1, 1, 1, 1],
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}
        | {f"<|visual token {number:06}|>": 10 + number for number in range(64)},
    },
    "eomt": {"num_hidden_layers": 2, "num_blocks": 1, "num_upscale_blocks": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "glm46v": _rope(2, 1, 1),
    "glm4v": _rope(2, 1, 1),
    "glm4v_moe": _rope(1, 1, 0),
    "glmga": _rope(2, 1, 1),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_ctc": {"*.context_size": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"*.head_dim": 8},
    "informer": _SERIES,
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"video_token_index": 5},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "janus": _PICTURES,
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "levit": {"patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mask2former": {"backbone_config": _SWIN, "feature_size": 32, "mask_feature_size": 32},
    "mimi": {"codebook_dim": 16, "vector_quantization_hidden_dimension": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "oneformer": {"backbone_config": _SWIN, "mask_dim": 32, "conv_dim": 32},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "qk_channels": 32, "v_channels": 32},
    "prompt_depth_anything": _FOUR,
    "qwen2_5_vl": {**_rope(2, 1, 1), "vision_config.window_size": 32, "vision_config.fullatt_block_indexes": [1]},
    "qwen2_vl": _rope(2, 1, 1),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"]},
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "sam": _SAM,
    "sam_hq": _SAM,
    "step3p7": {"*.sliding_window": 8},
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "voxtral": {"audio_token_id": 5},
    "wav2vec2-bert": {"vocab_size": 99, "feature_projection_input_dim": 160},
    "wav2vec2-conformer": {"vocab_size": 99},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""Fields of a configuration, as `configs.tiny` takes them."""

CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "moshi": "MoshiForConditionalGeneration",
}
"""Where the class that a mapping names is of a part only."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _ids(*shape: int) -> Tensor:
    return torch.randint(40, 99, shape, generator=torch.Generator().manual_seed(1))


def _series(model: Any) -> dict[str, Tensor]:
    """What was, of three lags more than the context, and the features of the times to come."""
    length = model.config.context_length + max(model.config.lags_sequence)
    return {
        "past_values": _random(2, length),
        "past_time_features": _random(2, length, 1),
        "past_observed_mask": torch.ones(2, length),
        "future_values": _random(2, model.config.prediction_length),
        "future_time_features": _random(2, model.config.prediction_length, 1),
    }


def _channels(model: Any) -> dict[str, Tensor]:
    return {"past_values": _random(2, model.config.context_length, model.config.num_input_channels)}


def _decisions(model: Any) -> dict[str, Tensor]:
    return {
        "states": _random(2, 5, model.config.state_dim),
        "actions": _random(2, 5, model.config.act_dim),
        "rewards": _random(2, 5, 1),
        "returns_to_go": _random(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5).contiguous(),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }


def _conversation(model: Any) -> dict[str, Tensor]:
    """Text, and what both sides say."""
    codes = _ids(2, model.config.num_codebooks, 6) % 60
    return {"input_ids": _ids(2, 6), "user_audio_codes": codes, "moshi_audio_codes": codes.flip(0)}


def _patches(model: Any) -> dict[str, Tensor]:
    """Pictures as rows of patches, of which some are filling."""
    vision = model.config.vision_config
    size = 3 * vision.patch_size**2
    return {
        "input_ids": _ids(2, 12),
        "pixel_values": _random(2, 16, size),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _regions(model: Any) -> dict[str, Tensor]:
    return {
        "input_ids": _ids(2, 12),
        "visual_feats": _random(2, 5, model.config.visual_feat_dim),
        "visual_pos": _random(2, 5, model.config.visual_pos_dim),
    }


def _flattened(model: Any) -> dict[str, Tensor]:
    """Patches, each behind its row and column."""
    places = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]).expand(2, 4, 2)
    size = model.config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.cat([places, _random(2, 4, size)], dim=-1), "decoder_input_ids": _ids(2, 5)}


def _question(model: Any) -> dict[str, Tensor]:
    ids = _ids(2, 12)
    ids[:, 3] = model.config.question_token_id
    return {"input_ids": ids}


def _painted(model: Any) -> dict[str, Tensor]:
    height, width = model.config.image_size
    return {n: _random(2, 3, height, width) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "autoformer": _series,
    "decision_transformer": _decisions,
    "informer": _series,
    "kosmos-2": lambda model: {
        "pixel_values": _random(2, 3, 32, 32),
        "input_ids": _ids(2, 80),
        "image_embeds_position_mask": (torch.arange(80) < model.config.latent_query_num).long().expand(2, 80),
    },
    "lxmert": _regions,
    "moshi": _conversation,
    "musicgen": lambda model: {
        "input_ids": _ids(2, 12),
        "decoder_input_ids": _ids(2 * model.config.decoder.num_codebooks, 5) % 60,
    },
    "oneformer": lambda model: {
        "pixel_values": _random(2, 3, 64, 64),
        "task_inputs": _ids(2, model.config.task_seq_len),
    },
    "patchtsmixer": _channels,
    "patchtst": _channels,
    "pix2struct": _flattened,
    "pop2piano": lambda model: {
        "input_features": _random(2, 16, model.config.d_model),
        "decoder_input_ids": _ids(2, 5),
    },
    "seggpt": _painted,
    "siglip2": _patches,
    "splinter": _question,
    "time_series_transformer": _series,
    "timesfm": lambda model: {"past_values": _random(2, 64), "freq": torch.zeros(2, 1, dtype=torch.int64)},
    "timesfm2_5": lambda model: {"past_values": _random(2, 64)},
    "voxtral_realtime": lambda model: {
        "input_ids": _ids(2, 8),
        "input_features": _random(2, model.config.audio_config.num_mel_bins, 64),
    },
}
"""What a model is called with."""
