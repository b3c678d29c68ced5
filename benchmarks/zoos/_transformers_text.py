"""Language models: model class → what differs from the small defaults of ``_transformers``, and
the inputs.
"""

from __future__ import annotations

from typing import Any

from x.benchmarks.zoos import Draw, ids, ones, rows

TEXT: dict[str, Draw] = {"input_ids": ids()}
#: one box of a page per token
BOXES: Draw = rows([[4 * i, 8, 4 * i + 3, 12] for i in range(8)])
PAIR: dict[str, Draw] = {"input_ids": ids(8), "decoder_input_ids": ids(6)}
MASKED_PAIR: dict[str, Draw] = {**PAIR, "attention_mask": ones(8), "decoder_attention_mask": ones(6)}


def sharing(inputs: dict[str, Draw], table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of a table that bring no inputs of their own get these."""
    return {name: {"inputs": inputs, **row} for name, row in table.items()}


#: as many KV heads as query heads
MHA = {"num_key_value_heads": 4}

DECODERS = sharing(
    TEXT,
    {
        "ApertusForCausalLM": {},
        "ArceeForCausalLM": {},
        "BioGptForCausalLM": {},
        "BitNetForCausalLM": {},
        "BloomForCausalLM": {},
        "CodeGenForCausalLM": {"rotary_dim": 8},
        "CohereForCausalLM": {},
        "Cohere2ForCausalLM": {},
        "CpmAntForCausalLM": {"dim_head": 16},
        "CTRLLMHeadModel": {"dff": 128},
        "CwmForCausalLM": {},
        "DiffLlamaForCausalLM": {},
        "Ernie4_5ForCausalLM": {},
        "Exaone4ForCausalLM": {},
        "FalconForCausalLM": {"ffn_hidden_size": 128},
        "GemmaForCausalLM": {},
        "Gemma2ForCausalLM": {},
        "Gemma3ForCausalLM": {},
        "Gemma3nForCausalLM": {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 100,
            "laurel_rank": 8,
        },
        "GlmForCausalLM": {},
        "Glm4ForCausalLM": {},
        "GPT2LMHeadModel": {},
        "GPTBigCodeForCausalLM": {},
        "GPTJForCausalLM": {"rotary_dim": 8},
        "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
        "GPTNeoXForCausalLM": {},
        "GPTNeoXJapaneseForCausalLM": {},
        "GraniteForCausalLM": {},
        "HeliumForCausalLM": {},
        "HunYuanDenseV1ForCausalLM": {},
        "JetMoeForCausalLM": {"kv_channels": 16, "double": True},
        "LlamaForCausalLM": {},
        "LlamaForCausalLM with flex attention": {
            "model": "LlamaForCausalLM",
            "name": "llama-flex",
            "attn_implementation": "flex_attention",
        },
        "MinistralForCausalLM": {},
        "MistralForCausalLM": {},
        "ModernBertDecoderForCausalLM": {},
        "MptForCausalLM": {"expansion_ratio": 2},
        "NanoChatForCausalLM": {},
        "NemotronForCausalLM": {},
        "OlmoForCausalLM": {},
        "Olmo2ForCausalLM": {},
        "Olmo3ForCausalLM": {},
        "OpenAIGPTLMHeadModel": {},
        "OPTForCausalLM": {},
        "PersimmonForCausalLM": {},
        "PhiForCausalLM": {},
        "Phi3ForCausalLM": {},
        "Qwen2ForCausalLM": {},
        "Qwen3ForCausalLM": {},
        "SeedOssForCausalLM": {},
        "SmolLM3ForCausalLM": {},
        "StableLmForCausalLM": {},
        "Starcoder2ForCausalLM": {},
        "VaultGemmaForCausalLM": {},
        "XGLMForCausalLM": {},
    },
)

MIXTURES = sharing(
    TEXT,
    {
        "DbrxForCausalLM": {
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "DeepseekV2ForCausalLM": MHA,
        "DeepseekV3ForCausalLM": MHA,
        "Dots1ForCausalLM": {},
        "Ernie4_5_MoeForCausalLM": {},
        "FlexOlmoForCausalLM": {},
        "Glm4MoeForCausalLM": {},
        "GptOssForCausalLM": {},
        "GraniteMoeForCausalLM": {},
        "GraniteMoeSharedForCausalLM": {"shared_intermediate_size": 32},
        "HunYuanMoEV1ForCausalLM": {},
        "Llama4ForCausalLM": {"intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
        "LongcatFlashForCausalLM": {
            **MHA,
            "head_dim": 8,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 2,
        },
        "MiniMaxForCausalLM": {},
        "MixtralForCausalLM": {},
        "OlmoeForCausalLM": {},
        "PhimoeForCausalLM": {},
        "Qwen2MoeForCausalLM": {},
        "Qwen3MoeForCausalLM": {},
    },
)

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}

STATE_SPACES = sharing(
    TEXT,
    {
        "BambaForCausalLM": {**_MAMBA, "attn_layer_indices": [1]},
        "FalconH1ForCausalLM": {**_MAMBA, "mamba_d_ssm": 128},
        "FalconMambaForCausalLM": {"state_size": 8},
        "GraniteMoeHybridForCausalLM": {
            **_MAMBA,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
            "double": True,
        },
        "JambaForCausalLM": {
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "double": True,
        },
        "Lfm2ForCausalLM": {},
        "MambaForCausalLM": {"state_size": 8},
        "Mamba2ForCausalLM": {
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "NemotronHForCausalLM": {"double": True},
        "Qwen3NextForCausalLM": {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "double": True,
        },
        "RecurrentGemmaForCausalLM": {
            "lru_width": 64,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 16,
        },
        "RwkvForCausalLM": {"attention_hidden_size": 64, "context_length": 64},
        "xLSTMForCausalLM": {"num_blocks": 2, "chunk_size": 8},
        "ZambaForCausalLM": {
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 8,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        },
        "Zamba2ForCausalLM": {
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "chunk_size": 8,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "hybrid_layer_ids": [1],
        },
    },
)

ENCODERS = sharing(
    TEXT,
    {
        "AlbertForMaskedLM": {},
        "BertForMaskedLM": {},
        "BertGenerationDecoder": {"config": "BertGenerationConfig", "is_decoder": True},
        "BigBirdForMaskedLM": {"attention_type": "original_full"},
        "CamembertForMaskedLM": {},
        "CanineModel": {},
        "ConvBertForMaskedLM": {},
        "Data2VecTextForMaskedLM": {},
        "DebertaForMaskedLM": {},
        "DebertaV2ForMaskedLM": {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
        },
        "DistilBertForMaskedLM": {"hidden_dim": 128},
        "ElectraForMaskedLM": {},
        "ErnieForMaskedLM": {},
        "EsmForMaskedLM": {},
        "EuroBertForMaskedLM": {},
        "FlaubertWithLMHeadModel": {},
        "FNetForMaskedLM": {},
        "FunnelForMaskedLM": {"d_head": 16, "d_inner": 128, "block_sizes": [1, 1]},
        "IBertForMaskedLM": {},
        "LayoutLMForMaskedLM": {"inputs": {**TEXT, "bbox": BOXES}, "max_2d_position_embeddings": 128},
        "LiltModel": {
            "inputs": {**TEXT, "bbox": BOXES},
            "max_2d_position_embeddings": 128,
            "hidden_size": 96,
            "num_attention_heads": 4,
            "channel_shrink_ratio": 4,
        },
        "LongformerForMaskedLM": {"attention_window": 8},
        "LukeModel": {"entity_vocab_size": 100, "entity_emb_size": 64},
        "MarkupLMModel": {},
        "MegatronBertForMaskedLM": {},
        "MobileBertForMaskedLM": {},
        "ModernBertForMaskedLM": {},
        "MPNetForMaskedLM": {},
        "MraForMaskedLM": {},
        "NystromformerForMaskedLM": {},
        "PerceiverForMaskedLM": {
            "d_latents": 64,
            "num_latents": 8,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 64,
            "v_channels": 64,
            "inputs": {"inputs": ids(64)},
        },
        "ReformerForMaskedLM": {
            "is_decoder": False,
            "axial_pos_shape": [4, 16],
            "axial_pos_embds_dim": [32, 32],
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 16,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "feed_forward_size": 128,
            "num_buckets": 2,
            "hash_seed": 0,
        },
        "RemBertForMaskedLM": {},
        "RobertaForMaskedLM": {},
        "RobertaPreLayerNormForMaskedLM": {},
        "RoCBertForMaskedLM": {
            "pronunciation_vocab_size": 100,
            "shape_vocab_size": 100,
            "pronunciation_embed_dim": 32,
            "shape_embed_dim": 32,
        },
        "RoFormerForMaskedLM": {},
        "SqueezeBertForMaskedLM": {},
        "XLMWithLMHeadModel": {},
        "XLMRobertaForMaskedLM": {},
        "XLMRobertaXLForMaskedLM": {},
        "XLNetLMHeadModel": {"d_inner": 128},
        "XmodForMaskedLM": {"default_language": "en_XX"},
        "YosoForMaskedLM": {},
    },
)

ENCODER_DECODERS = sharing(
    PAIR,
    {
        "BartForConditionalGeneration": {},
        "BigBirdPegasusForConditionalGeneration": {"attention_type": "original_full"},
        "BlenderbotForConditionalGeneration": {},
        "BlenderbotSmallForConditionalGeneration": {},
        "FSMTForConditionalGeneration": {"src_vocab_size": 100, "tgt_vocab_size": 100, "inputs": MASKED_PAIR},
        "LEDForConditionalGeneration": {"attention_window": 8},
        "LongT5ForConditionalGeneration": {"inputs": MASKED_PAIR},
        "M2M100ForConditionalGeneration": {},
        "MarianMTModel": {},
        "MBartForConditionalGeneration": {},
        "MT5ForConditionalGeneration": {},
        "MvpForConditionalGeneration": {},
        "NllbMoeForConditionalGeneration": {},
        "PegasusForConditionalGeneration": {},
        "PegasusXForConditionalGeneration": {},
        "PLBartForConditionalGeneration": {},
        "ProphetNetForConditionalGeneration": {},
        "SwitchTransformersForConditionalGeneration": {"inputs": MASKED_PAIR},
        "T5ForConditionalGeneration": {},
        "T5GemmaForConditionalGeneration": {},
        "UMT5ForConditionalGeneration": {},
    },
)
