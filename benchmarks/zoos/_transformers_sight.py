"""Vision and audio models: model class → what differs from the small defaults of ``_transformers``, and
the inputs.
"""

from __future__ import annotations

from typing import Any

from x.benchmarks.zoos import Draw, ids, image, noise
from x.benchmarks.zoos._transformers_text import sharing

IMAGE: dict[str, Draw] = {"pixel_values": image(32)}
LARGE: dict[str, Draw] = {"pixel_values": image(64)}
FRAMES: dict[str, Draw] = {"pixel_values": noise(4, 3, 32, 32)}
WAVE: dict[str, Draw] = {"input_values": noise(1600)}

#: four stages, as small as they go
_STAGES: dict[str, Any] = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
_PYRAMID = {
    **_STAGES,
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "image_size": 64,
    "inputs": LARGE,
}
_FOUR = ["stage1", "stage2", "stage3", "stage4"]
_SWIN: dict[str, Any] = {
    "depths": [1, 2, 2],
    "num_heads": [2, 2, 4],
    "embed_dim": 24,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
}
_SWIN4 = {
    **_SWIN,
    "model_type": "swin",
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 2, 4, 4],
    "image_size": 128,
    "out_features": _FOUR,
}
_WINDOWS = {**_SWIN, "inputs": LARGE}
_DETECTOR = {"num_queries": 6, "inputs": LARGE}
_RESNET = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    }
}
_BACKBONE = {"backbone_config": {**_RESNET["backbone_config"], "out_features": _FOUR}}

