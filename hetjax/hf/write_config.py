"""From our models to a Hugging Face config.json, in the style of transformers 4.x, which version 5 reads too.

Rotary settings are written as rope_theta and rope_scaling: 4.57 given only version 5's rope_parameters uses a theta of
10000 in silence. Ties are written at the top and in text_config, the precision as dtype and torch_dtype.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hetjax.hf import audio, experts, read_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.keys import OF_PROJECTOR, Parts
from models.attention import RopeScaling
from models.decoder import Decoder
from models.vit import ViT

Config = dict[str, Any]
MAX_POSITIONS = 32768  # written where no source tells; a bound for generation, not for the model


def write(
    parts: Parts, *, dtype: str, item_token: int | None = None, sources: Mapping[str, Config] | None = None
) -> Config:
    """config.json of the models. `item_token` stands for a picture's or clip's rows.

    `sources`: those that "llm", "vision" and "audio" came with, kept where they say the same."""
    sources = dict(sources or {})
    found = [sources.get(part) for part in parts.models]
    if found[0] is not None and all(source == found[0] for source in found) and _same(found[0], parts):
        return _modernised(copy.deepcopy(found[0]), dtype)
    if parts.llm is None and parts.audio is not None:
        return audio.alone(parts.audio, sources.get("audio")) | _dtype(dtype)
    if parts.llm is None:
        assert parts.vision is not None
        config = _tower(parts.vision, sources)
        return config | {"architectures": [read_config.VISION_CLASSES[config["model_type"]]]} | _dtype(dtype)
    text = _decoder(parts.llm, sources)
    if not parts.whole:
        return text | {"architectures": [read_config.TEXT_CLASSES[text["model_type"]]]} | _dtype(dtype)
    if item_token is None:
        raise ConvertError(
            "image_token_index or audio_token_index: nothing tells which token stands for a picture or clip; export "
            "the run's workdir, or a checkpoint made of a LLaVA or Qwen2-Audio folder"
        )
    if parts.audio is not None:
        return {
            "architectures": [audio.WHOLE_CLASS],
            "model_type": audio.WHOLE,
            "audio_token_index": item_token,
            "tie_word_embeddings": parts.llm.tied,
            "text_config": text | _dtype(dtype),
            "audio_config": audio.write(parts.audio) | _dtype(dtype),
        } | _dtype(dtype)
    vit = parts.vision
    assert vit is not None
    return {
        "architectures": [read_config.LLAVA_CLASS],
        "model_type": "llava",
        "image_token_index": item_token,
        "image_seq_length": vit.rows,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vit.projector_bias,
        "vision_feature_layer": vit.feature_layer,
        "vision_feature_select_strategy": vit.select,
        "tie_word_embeddings": parts.llm.tied,
        "text_config": text | _dtype(dtype),
        "vision_config": _tower(vit, sources) | _dtype(dtype),
    } | _dtype(dtype)


def _dtype(dtype: str) -> Config:
    return {"torch_dtype": dtype, "dtype": dtype}


def decoder(model: Decoder) -> Config:
    """The text config of a decoder, of the family that computes the same."""
    kind = "qwen3" if model.qk_norm else "qwen2" if model.attention_bias else "mistral"
    if kind == "mistral" and model.sliding_window is None:
        kind = "llama"
    if model.qk_norm and model.attention_bias:
        raise ConvertError(
            "Decoder.qk_norm=True with attention_bias=True: no transformers model has norms of queries and keys "
            "beside biases without one of the output; train with either"
        )
    if model.experts is not None:
        kind = experts.family(model, model.experts)
    config = {
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_scaling(model.rope_scaling),
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    if kind != "llama":
        config["sliding_window"] = model.sliding_window
    if kind in ("qwen2", "qwen3"):
        config["max_window_layers"] = 0
    if kind in ("qwen2", "qwen3", "qwen3_moe"):
        config["use_sliding_window"] = model.sliding_window is not None
    return config if model.experts is None else config | experts.write(kind, model.experts)


def rope_scaling(scaling: RopeScaling | None) -> Config | None:
    """The field rope_scaling."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def tower(model: ViT) -> Config:
    """The vision config of a tower; SigLIP without its pooling head, which our models do not have."""
    kind = f"{model.variant}_vision_model"
    config = {
        "model_type": kind,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_channels": 3,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "hidden_act": read_config.FAMILY_DEFAULTS[kind]["hidden_act"],
        "layer_norm_eps": model.eps,
        "attention_dropout": 0.0,
    }
    return config | ({"vision_use_head": False} if model.variant == "siglip" else {})


def _decoder(model: Decoder, sources: Mapping[str, Config]) -> Config:
    """The text config that the decoder came with, which has its token ids; else one made for it."""
    source = sources.get("llm", {})
    source = source.get("text_config", source)
    if source.get("model_type") in read_config.TEXT_CLASSES and _reads(read_config.decoder, source) == model:
        return _modernised(copy.deepcopy(source), "float32")
    return decoder(model)


def _tower(model: ViT, sources: Mapping[str, Config]) -> Config:
    """The vision config that the tower came with, which tells of its pooling head; else one made for it."""
    source = sources.get("vision")
    if source is None:
        return tower(model)
    source = dict(read_config.vision_config(source)) | {"image_size": model.image_size}  # a run may have another
    behind = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name in OF_PROJECTOR}
    return source if _reads(read_config.tower, source, **behind) == model else tower(model)


def _reads(read: Callable[..., Any], source: Config, **changes: Any) -> Any:
    try:
        return read(source, "config.json", **changes)
    except ValueError:
        return None


def _same(source: Config, parts: Parts) -> bool:
    if parts.audio is not None:  # how long its clips are is no part of a folder
        parts = dataclasses.replace(parts, audio=dataclasses.replace(parts.audio, max_frames=None))
    try:
        return read_config.read(source, "config.json") == parts
    except ConvertError:
        return False


def _modernised(config: Config, dtype: str) -> Config:
    """A source's config as 4.x and 5 both read it."""
    for inner in (config, config.get("text_config")):
        if not isinstance(inner, dict):
            continue
        experts.rename_count(inner)
        rope = dict(inner.pop("rope_parameters", None) or {})
        if rope:
            inner["rope_theta"] = rope.pop("rope_theta", inner.get("rope_theta", 10000.0))
            inner["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"]
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    return config | _dtype(dtype)
