"""Tiny random models: one for every transformers model type whose text tower uses RoPE.

`config` shrinks the default configuration of a type by field name (`SMALL`), then applies what is
special to each model type met on the way down (`OVERRIDES`); RoPE is unscaled unless a caller says
otherwise. `build` fills the model with weights that depend on the type and the seed alone.
"""

import copy
import dataclasses
import warnings
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TRAINED = 64  # `max_position_embeddings` of every text tower

# every integer field of one of these names, in a text, vision or audio configuration alike
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": TRAINED,
    "query_pre_attn_scalar": 16,
    "sliding_window": 128,
    "attention_chunk_size": 128,
    "local_attention": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the spellings of GPT-J
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": TRAINED,
    "rotary_dim": 8,
    # and of BART
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "ffn_dim": 64,
    # latent and indexed attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 128,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # state spaces, linear attention, hyper-connections
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hc_lowrank": 8,
    # embeddings per layer
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    # vision and audio towers
    "depth": 2,
    "num_layers": 2,
    "num_heads": 4,
    "embed_dim": 64,
    "mlp_dim": 64,
    "hidden_dim": 64,
    "output_dim": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "projection_dim": 64,
    "projector_hidden_size": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
    "downsample_hidden_size": 16,
    "output_channels": 16,
    "image_size": 32,
    "patch_size": 16,
    "position_embedding_size": 16,
    "num_position_embeddings": 16,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "codebook_size": 128,
    "num_embeddings": 128,
}

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_CHUNKED = {"rope_parameters": {"mrope_section": [2, 3, 3]}}
_INTERLEAVED = {"rope_parameters": {"mrope_section": [4, 2, 2]}}
_QUARTER_INTERLEAVED = {"head_dim": 32, "rope_parameters": {"mrope_section": [2, 1, 1]}}
# the query temperature of these two is part of the trained model and reads `rope_parameters`
_QUERY_TEMPERATURE = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": TRAINED}
_SAM = {"downsample_channels": [32, 32]}
_VQ = {"base_channels": 32, "latent_channels": 32}
_SHALLOW_CODEC = {"depths": [1] * 7, "num_filters": 2}
# tokens that `inputs` never draws; `zoo_images` writes prompts with them
_SEES_IMAGES = {
    "image_token_id": 6,
    "video_token_id": 7,
    "vision_start_token_id": 5,
    "image_start_token_id": 5,
    "image_end_token_id": 9,
    "video_start_token_id": 4,
    "video_end_token_id": 3,
}

# parts of another model type than the default: a tower that needs no timm, a decoder with RoPE
PARTS = {
    "fast_vlm": {"vision_config": "clip_vision_model"},
    "instructblip": {"text_config": "llama"},
    "instructblipvideo": {"text_config": "llama"},
    "perception_lm": {"vision_config": "clip_vision_model"},
}

