"""Audio in Hugging Face folders: Whisper's encoder inside of Whisper or alone, and in Qwen2-Audio.

Of a Whisper folder the encoder is ours; its decoder is kept beside it and given back. A run's audio encoder is exported
in the class that computes what it computed: Qwen2-Audio, whose encoder class it is when it comes alone.
"""

import copy
from collections.abc import Mapping
from typing import Any

from hetjax.data import Sounds
from hetjax.data.sounds import HOP, RATE, WINDOW
from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config, only, present
from models.whisper import Whisper

KINDS = ("whisper", "qwen2_audio_encoder")
CLASS, BARE_CLASS = "Qwen2AudioEncoder", "WhisperModel"  # the latter stores its keys without "model."
WHOLE, WHOLE_CLASS = "qwen2_audio", "Qwen2AudioForConditionalGeneration"
PROCESSOR = "Qwen2AudioProcessor"
VECTOR, LINEAR, KERNEL = "a -> a", "i o -> o i", "k i o -> o i k"
HEADS = "d h k -> (h k) d"

TABLE = {
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
    "layers/attention/q_bias": ("layers.N.self_attn.q_proj.bias", "h k -> (h k)"),
    "layers/attention/v_bias": ("layers.N.self_attn.v_proj.bias", "h k -> (h k)"),
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
PROJECTION = {"last/projector/weight": ("linear.weight", LINEAR), "last/projector/bias": ("linear.bias", VECTOR)}

FEATURES: dict[str, Any] = dict(sampling_rate=RATE, n_fft=WINDOW, hop_length=HOP, padding_value=0.0)

DEFAULTS: dict[str, dict[str, Any]] = {
    "whisper": dict(num_mel_bins=80, d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536),
    "qwen2_audio_encoder": dict(
        num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120
    ),
}
ONLY: dict[str, Any] = dict(
    activation_function="gelu",
    scale_embedding=False,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
    apply_spec_augment=False,
)


def read(config: Config, where: str, **changes: Any) -> Whisper:
    """The encoder of a Whisper config or of an encoder's own; alone, its output stays as wide as it is."""
    kind = config["model_type"]
    c = DEFAULTS[kind] | present(config)
    only(c, ONLY, where)
    sizes: dict[str, Any] = dict(
        num_mels=c["num_mel_bins"],
        width=c["d_model"],
        num_layers=c["encoder_layers"],
        num_heads=c["encoder_attention_heads"],
        mlp_width=c["encoder_ffn_dim"],
        output_width=c["d_model"],
        variant="whisper" if kind == "whisper" else "qwen2_audio",
        num_positions=c.get("max_source_positions", 1500),
    )
    return Whisper(**(sizes | changes))


def inner(config: Config) -> Config:
    """The audio config inside of Qwen2-Audio's, or itself."""
    if config["model_type"] != WHOLE:
        return config
    return {"model_type": "qwen2_audio_encoder"} | dict(config.get("audio_config") or {})


def write(model: Whisper) -> dict[str, Any]:
    """The config of Qwen2-Audio's encoder class."""
    return {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": model.num_mels,
        "d_model": model.width,
        "encoder_layers": model.num_layers,
        "encoder_attention_heads": model.num_heads,
        "encoder_ffn_dim": model.mlp_width,
        "max_source_positions": model.num_positions,
        **{name: value for name, value in ONLY.items() if name != "apply_spec_augment"},
    }


def alone(model: Whisper, source: Config | None) -> dict[str, Any]:
    """The config of an encoder without a language model: with the decoder that it came with, or of its own class."""
    if model.variant == "qwen2_audio":
        return write(model) | {"architectures": [CLASS]}
    if source is None or source["model_type"] != "whisper" or read(source, "config.json") != plain(model):
        raise ConvertError(
            "a Whisper folder holds a decoder too, and nothing tells of one of these sizes: export a run that started "
            "from a Whisper folder, or train variant='qwen2_audio', whose encoder has a class of its own"
        )
    return copy.deepcopy(dict(source))


def plain(model: Whisper) -> Whisper:
    """What of the model a folder with the encoder alone tells: no projector, and the whole context."""
    return Whisper(
        model.num_mels,
        model.width,
        model.num_layers,
        model.num_heads,
        model.mlp_width,
        model.width,
        variant=model.variant,
        num_positions=model.num_positions,
    )


def check_whole(model: Whisper) -> None:
    """Raises ConvertError unless Qwen2-Audio's class computes what the model does beside a language model."""
    for name, wanted in (("variant", "qwen2_audio"), ("projector", "linear")):
        if getattr(model, name) != wanted:
            raise ConvertError(
                f"Whisper.{name}={getattr(model, name)!r}: the one class that holds an audio encoder beside a language "
                f"model, Qwen2-Audio's, has {wanted!r}; train with that, or export the modules apart (--modules)"
            )


def reader(settings: Mapping[str, Any], model: Whisper, where: str) -> Sounds:
    """The reader that preprocessor_config.json describes. Raises ConvertError for features that are not computed."""
    same = FEATURES | {"feature_size": model.num_mels, "do_normalize": False, "dither": 0.0}
    for name, value in same.items():
        if settings.get(name, value) != value:
            raise ConvertError(f"{where}: {name}={settings[name]!r}: only {value!r} is computed")
    return Sounds(model.num_mels, model.frames, model.context, model.rows_of)


def features(reader: Sounds, model: Whisper) -> dict[str, Any]:
    """preprocessor_config.json: features as the loader makes them."""
    samples = 2 * model.num_positions * HOP
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": PROCESSOR,
        "feature_size": reader.num_mels,
        **FEATURES,
        "chunk_length": samples // RATE if samples % RATE == 0 else samples / RATE,
        "n_samples": samples,
        "nb_max_frames": 2 * model.num_positions,
        "padding_side": "right",
        "return_attention_mask": True,
    }


def processor(placeholder: str) -> dict[str, Any]:
    """processor_config.json: a clip's rows stand where its placeholder stood, without tokens around them."""
    return {
        "processor_class": PROCESSOR,
        "audio_token": placeholder,
        "audio_bos_token": "",
        "audio_eos_token": "",
    }
