"""What real folders hold beside their weights, as the hub has it, with the sizes made small.

Fields that the hub's files leave out are left out here. Proportions that are odd there are odd here: heads that do not
fill the width, an MLP of no whole multiple, pixels that fill no patch, one head in three for keys and values.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

HALF, CLIP_MEAN, CLIP_STD = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESCALED = dict(do_normalize=True, do_rescale=True, do_resize=True, rescale_factor=0.00392156862745098)


class Shape(NamedTuple):
    """config.json, and other files by name."""

    config: dict[str, Any]
    files: Mapping[str, dict[str, Any]] = {}


def _so400m(**changes: Any) -> dict[str, Any]:
    """27 x 27 patches of 14 pixels in 384, 16 heads of 72 features, 4304 features in the MLP; here 2 x 2 of 9 in 20."""
    sizes = dict(hidden_size=18, intermediate_size=67, num_attention_heads=2, num_hidden_layers=3)
    return dict(sizes, model_type="siglip_vision_model", image_size=20, patch_size=9) | changes


def _siglip_pictures(size: int, **changes: Any) -> dict[str, Any]:
    return (
        dict(
            **RESCALED,
            image_mean=HALF,
            image_std=HALF,
            image_processor_type="SiglipImageProcessor",
            processor_class="SiglipProcessor",
            resample=3,
            size=dict(height=size, width=size),
        )
        | changes
    )


def _clip_tower(**changes: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=16, image_size=12, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
    return dict(sizes, patch_size=6, projection_dim=8) | changes


def _generation(version: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {"generation_config.json": dict(settings, transformers_version=version)}


SIGLIP_TEXT = dict(hidden_size=18, intermediate_size=67, num_attention_heads=2, num_hidden_layers=1)
CLIP_TEXT = dict(hidden_size=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, projection_dim=8)
OF_4 = dict(torch_dtype="float32", use_cache=True, initializer_range=0.02, attention_dropout=0.0, hidden_act="silu")

SHAPES: dict[str, Shape] = {
    "SigLIP so400m/14-384": Shape(
        dict(
            architectures=["SiglipModel"],
            initializer_factor=1.0,
            model_type="siglip",
            text_config=dict(SIGLIP_TEXT, model_type="siglip_text_model", vocab_size=40),
            torch_dtype="float32",
            transformers_version="4.37.0.dev0",
            vision_config=_so400m(),
        ),
        {"preprocessor_config.json": _siglip_pictures(20)},
    ),
    "SigLIP 2 base/16-256": Shape(
        dict(
            architectures=["SiglipModel"],
            initializer_factor=1.0,
            model_type="siglip",
            text_config=dict(
                SIGLIP_TEXT, model_type="siglip_text_model", vocab_size=48, hidden_act="gelu_pytorch_tanh"
            ),
            torch_dtype="float32",
            transformers_version="4.49.0.dev0",
            vision_config=_so400m(image_size=18),
        ),
        {"preprocessor_config.json": _siglip_pictures(18, do_convert_rgb=None, resample=2)},
    ),
    "CLIP-L/14-336": Shape(
        dict(
            architectures=["CLIPModel"],
            initializer_factor=1.0,
            logit_scale_init_value=2.6592,
            model_type="clip",
            projection_dim=8,
            text_config=dict(CLIP_TEXT, model_type="clip_text_model", vocab_size=40, bos_token_id=0, eos_token_id=2),
            text_config_dict=dict(CLIP_TEXT, vocab_size=40),
            torch_dtype="float32",
            transformers_version=None,
            vision_config=_clip_tower(
                architectures=None,
                model_type="clip_vision_model",
                attention_dropout=0.0,
                dropout=0.0,
                hidden_act="quick_gelu",
                layer_norm_eps=1e-05,
                num_channels=3,
                torch_dtype=None,
                transformers_version="4.21.3",
            ),
            vision_config_dict=_clip_tower(),
        ),
        {
            "preprocessor_config.json": dict(
                crop_size=12,
                do_center_crop=True,
                do_normalize=True,
                do_resize=True,
                feature_extractor_type="CLIPFeatureExtractor",
                image_mean=CLIP_MEAN,
                image_std=CLIP_STD,
                resample=3,
                size=12,
            )
        },
    ),
    "LLaVA-1.5": Shape(
        dict(
            architectures=["LlavaForConditionalGeneration"],
            ignore_index=-100,
            image_seq_length=4,
            image_token_index=47,
            model_type="llava",
            pad_token_id=46,
            projector_hidden_act="gelu",
            text_config=dict(
                _name_or_path="lmsys/vicuna-7b-v1.5",
                architectures=["LlamaForCausalLM"],
                hidden_size=16,
                intermediate_size=43,
                num_attention_heads=4,
                num_hidden_layers=2,
                max_position_embeddings=4096,
                model_type="llama",
                rms_norm_eps=1e-05,
                torch_dtype="float32",
                vocab_size=48,
            ),
            tie_word_embeddings=False,
            torch_dtype="float32",
            transformers_version="4.36.0.dev0",
            vision_config=_clip_tower(model_type="clip_vision_model", vocab_size=32000),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            vocab_size=48,
        ),
        {
            "preprocessor_config.json": dict(
                **RESCALED,
                crop_size=dict(height=12, width=12),
                do_center_crop=True,
                do_convert_rgb=True,
                image_mean=CLIP_MEAN,
                image_processor_type="CLIPImageProcessor",
                image_std=CLIP_STD,
                processor_class="LlavaProcessor",
                resample=3,
                size=dict(shortest_edge=12),
            ),
            "processor_config.json": dict(
                image_token="<image>",
                num_additional_image_tokens=1,
                patch_size=6,
                processor_class="LlavaProcessor",
                vision_feature_select_strategy="default",
            ),
            **_generation("4.36.0.dev0", _from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=46),
        },
    ),
    "the tower of LLaVA-OneVision": Shape(
        dict(_so400m(), architectures=["SiglipVisionModel"], vision_use_head=False, torch_dtype="float32"),
        {"preprocessor_config.json": _siglip_pictures(20)},
    ),
    "the tower of LLaVA-OneVision in LLaVA": Shape(
        dict(
            architectures=["LlavaForConditionalGeneration"],
            image_token_index=47,
            image_seq_length=4,
            model_type="llava",
            projector_hidden_act="gelu",
            text_config=dict(
                OF_4,
                hidden_size=14,
                intermediate_size=76,
                model_type="qwen2",
                num_attention_heads=7,
                num_hidden_layers=2,
                num_key_value_heads=1,
                rope_theta=1000000.0,
                use_sliding_window=False,
                max_window_layers=28,
                sliding_window=131072,
                tie_word_embeddings=False,
                vocab_size=48,
            ),
            tie_word_embeddings=False,
            torch_dtype="float32",
            transformers_version="4.45.0.dev0",
            vision_config=_so400m(vision_use_head=False),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ),
    "Qwen2-Audio": Shape(
        dict(
            architectures=["Qwen2AudioForConditionalGeneration"],
            audio_config=dict(
                model_type="qwen2_audio_encoder",
                num_mel_bins=5,
                encoder_layers=2,
                encoder_attention_heads=2,
                encoder_ffn_dim=24,
                encoder_layerdrop=0.0,
                d_model=16,
                dropout=0.0,
                attention_dropout=0.0,
                activation_function="gelu",
                activation_dropout=0.0,
                scale_embedding=False,
                init_std=0.02,
                max_source_positions=8,
            ),
            audio_token_index=46,
            ignore_index=-100,
            model_type="qwen2_audio",
            text_config=dict(
                bos_token_id=43,
                eos_token_id=45,
                hidden_size=16,
                intermediate_size=43,
                max_position_embeddings=8192,
                model_type="qwen2",
                num_attention_heads=2,
                num_hidden_layers=2,
                num_key_value_heads=2,
                rms_norm_eps=1e-05,
                rope_theta=10000,
                torch_dtype="float32",
                use_mrope=False,
                vocab_size=48,
            ),
            torch_dtype="float32",
            transformers_version="4.38.1",
            vocab_size=48,
        ),
        {
            "preprocessor_config.json": dict(
                chunk_length=30,
                feature_extractor_type="WhisperFeatureExtractor",
                feature_size=5,
                hop_length=160,
                n_fft=400,
                n_samples=480000,
                nb_max_frames=3000,
                padding_side="right",
                padding_value=0.0,
                processor_class="Qwen2AudioProcessor",
                return_attention_mask=True,
                sampling_rate=16000,
            ),
            **_generation("4.38.1", do_sample=True, eos_token_id=[43, 45], repetition_penalty=1.1, top_k=20, top_p=0.5),
        },
    ),
    "SmolLM2": Shape(
        dict(
            OF_4,
            architectures=["LlamaForCausalLM"],
            attention_bias=False,
            bos_token_id=0,
            eos_token_id=0,
            hidden_size=36,
            initializer_range=0.041666666666666664,
            intermediate_size=96,
            is_llama_config=True,
            max_position_embeddings=8192,
            model_type="llama",
            num_attention_heads=9,
            num_hidden_layers=3,
            num_key_value_heads=3,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_interleaved=False,
            rope_scaling=None,
            rope_theta=100000,
            tie_word_embeddings=True,
            transformers_version="4.40.1",
            vocab_size=48,
        ),
        _generation("4.40.1", _from_model_config=True, bos_token_id=0, eos_token_id=0),
    ),
    "Llama 3.2, tied": Shape(
        dict(
            OF_4,
            architectures=["LlamaForCausalLM"],
            attention_bias=False,
            bos_token_id=40,
            eos_token_id=[41, 42, 43],
            head_dim=8,
            hidden_size=24,
            intermediate_size=64,
            max_position_embeddings=131072,
            mlp_bias=False,
            model_type="llama",
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=2,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling=dict(
                factor=32.0,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
            rope_theta=500000.0,
            tie_word_embeddings=True,
            transformers_version="4.45.0.dev0",
            vocab_size=48,
        ),
        _generation(
            "4.45.0.dev0", bos_token_id=40, do_sample=True, eos_token_id=[41, 42, 43], temperature=0.6, top_p=0.9
        ),
    ),
    "Qwen2.5": Shape(
        dict(
            OF_4,
            architectures=["Qwen2ForCausalLM"],
            bos_token_id=43,
            eos_token_id=45,
            hidden_size=28,
            intermediate_size=152,
            max_position_embeddings=32768,
            max_window_layers=21,
            model_type="qwen2",
            num_attention_heads=14,
            num_hidden_layers=3,
            num_key_value_heads=2,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=True,
            transformers_version="4.43.1",
            use_sliding_window=False,
            vocab_size=48,
        ),
        _generation("4.37.0", do_sample=True, eos_token_id=[45, 43], pad_token_id=43, repetition_penalty=1.1, top_k=20),
    ),
    "Qwen3": Shape(
        dict(
            OF_4,
            architectures=["Qwen3ForCausalLM"],
            attention_bias=False,
            bos_token_id=43,
            eos_token_id=45,
            head_dim=16,
            hidden_size=32,
            intermediate_size=96,
            max_position_embeddings=40960,
            max_window_layers=28,
            model_type="qwen3",
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=2,
            rms_norm_eps=1e-06,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=None,
            tie_word_embeddings=True,
            transformers_version="4.51.0",
            use_sliding_window=False,
            vocab_size=48,
        ),
        _generation("4.51.0", do_sample=True, eos_token_id=[45, 43], pad_token_id=43, temperature=0.6, top_p=0.95),
    ),
}
