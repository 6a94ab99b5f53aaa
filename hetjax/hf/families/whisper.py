"""Whisper's encoder: of Whisper, whose decoder is kept beside it and given back, and of Qwen2-Audio's class for it.

A run's encoder is exported in the class that computes what it computed, which is Qwen2-Audio's."""

import re
from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families.family import HEAD_BIAS, HEADS, LINEAR, VECTOR, Family, Table
from hetjax.hf.fields import Config, nonzero, only, present, refused
from models.whisper import Whisper

KERNEL = "k i o -> o i k"
KEYS: Table = {
    "first/conv1": ("conv1.weight", KERNEL),
    "first/conv1_bias": ("conv1.bias", VECTOR),
    "first/conv2": ("conv2.weight", KERNEL),
    "first/conv2_bias": ("conv2.bias", VECTOR),
    "first/position": ("embed_positions.weight", "n d -> n d"),
    "layers/attention_norm/scale": ("layers.N.self_attn_layer_norm.weight", VECTOR),
    "layers/attention_norm/bias": ("layers.N.self_attn_layer_norm.bias", VECTOR),
    "layers/attention/q": ("layers.N.self_attn.q_proj.weight", HEADS),
    "layers/attention/k": ("layers.N.self_attn.k_proj.weight", HEADS),
    "layers/attention/v": ("layers.N.self_attn.v_proj.weight", HEADS),
    "layers/attention/q_bias": ("layers.N.self_attn.q_proj.bias", HEAD_BIAS),
    "layers/attention/v_bias": ("layers.N.self_attn.v_proj.bias", HEAD_BIAS),
    "layers/attention/o": ("layers.N.self_attn.out_proj.weight", "h k d -> d (h k)"),
    "layers/attention/o_bias": ("layers.N.self_attn.out_proj.bias", VECTOR),
    "layers/mlp_norm/scale": ("layers.N.final_layer_norm.weight", VECTOR),
    "layers/mlp_norm/bias": ("layers.N.final_layer_norm.bias", VECTOR),
    "layers/mlp/up": ("layers.N.fc1.weight", LINEAR),
    "layers/mlp/up_bias": ("layers.N.fc1.bias", VECTOR),
    "layers/mlp/down": ("layers.N.fc2.weight", LINEAR),
    "layers/mlp/down_bias": ("layers.N.fc2.bias", VECTOR),
    "last/norm/scale": ("layer_norm.weight", VECTOR),
    "last/norm/bias": ("layer_norm.bias", VECTOR),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "whisper": dict(num_mel_bins=80, d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536),
    "qwen2_audio": dict(
        num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120
    ),
}
# Other names of fields, which transformers reads in their place, whatever these say
ALIASES = {
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "hidden_size": "d_model",
}
ALIASES_OF: dict[str, dict[str, str]] = {
    "whisper": ALIASES | {"num_key_value_heads": "encoder_attention_heads"},
    "qwen2_audio": ALIASES | {"intermediate_size": "encoder_ffn_dim"},
}
ONLY: dict[str, Any] = dict(activation_function="gelu", scale_embedding=False)
NOISE = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
MASKS = {"mask_time_prob": 0.05, "mask_feature_prob": 0.0}  # of SpecAugment, with transformers' defaults


def _read(variant: str, config: Config, where: str, changes: Config) -> Whisper:
    """The encoder of a Whisper config or of an encoder's own; alone, its output stays as wide as it is."""
    told = present(config)
    for other, field in ALIASES_OF[variant].items():
        if other in told and told.setdefault(field, told[other]) != told[other]:
            raise refused(
                where, other, told[other], f"{field}={told[field]} contradicts it; remove the one that is wrong"
            )
    c = DEFAULTS[variant] | told
    only(c, ONLY, where)
    sizes: dict[str, Any] = dict(
        num_mels=c["num_mel_bins"],
        width=c["d_model"],
        num_layers=c["encoder_layers"],
        num_heads=c["encoder_attention_heads"],
        mlp_width=c["encoder_ffn_dim"],
        output_width=c["d_model"],
        variant=variant,
        num_positions=c.get("max_source_positions", 1500),
    )
    return Whisper(**(sizes | dict(changes)))


def _write(model: Whisper) -> dict[str, Any]:
    """The config of Qwen2-Audio's encoder class."""
    return {
        "model_type": ENCODER.kind,
        "num_mel_bins": model.num_mels,
        "d_model": model.width,
        "encoder_layers": model.num_layers,
        "encoder_attention_heads": model.num_heads,
        "encoder_ffn_dim": model.mlp_width,
        "max_source_positions": model.num_positions,
        **ONLY,
        **dict.fromkeys(NOISE, 0.0),
    }


def _unapplied(config: Config) -> dict[str, Any]:
    masks = any((MASKS | present(config))[name] for name in MASKS)
    return nonzero(config, *NOISE, *(("apply_spec_augment",) if masks else ()))


def _never(model: Whisper) -> dict[str, Any]:
    raise ConvertError(
        "a Whisper folder holds a decoder too, and nothing tells of one of these sizes: export a run that started "
        "from a Whisper folder, or train variant='qwen2_audio', whose encoder has a class of its own"
    )


FAMILY = Family(
    kind="whisper",
    part="audio",
    classes=("WhisperForConditionalGeneration", "WhisperModel"),
    holds=lambda model: model.variant == "whisper",
    keys=KEYS,
    read=lambda config, where, **changes: _read("whisper", config, where, changes),
    write=_never,
    prefix="model.encoder.",
    canonical=lambda key: key if key.startswith(("model.", "proj_out.")) else f"model.{key}",
    beside=re.compile(r"(model\.decoder|proj_out)\..+"),
    bare={"WhisperModel": "model."},
    unapplied=_unapplied,
)
ENCODER = Family(
    kind="qwen2_audio_encoder",
    part="audio",
    classes=("Qwen2AudioEncoder",),
    holds=lambda model: model.variant == "qwen2_audio",
    keys=KEYS,
    read=lambda config, where, **changes: _read("qwen2_audio", config, where, changes),
    write=_write,
    unapplied=lambda config: nonzero(config, *NOISE),  # the class masks nothing
)