VISION = sharing(
    IMAGE,
    {
        "BeitForImageClassification": {},
        "BitForImageClassification": {"embedding_size": 16, "num_groups": 4, **_STAGES},
        "ConditionalDetrForObjectDetection": {**_DETECTOR, **_RESNET},
        "ConvNextForImageClassification": {**_STAGES, "num_stages": 4, "patch_size": 4, "inputs": LARGE},
        "ConvNextV2ForImageClassification": {**_STAGES, "num_stages": 4, "patch_size": 4, "inputs": LARGE},
        "CvtForImageClassification": {
            "embed_dim": [16, 32, 48],
            "num_heads": [1, 2, 3],
            "depth": [1, 2, 3],
            "drop_path_rate": [0.0, 0.0, 0.0],
            "cls_token": [False, False, True],
            "inputs": LARGE,
        },
        "Data2VecVisionForImageClassification": {},
        "DeformableDetrForObjectDetection": {**_DETECTOR, **_BACKBONE, "num_feature_levels": 4},
        "DeiTForImageClassification": {},
        "DepthAnythingForDepthEstimation": {
            "backbone_config": {
                "model_type": "dinov2",
                "out_features": ["stage1", "stage2"],
                "reshape_hidden_states": False,
            },
            "neck_hidden_sizes": [16, 32],
            "reassemble_factors": [2, 1],
            "reassemble_hidden_size": 64,
            "fusion_hidden_size": 16,
            "patch_size": 8,
            "head_hidden_size": 8,
        },
        "DetrForObjectDetection": {**_DETECTOR, **_RESNET},
        "Dinov2ForImageClassification": {},
        "Dinov2WithRegistersForImageClassification": {},
        "DINOv3ConvNextModel": {**_STAGES},
        "DINOv3ViTModel": {},
        "DonutSwinForImageClassification": _WINDOWS,
        "DPTForDepthEstimation": {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
        "EfficientNetForImageClassification": {
            "width_coefficient": 0.5,
            "depth_coefficient": 0.5,
            "hidden_dim": 640,
            "inputs": LARGE,
        },
        "FocalNetForImageClassification": {
            "embed_dim": 16,
            "hidden_sizes": [16, 32, 48],
            "depths": [1, 1, 2],
            "patch_size": 4,
        },
        "GLPNForDepthEstimation": {**_PYRAMID, "decoder_hidden_size": 16},
        "HGNetV2ForImageClassification": {
            "stem_channels": [3, 8, 16],
            "stage_in_channels": [16, 16, 32, 48],
            "stage_mid_channels": [8, 16, 16, 24],
            "stage_out_channels": [16, 32, 48, 64],
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "stage_num_blocks": [1, 1, 1, 1],
            "inputs": LARGE,
        },
        "HieraForImageClassification": {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 4, 8],
            "inputs": LARGE,
        },
        "IJepaForImageClassification": {},
        "ImageGPTForImageClassification": {"inputs": {"input_ids": ids(16)}},
        "LevitForImageClassification": {
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "patch_size": 16,
            "image_size": 64,
            "inputs": LARGE,
        },
        "Mask2FormerForUniversalSegmentation": {
            "backbone_config": _SWIN4,
            "feature_size": 32,
            "mask_feature_size": 32,
            "dim_feedforward": 64,
            "encoder_feedforward_dim": 64,
            "num_queries": 6,
            "hidden_dim": 32,
            "decoder_layers": 3,
            "inputs": {"pixel_values": image(128)},
        },
        "MaskFormerForInstanceSegmentation": {
            "backbone_config": _SWIN4,
            "decoder_config": {"model_type": "detr", "num_queries": 6, **_RESNET},
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "inputs": {"pixel_values": image(128)},
        },
        "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25},
        "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35},
        "MobileViTForImageClassification": {
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 64, 64],
            "patch_size": 2,
            "inputs": LARGE,
        },
        "MobileViTV2ForImageClassification": {
            "width_multiplier": 0.25,
            "n_attn_blocks": [1, 1, 1],
            "patch_size": 2,
            "inputs": LARGE,
        },
        "PoolFormerForImageClassification": {**_STAGES, "layer_scale_init_value": 1.0, "inputs": LARGE},
        "PvtForImageClassification": _PYRAMID,
        "PvtV2ForImageClassification": _PYRAMID,
        "RegNetForImageClassification": {"embedding_size": 16, "groups_width": 8, **_STAGES},
        "ResNetForImageClassification": {"embedding_size": 16, **_STAGES},
        "RTDetrForObjectDetection": {
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 48, 64],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [32, 48, 64],
            "decoder_in_channels": [32, 32, 32],
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "d_model": 32,
            "num_queries": 6,
            "num_denoising": 0,
            "inputs": LARGE,
        },
        "SamModel": {
            "vision_config": {
                "window_size": 2,
                "global_attn_indexes": [1],
                "output_channels": 32,
                "image_size": 64,
                "num_pos_feats": 16,
                "mlp_dim": 128,
            },
            "prompt_encoder_config": {
                "hidden_size": 32,
                "image_size": 64,
                "image_embedding_size": 8,
                "patch_size": 8,
            },
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
            "inputs": {"pixel_values": image(64), "input_points": noise(1, 2, 2)},
        },
        "SegformerForSemanticSegmentation": {**_PYRAMID, "decoder_hidden_size": 32},
        "SuperPointForKeypointDetection": {
            "encoder_hidden_sizes": [8, 8, 16, 16],
            "decoder_hidden_size": 32,
            "inputs": LARGE,
        },
        "SwiftFormerForImageClassification": {
            "depths": [1, 1, 1, 1],
            "embed_dims": [16, 24, 32, 48],
            "mlp_ratio": 2,
            "layer_scale_init_value": 1.0,
            "inputs": LARGE,
        },
        "SwinForImageClassification": _WINDOWS,
        "Swin2SRForImageSuperResolution": {
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "image_size": 16,
            "patch_size": 1,
            "inputs": {"pixel_values": image(16)},
        },
        "Swinv2ForImageClassification": _WINDOWS,
        "TextNetForImageClassification": {
            "stem_out_channels": 16,
            "hidden_sizes": [16, 16, 24, 32, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3], [3, 3]]],
            "conv_layer_strides": [[2], [2, 1], [2, 1], [2, 1]],
            "inputs": LARGE,
        },
        "TimesformerForVideoClassification": {"num_frames": 4, "inputs": FRAMES},
        "UperNetForSemanticSegmentation": {
            "backbone_config": {
                "model_type": "convnext",
                **_STAGES,
                "num_stages": 4,
                "patch_size": 4,
                "out_features": _FOUR,
            },
            "hidden_size": 32,
            "auxiliary_in_channels": 48,
            "auxiliary_channels": 16,
            "inputs": LARGE,
        },
        "VideoMAEForVideoClassification": {"num_frames": 4, "inputs": FRAMES},
        "ViTForImageClassification": {},
        "ViTMAEModel": {"mask_ratio": 0.0},
        "ViTMSNForImageClassification": {},
        "VitDetModel": {"pretrain_image_size": 32, "window_block_indices": [0], "window_size": 2},
        "VitPoseForPoseEstimation": {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                "image_size": [64, 48],
                "patch_size": [16, 16],
                "part_features": 0,
                "num_experts": 1,
                "out_features": ["stage2"],
            },
            "inputs": {"pixel_values": noise(3, 64, 48)},
        },
        "VivitForVideoClassification": {"num_frames": 4, "tubelet_size": [2, 8, 8], "inputs": FRAMES},
        "YolosForObjectDetection": {"image_size": [32, 32], "num_detection_tokens": 5},
        "ZoeDepthForDepthEstimation": {
            "backbone_config": {
                "model_type": "beit",
                "num_hidden_layers": 4,
                "out_features": _FOUR,
                "reshape_hidden_states": False,
            },
            "backbone_hidden_size": 64,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "bottleneck_features": 16,
            "bin_embedding_dim": 8,
            "num_attractors": [2, 2, 2, 2],
            "inputs": IMAGE,
        },
    },
)