# what is special to a model type, wherever in a configuration it turns up
OVERRIDES: dict[str, dict[str, Any]] = {
    # text towers
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patching_threshold": 3.5},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "clvp_encoder": {"hidden_size": 128},  # rotates at least 32 dimensions of a head
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
            },
        },
    },
    "cosmos3_edge_text": _INTERLEAVED,
    "csm": {"num_codebooks": 4, "text_vocab_size": 128},
    "csm_depth_decoder_model": {"backbone_hidden_size": 64, "num_codebooks": 4},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": TRAINED,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "head_dim": 64,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dia_decoder": {
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
        "cross_head_dim": 16,
        "cross_hidden_size": 64,
    },
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_hidden_layers": 2,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"mrope_section": [3, 3, 2]},
    },
    "esm": {"vocab_size": 128, "position_embedding_type": "rotary", "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING_AND_FULL * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_assistant": {"backbone_hidden_size": 64},
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4v_moe_text": {"head_dim": 32, **_CHUNKED},
    "glm4v_text": _CHUNKED,
    "glm_image_text": {"vision_vocab_size": 128, **_CHUNKED},
    "glm_ocr_text": _CHUNKED,
    "gpt_neox": {"hidden_size": 128},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite_docling_text": {"attention_multiplier": 0.25},
    "granite_swa": {"layer_rope_theta": [10_000.0, 500_000.0]},
    "granitemoe_swa": {"layer_rope_theta": [10_000.0, 500_000.0]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4},
    "apertus1p5": {"image_token_offset": 128, "audio_token_offset": 256},
    "apertus1p5_text": {"vocab_size": 512},
    "apertus1p5_vision_tokenizer": {"base_channels": 32},
    "hy_v4_vl_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    "kyutai_speech_to_text": {
        "num_codebooks": 4,
        "codebook_vocab_size": 128,
        "audio_pad_token_id": 3,
    },
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 4],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 64, "moe_layers": [0]},
    "longcat_flash": {
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
    },
    "mellum": {"layer_types": _SLIDING_AND_FULL},
    "mimo_v2_flash": {"head_dim": 48},  # a third of it rotates
    "minicpm3": {"dim_model_base": 64},
    "ministral": {"head_dim": 16},
    "ministral3": {"rope_parameters": _QUERY_TEMPERATURE},
    # its `default` ignores `partial_rotary_factor` and fails; `linear` by 1 is the unscaled RoPE
    "mistral4": {"rope_parameters": {"rope_type": "linear", "factor": 1.0, **_QUERY_TEMPERATURE}},
    "mistral_large4_text": {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full"] * 3,
        "no_rope_layers": [1, 1, 0],
        "kv_source_layers": [0, 1, 2],
    },
    "molmo2_text": {"rope_scaling_layers": [0]},
    "moonshine": {
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer_assistant": {"target_layer_ids": [0, 1]},
    "muse_spark_text": {"moe_hidden_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 32},
    "paddleocr_vl_text": _CHUNKED,
    "phi3": {"original_max_position_embeddings": TRAINED},
    "phi4_multimodal": {"original_max_position_embeddings": TRAINED},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "qwen2_5_omni_text": _CHUNKED,
    "qwen2_5_vl_text": _CHUNKED,
    "qwen2_vl_text": _CHUNKED,
    "qwen3_5_moe_text": _QUARTER_INTERLEAVED,
    "qwen3_5_text": _QUARTER_INTERLEAVED,
    "qwen3_next": {"head_dim": 32},
    "qwen3_omni_moe_text": _INTERLEAVED,
    "qwen3_vl_moe_text": _INTERLEAVED,
    "qwen3_vl_text": _INTERLEAVED,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 128,
        "indexer_compress_ratio": 4,
        "head_dim": 32,
        "rope_parameters": {"mrope_section": [6, 5, 5]},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 128},
    "roformer": {"is_decoder": True},
    "stablelm": {"hidden_size": 128},
    "step3p5": {
        "layer_types": _SLIDING_AND_FULL,
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 128,
        "share_expert_dim": 32,
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "zamba2": {"use_mem_rope": True, "n_mamba_heads": 4, "intermediate_size": 64},
    "zaya": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "num_experts_per_tok": 1,
        "sliding_window": 128,
        "router_hidden_size": 32,
    },
    # their vision and audio towers, and the models around them
    "cohere_compass": _SEES_IMAGES,
    "cosmos3_edge": _SEES_IMAGES,
    "cosmos3_omni": _SEES_IMAGES,
    "ernie4_5_vl_moe": _SEES_IMAGES,
    "glm46v": _SEES_IMAGES,
    "glmga": _SEES_IMAGES,
    "glm4v": _SEES_IMAGES,
    "glm4v_moe": _SEES_IMAGES,
    "glm_image": _SEES_IMAGES,
    "glm_image_vqmodel": {"latent_channels": 64},
    "glm_ocr": _SEES_IMAGES,
    "hunyuan_vl": _SEES_IMAGES,
    "minicpmv4_7": {"insert_layer_id": 0, "image_start_id": 5, "image_end_id": 9, **_SEES_IMAGES},
    "paddleocr_vl": _SEES_IMAGES,
    "qwen2_5_vl": _SEES_IMAGES,
    "qwen2_vl": _SEES_IMAGES,
    "qwen3_5": _SEES_IMAGES,
    "qwen3_5_moe": _SEES_IMAGES,
    "qwen3_vl": _SEES_IMAGES,
    "qwen3_vl_moe": _SEES_IMAGES,
    "qwen4_exp": _SEES_IMAGES,
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "chameleon_vqgan": _VQ,
    "clvp_decoder": {"max_position_embeddings": 256, "decoder_fixing_codes": [3, 4, 4, 5]},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64},
    "deepseek_ocr2_sam_vision_model": _SAM,
    "dots3_note_audio_encoder": {
        "feature_size": 8,
        "adapter_input_size": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "dense"],
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "emu3_vqgan": {"base_channels": 32},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]]},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 5},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 5},
    "janus_vqgan": _VQ,
    "mimi": {"upsample_groups": 64, "num_filters": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"hidden_sizes": [8, 8], "depths": [1, 1]},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 16,
    },
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_thinker": {"image_token_index": 6, "video_token_index": 7, **_SEES_IMAGES},
    "qwen2_5_omni_talker": {"embedding_size": 64, **_CHUNKED},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "num_code_groups": 4, "thinker_hidden_size": 64},
        "code2wav_config": {"decoder_dim": 64, "num_quantizers": 4},
    },
    "qwen3_omni_moe_thinker": _SEES_IMAGES,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32, **_INTERLEAVED},
    "unlimited_ocr_sam_vision_model": _SAM,
    "wavtokenizer_encoder": {"codebook_dim": 64},
    "vibevoice_acoustic_tokenizer": _SHALLOW_CODEC,
    "vibevoice_acoustic_tokenizer_encoder": _SHALLOW_CODEC,
}

