"""Multimodal models and time series: model class → what differs from the small defaults of
``_transformers``, and the inputs.
"""

from __future__ import annotations

import torch
from x.benchmarks.zoos import Draw, ids, image, noise, ones, rows
from x.benchmarks.zoos._transformers_text import BOXES, TEXT, sharing

TEXT_IMAGE: dict[str, Draw] = {"input_ids": ids(), "pixel_values": image(32)}

#: a prompt whose first tokens stand for image patches, as a processor writes it
IMAGE_TOKEN = 4


def prompt(patches: int, tokens: int = 6) -> Draw:
    """Token numbers that begin with the placeholders of ``patches`` image patches."""

    def draw(batch: int, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([torch.full((batch, patches), IMAGE_TOKEN), ids(tokens)(batch, generator)], dim=1)

    return draw


_LLAVA = {
    "image_token_index": IMAGE_TOKEN,
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
_EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 160}

MULTIMODAL = sharing(
    TEXT_IMAGE,
    {
        "AlignModel": {
            "vision_config": _EFFICIENT,
            "projection_dim": 160,
            "inputs": {"input_ids": ids(), "pixel_values": image(64)},
        },
        "AltCLIPModel": {},
        "BlipForImageTextRetrieval": {
            "image_text_hidden_size": 32,
            "text_config": {"encoder_hidden_size": 64},
        },
        "Blip2ForConditionalGeneration": {
            "qformer_config": {"encoder_hidden_size": 64},
            "text_config": {"model_type": "opt"},
            "num_query_tokens": 4,
            "image_token_index": IMAGE_TOKEN,
            "inputs": {"input_ids": prompt(4), "pixel_values": image(32), "attention_mask": ones(10)},
        },
        "BridgeTowerModel": {"text_config": {}, "vision_config": {}},
        "BrosModel": {"inputs": {**TEXT, "bbox": noise(8, 8)}},
        "ChineseCLIPModel": {},
        "ClapModel": {
            "audio_config": {
                "spec_size": 64,
                "num_mel_bins": 16,
                "patch_embeds_hidden_size": 16,
                "depths": [1, 1, 2],
                "num_attention_heads": [2, 2, 4],
                "hidden_size": 64,
                "window_size": 4,
                "patch_size": 4,
            },
            "inputs": {**TEXT, "input_features": noise(1, 64, 16)},
        },
        "CLIPModel": {},
        "CLIPSegForImageSegmentation": {"extract_layers": [0, 1], "reduce_dim": 32, "inputs": TEXT_IMAGE},
        "FlavaModel": {"return_loss": False},
        "Florence2ForConditionalGeneration": {
            "image_token_id": IMAGE_TOKEN,
            "text_config": {"model_type": "bart"},
            "vision_config": {
                "embed_dim": [16, 32, 48, 64],
                "num_heads": [1, 2, 3, 4],
                "num_groups": [1, 2, 3, 4],
                "depths": [1, 1, 1, 1],
                "window_size": 4,
            },
            "inputs": {"input_ids": prompt(5), "decoder_input_ids": ids(5), "pixel_values": image(64)},
        },
        "GitForCausalLM": {},
        "GroupViTModel": {},
        "Idefics3ForConditionalGeneration": {
            "image_token_id": IMAGE_TOKEN,
            "text_config": {"model_type": "llama"},
            "inputs": {"input_ids": prompt(4), "pixel_values": noise(1, 3, 32, 32)},
        },
        "InstructBlipForConditionalGeneration": {
            "qformer_config": {"encoder_hidden_size": 64},
            "text_config": {"model_type": "opt"},
            "num_query_tokens": 4,
            "image_token_index": IMAGE_TOKEN,
            "inputs": {
                "input_ids": prompt(4),
                "pixel_values": image(32),
                "attention_mask": ones(10),
                "qformer_input_ids": ids(5),
            },
        },
        "LayoutLMv3Model": {
            "inputs": {**TEXT_IMAGE, "bbox": BOXES},
            "max_2d_position_embeddings": 128,
            "coordinate_size": 11,
            "shape_size": 10,
            "input_size": 32,
        },
        "LlavaForConditionalGeneration": {
            **_LLAVA,
            "inputs": {"input_ids": prompt(16), "pixel_values": image(32)},
        },
        "LxmertModel": {
            "inputs": {**TEXT, "visual_feats": noise(3, 32), "visual_pos": noise(3, 4)},
            "visual_feat_dim": 32,
            "l_layers": 2,
            "x_layers": 1,
            "r_layers": 1,
        },
        "Owlv2Model": {},
        "OwlViTModel": {},
        "PaliGemmaForConditionalGeneration": {
            "image_token_index": IMAGE_TOKEN,
            "image_token_id": IMAGE_TOKEN,
            "text_config": {"model_type": "gemma"},
            "vision_config": {"model_type": "siglip_vision_model"},
            "inputs": {
                "input_ids": prompt(16),
                "pixel_values": image(32),
                "attention_mask": ones(22),
                "token_type_ids": rows([0] * 22),
            },
        },
        "SiglipModel": {},
        "Siglip2Model": {
            "vision_config": {"num_patches": 16},
            "inputs": {
                **TEXT,
                "pixel_values": noise(16, 192),
                "pixel_attention_mask": ones(16),
                "spatial_shapes": rows([4, 4]),
            },
        },
        "UdopForConditionalGeneration": {
            "inputs": {**TEXT_IMAGE, "bbox": noise(8, 4), "decoder_input_ids": ids(6)}
        },
        "ViltModel": {},
        "VisualBertModel": {"inputs": {**TEXT, "visual_embeds": noise(3, 32)}, "visual_embedding_dim": 32},
        "VipLlavaForConditionalGeneration": {
            **_LLAVA,
            "vision_feature_layers": [-1, -2],
            "inputs": {"input_ids": prompt(16), "pixel_values": image(32)},
        },
        "XCLIPModel": {
            "vision_config": {
                "num_frames": 4,
                "mit_hidden_size": 64,
                "mit_intermediate_size": 128,
                "mit_num_attention_heads": 4,
            },
            "prompt_num_attention_heads": 4,
            "inputs": {
                "input_ids": lambda batch, generator: ids()(3, generator),
                "pixel_values": noise(4, 3, 32, 32),
            },
        },
        "TrOCRForCausalLM": {"inputs": TEXT},
        "DecisionTransformerModel": {
            "inputs": {
                "states": noise(5, 17),
                "actions": noise(5, 4),
                "rewards": noise(5, 1),
                "returns_to_go": noise(5, 1),
                "timesteps": ids(5, low=0, top=20),
                "attention_mask": ones(5),
            },
            "max_ep_len": 32,
        },
        "PatchTSTForPrediction": {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "prediction_length": 8,
            "inputs": {"past_values": noise(32, 3)},
        },
        "PatchTSMixerForPrediction": {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "prediction_length": 8,
            "inputs": {"past_values": noise(32, 3)},
        },
    },
)