_FEATURES = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embedding_groups": 4,
}
_SQUEEZED = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 1],
    "conv_stride": [5, 2, 1],
    "num_conv_pos_embedding_groups": 4,
    "squeeze_factor": 2,
}
_CODEC = {
    "num_filters": 8,
    "upsampling_ratios": [4, 2],
    "codebook_size": 16,
    "codebook_dim": 32,
    "hidden_size": 32,
}

AUDIO = sharing(
    WAVE,
    {
        "ASTForAudioClassification": {
            "max_length": 32,
            "num_mel_bins": 32,
            "frequency_stride": 8,
            "time_stride": 8,
            "inputs": {"input_values": noise(32, 32)},
        },
        "BarkSemanticModel": {
            "name": "bark",
            "input_vocab_size": 100,
            "output_vocab_size": 100,
            "block_size": 64,
            "inputs": {"input_ids": ids()},
        },
        "DacModel": {
            "encoder_hidden_size": 8,
            "decoder_hidden_size": 32,
            "downsampling_ratios": [2, 4],
            "upsampling_ratios": [4, 2],
            "n_codebooks": 2,
            "codebook_size": 16,
            "inputs": {"input_values": noise(1, 160)},
        },
        "Data2VecAudioForCTC": _FEATURES,
        "EncodecModel": {**_CODEC, "num_lstm_layers": 1, "inputs": {"input_values": noise(1, 160)}},
        "FastSpeech2ConformerModel": {
            "duration_predictor_channels": 32,
            "energy_predictor_channels": 32,
            "pitch_predictor_channels": 32,
            "encoder_linear_units": 64,
            "decoder_linear_units": 64,
            "speech_decoder_postnet_units": 32,
            "num_mel_bins": 16,
            "inputs": {"input_ids": ids()},
        },
        "HubertForCTC": _FEATURES,
        "MimiModel": {
            **_CODEC,
            "vector_quantization_hidden_dimension": 32,
            "upsample_groups": 32,
            "num_quantizers": 2,
            "inputs": {"input_values": noise(1, 160)},
        },
        "MoonshineForConditionalGeneration": {
            "encoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
            "inputs": {"input_values": noise(2400), "decoder_input_ids": ids(6)},
        },
        "MusicgenForCausalLM": {
            "num_codebooks": 2,
            "inputs": {"input_ids": lambda batch, generator: ids()(batch * 2, generator)},
        },
        "ParakeetForCTC": {
            "encoder_config": {"num_mel_bins": 16, "subsampling_conv_channels": 16},
            "inputs": {"input_features": noise(64, 16)},
        },
        "SEWForCTC": _SQUEEZED,
        "SEWDForCTC": _SQUEEZED,
        "Speech2TextForConditionalGeneration": {
            "input_feat_per_channel": 16,
            "conv_channels": 32,
            "inputs": {"input_features": noise(40, 16), "decoder_input_ids": ids(6)},
        },
        "SpeechT5ForSpeechToText": {**_FEATURES, "inputs": {**WAVE, "decoder_input_ids": ids(6)}},
        "UniSpeechForCTC": _FEATURES,
        "UniSpeechSatForCTC": _FEATURES,
        "UnivNetModel": {
            "model_hidden_channels": 8,
            "model_in_channels": 16,
            "kernel_predictor_hidden_channels": 16,
            "num_mel_bins": 16,
            "inputs": {"input_features": noise(8, 16)},
        },
        "Wav2Vec2ForCTC": _FEATURES,
        "Wav2Vec2BertForCTC": {
            "feature_projection_input_dim": 16,
            "inputs": {"input_features": noise(20, 16)},
        },
        "Wav2Vec2ConformerForCTC": _FEATURES,
        "WavLMForCTC": _FEATURES,
        "WhisperForConditionalGeneration": {
            "num_mel_bins": 16,
            "inputs": {"input_features": noise(16, 128), "decoder_input_ids": ids(6)},
        },
    },
)