# the model class, where no language-model mapping names it
CLASSES = {
    "blt_patcher": "BltPatcher",
    "clvp": "ClvpModelForConditionalGeneration",
    "clvp_encoder": "ClvpEncoder",
    "colmodernvbert": "ColModernVBertForRetrieval",
    "colpali": "ColPaliForRetrieval",
    "colqwen2": "ColQwen2ForRetrieval",
    "cosmos3_edge_text": "Cosmos3EdgeTextModel",
    "csm": "CsmForConditionalGeneration",
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "dia": "DiaForConditionalGeneration",
    "diffusion_gemma_text": "DiffusionGemmaEncoderTextModel",
    "embedding_gemma2": "EmbeddingGemma2Model",
    "embedding_gemma2_text": "EmbeddingGemma2TextModel",
    "emu3_text_model": "Emu3ForCausalLM",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "glm4v_moe_text": "Glm4vMoeTextModel",
    "glm4v_text": "Glm4vTextModel",
    "glm_image": "GlmImageForConditionalGeneration",
    "glm_image_text": "GlmImageTextModel",
    "glm_ocr_text": "GlmOcrTextModel",
    "gradium_phonon_tts": "GradiumPhononTTSForConditionalGeneration",
    "granite4_vision_text": "Granite4VisionTextModel",
    "granite_docling_text": "GraniteDoclingTextModel",
    "higgs_audio_v2": "HiggsAudioV2ForConditionalGeneration",
    "hunyuan_vl_text": "HunYuanVLTextModel",
    "hy_v4_vl_text": "HYV4VLTextModel",
    "jev": "JevForDecision",
    "mistral_large4_text": "MistralLarge4TextModel",
    "mllama_text_model": "MllamaForCausalLM",
    "molmo2_text": "Molmo2TextModel",
    "moonshine": "MoonshineForConditionalGeneration",
    "moonshine_streaming": "MoonshineStreamingForConditionalGeneration",
    "muse_glimmer_assistant": "MuseGlimmerAssistantModel",
    "muse_glimmer_text": "MuseGlimmerTextModel",
    "muse_spark_text": "MuseSparkTextModel",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "paddleocr_vl_text": "PaddleOCRTextModel",
    "pe_audio": "PeAudioModel",
    "pocket_tts": "PocketTTSForConditionalGeneration",
    "qwen2_5_omni_text": "Qwen2_5OmniThinkerTextModel",
    "qwen2_5_vl_text": "Qwen2_5_VLTextModel",
    "qwen2_vl_text": "Qwen2VLTextModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextModel",
    "qwen3_vl_text": "Qwen3VLTextModel",
    "step3p5": "Step3p7TextModel",
    "t5gemma2_encoder": "T5Gemma2Encoder",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
    "vibevoice": "VibeVoiceForConditionalGeneration",
}

_Draw = Callable[..., Tensor]  # a shape -> random numbers of that shape

# what a forward over text needs besides `input_ids`; None takes an argument away
EXTRA_INPUTS: dict[str, Callable[[int, int, _Draw, _Draw], dict[str, Any]]] = {
    "blt": lambda batch, length, ids, floats: {"use_cache": False},
    "clvp": lambda batch, length, ids, floats: {"input_features": floats(batch, 80, 20)},
    "dia": lambda batch, length, ids, floats: {"decoder_input_ids": ids(batch, length, 9)},
    "diffusion_gemma": lambda batch, length, ids, floats: {"decoder_input_ids": ids(batch, 16)},
    "gemma4_unified_assistant": lambda batch, length, ids, floats: {
        "input_ids": None,
        "inputs_embeds": floats(batch, length, 128),
        "shared_kv_states": {
            label: (floats(batch, 2, length, width), floats(batch, 2, length, width))
            for label, width in (("full_attention", 32), ("sliding_attention", 16))
        },
    },
    "idefics": lambda batch, length, ids, floats: {
        "image_encoder_embeddings": floats(batch, 1, 4, 64),
        "image_attention_mask": torch.ones(batch, length, 1),
    },
    "instructblip": lambda batch, length, ids, floats: {
        "pixel_values": floats(batch, 3, 32, 32),
        "qformer_input_ids": ids(batch, 8),
    },
    "instructblipvideo": lambda batch, length, ids, floats: {
        "pixel_values": floats(batch, 2, 3, 32, 32),
        "qformer_input_ids": ids(batch, 8),
    },
    "jev": lambda batch, length, ids, floats: {
        "marks": torch.tensor([[length - 1]]),
        "num_options": torch.tensor([[4]]),
        "question_type_ids": torch.tensor([[0]]),
    },
    "kyutai_speech_to_text": lambda batch, length, ids, floats: {
        "input_ids": ids(batch, length, 5)
    },
    "moonshine": lambda batch, length, ids, floats: {
        "input_ids": None,
        "input_values": floats(batch, 4000),
    },
    "moonshine_streaming": lambda batch, length, ids, floats: {
        "input_ids": None,
        "input_values": floats(batch, 4000),
    },
    "muse_glimmer_assistant": lambda batch, length, ids, floats: {
        "input_ids": None,
        "noise_embeds": floats(batch, 8, 64),
        "context_hidden_states": floats(batch, length, 128),
    },
    "pe_audio": lambda batch, length, ids, floats: {"input_values": floats(batch, 1, 4000)},
    "pi0": lambda batch, length, ids, floats: {
        "state": floats(batch, 32),
        "noise": floats(batch, 50, 32),
        "timestep": torch.full((batch,), 0.5),
        "pixel_values": floats(batch, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
    },
    "voxtral_realtime": lambda batch, length, ids, floats: {
        "encoder_inputs_embeds": floats(batch, 4 * length, 64)
    },
}

UNBUILDABLE = {
    "gemma3n": "its vision tower needs timm (the text tower is gemma3n_text)",
    "gemma4_assistant": (
        "its default configuration is not valid (gemma4_unified_assistant is built alike)"
    ),
    "pe_audio_video": "its video tower needs timm",
    "pe_video": "its video tower needs timm",
    "qwen2_5_omni": "has no forward (its text tower is qwen2_5_omni_thinker; `build` works)",
    "qwen3_omni_moe": "has no forward (its text tower is qwen3_omni_moe_thinker; `build` works)",
    "voxtral_realtime_text": "transformers does not export its model class",
}
if transformers.__version__ < "5.24":
    UNBUILDABLE["gemma4_unified_assistant"] = (
        "transformers raises: every layer must share its keys, and none is left to make them"
    )
else:
    UNBUILDABLE["llama4"] = (
        "transformers raises in its forward, which reads `image_outputs` where there are none (its "
        "text tower is llama4_text)"
    )

# fmt: off
_WITHOUT_ROPE = {
    "learned absolute positions": (
        "albert", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus",
        "biogpt", "blenderbot", "blenderbot-small", "blip", "blip-2", "camembert",
        "convbert", "data2vec-text", "distilbert", "electra", "ernie", "flaubert",
        "florence2", "fnet", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "ibert",
        "layoutlm", "led", "longformer", "luke", "mbart", "megatron-bert", "mobilebert",
        "mra", "mvp", "nystromformer", "openai-gpt", "opt", "perceiver", "plbart",
        "pp_formulanet", "prophetnet", "rembert", "roberta", "roberta-prelayernorm",
        "roc_bert", "squeezebert", "tapas", "trocr", "whisper", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xmod", "yoso",
    ),
    "learned absolute positions, factored in two axes": ("reformer",),
    "learned absolute positions and a relative bias": ("mpnet",),
    "sinusoidal absolute positions": (
        "ctrl", "fsmt", "kosmos-2", "kosmos-2.5", "m2m_100", "marian", "musicgen",
        "musicgen_melody", "nllb-moe", "pegasus", "pegasus_x", "seamless_m4t",
        "seamless_m4t_v2", "xglm",
    ),
    "relative positions in the attention scores": (
        "deberta", "deberta-v2", "funnel", "inkling2", "inkling2_loop", "inkling2_loop_text",
        "inkling2_text", "inkling_mm_model",
        "inkling_text", "xlnet",
    ),
    "relative bias (T5)": (
        "cpmant", "longt5", "mt5", "pix2struct", "switch_transformers", "t5", "udop", "umt5",
    ),
    "ALiBi": ("bloom", "mpt"),
    "state space or recurrence, no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    "no positions: recurrent layers between attention layers": (
        "jamba", "nemo_speechlm", "nemotron_h", "nemotron_h_omni", "zamba",
    ),
    "no positions: linear attention between attention layers": (
        "glm5_next", "glm5_next_text", "kimi_linear",
    ),
    "a wrapper around two models of any type": ("encoder-decoder", "vision-encoder-decoder"),
}
# fmt: on
NO_TEXT_ROPE = {name: reason for reason, names in _WITHOUT_ROPE.items() for name in names}

_CLASS_NAMES = ChainMap(
    CLASSES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
# older releases lack some of them
_NAMES = set(dir(transformers))  # listing them takes transformers a third of a second
_KNOWN = {name for name, cls in _CLASS_NAMES.items() if cls in _NAMES}
MODEL_TYPES = tuple(
    sorted((_KNOWN & set(CONFIG_MAPPING)) - UNBUILDABLE.keys() - NO_TEXT_ROPE.keys())
)

# sin and cos come from a table of `TRAINED` rows: no longer input runs
FIXED_TABLE = {"codegen", "gptj", "roformer"}

# where a configuration keeps its text towers, the one that writes the output last
_TEXT_CONFIGS = (
    "dit_config",
    "thinker_config",
    "vlm_config",
    "text_config",
    "patcher_config",
    "encoder",
    "encoder_config",
    "global_config",
    "decoder",
    "decoder_config",
)
# keys of `rope_parameters` that describe the trained RoPE; every other key scales it
_TRAINED_ROPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that owns the RoPE of the text tower: of the decoder, where it has two."""
    *_, path = _text_paths(config)
    for name in path:
        config = getattr(config, name)
    return config


def config(
    model_type: str, rope: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> PreTrainedConfig:
    """A tiny configuration.

    Its RoPE is as trained: type `default`, or `proportional` where the type is built on that.

    Args:
        model_type: One of `MODEL_TYPES`.
        rope: Receives a copy of each text tower's unscaled `rope_parameters` and returns those to
            use instead; called once per layer type where they are nested.
    """
    cls = CONFIG_MAPPING[model_type]
    small = _shrink(cls())
    if rope is not None:
        unscaled = cls(**copy.deepcopy(small))
        for path in _text_paths(unscaled):
            owner, tower = small, unscaled
            for name in path:
                owner, tower = owner[name], getattr(tower, name)
            owner["rope_parameters"] = _map_rope(tower.rope_parameters, rope)
    return cls(**small)


def build(
    model_type: str, rope: Callable[[dict[str, Any]], dict[str, Any]] | None = None, seed: int = 0
) -> PreTrainedModel:
    """A tiny random model in float32, in eval mode.

    Args:
        model_type: One of `MODEL_TYPES`.
        rope: As in `config`.
        seed: With the type, determines the weights; `rope` does not touch them.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = getattr(transformers, _CLASS_NAMES[model_type])(config(model_type, rope)).eval()
    _randomize(model, torch.Generator().manual_seed(zlib.crc32(model_type.encode()) + seed))
    return model


def inputs(
    model: PreTrainedModel, batch: int = 1, length: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Arguments for a forward of `model` over `length` random tokens of text."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(10, 128, shape, generator=generator)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kwargs: dict[str, Any] = {"input_ids": ids(batch, length)}
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids(batch, length)
    if extra := EXTRA_INPUTS.get(model.config.model_type):
        kwargs |= extra(batch, length, ids, floats)
    return {name: value for name, value in kwargs.items() if value is not None}


def run(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    """The scores of a forward without gradients: logits, or hidden states where it has no head."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model(**kwargs)
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return result[0] if logits is None else logits


def _text_paths(config: PreTrainedConfig) -> list[tuple[str, ...]]:
    """The path of attributes to every text tower's configuration, `()` being `config` itself."""
    return list(_rope_owners(config)) or [()]


def _rope_owners(config: PreTrainedConfig) -> Iterator[tuple[str, ...]]:
    nested = False
    for name in _TEXT_CONFIGS:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            for path in _rope_owners(part):
                nested = True
                yield name, *path
    if not nested and getattr(config, "rope_parameters", None):
        yield ()


def _shrink(cfg: PreTrainedConfig) -> dict[str, Any]:
    """The arguments that build a tiny version of the default configuration `cfg`."""
    aliases = cfg.attribute_map
    own = {f.name: vars(cfg).get(aliases.get(f.name, f.name)) for f in dataclasses.fields(cfg)}
    small = {k: v for k, v in SMALL.items() if type(own.get(k)) is int and own[k]}
    if "kv_lora_rank" in small:  # latent attention expands to one key head per query head
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= _shrink_layers(own)
    own |= {k: CONFIG_MAPPING[v]() for k, v in PARTS.get(cfg.model_type, {}).items()}
    for name in type(cfg).sub_configs:
        if isinstance(part := own.get(name), PreTrainedConfig):
            small[name] = {"model_type": part.model_type, **_shrink(part)}
    if own.get("rope_parameters"):
        small["rope_parameters"] = _map_rope(own["rope_parameters"], _unscaled)
    return _merge(small, copy.deepcopy(OVERRIDES.get(cfg.model_type, {})))


def _shrink_layers(own: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers or more, so that every kind of layer of a list per layer is there once."""
    depth = own.get("num_hidden_layers")
    lists = {k: v for k, v in own.items() if isinstance(v, list | tuple) and len(v) == depth}
    if not lists:
        return {}
    seen: set[tuple[str, Any]] = set()
    kept = []
    for layer in range(depth):
        kinds = {
            (k, v[layer])
            for k, v in lists.items()
            if isinstance(v[layer], str) or k == "no_rope_layers"
        }
        if not kinds <= seen:
            kept.append(layer)
            seen |= kinds
    if len(kept) < 2:
        kept = [0, 1]
    return {
        "num_hidden_layers": len(kept),
        **{k: [v[layer] for layer in kept] for k, v in lists.items()},
    }


def _map_rope(
    rope: Mapping[str, Any], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Apply `function` to a copy of `rope`, or to every layer type's where it is nested."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            label: _map_rope(value, function) if isinstance(value, Mapping) else value
            for label, value in rope.items()
        }
    return function(copy.deepcopy(dict(rope)))


def _unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    kept = {key: rope[key] for key in _TRAINED_ROPE if rope.get(key) is not None}
    proportional = rope.get("rope_type") == "proportional"
    return {"rope_type": "proportional" if proportional else "default", **kept}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value
    return merged


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill `model` so that attention is sharp and nothing is hidden behind a zero."""
    for name, parameter in model.named_parameters():
        table = name.endswith("encoder.embed_positions.weight") and not parameter.requires_grad
        if not parameter.is_floating_point() or table:
            continue  # roformer keeps its sines and cosines in a parameter
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.2, generator=generator)
        elif not parameter.any():  # a bias, or a gate: norm weights keep what they start with
            parameter.normal_(0.0, 0.1, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("rotary_emb.alpha"):  # the pace of each pair, learned by mistral_large4
            buffer.normal_(0.0, 0.1, generator=generator)
