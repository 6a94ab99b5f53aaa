"""From a Hugging Face config.json to our models. Every field that changes what the model computes is honoured or
refused by name; the others (initial values, token ids, length limits) are kept for the export.

A field that is absent has the default of its family: files leave out what equals it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hetjax.hf import audio, experts
from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config, only, present, refused
from hetjax.hf.keys import Parts
from models.attention import RopeScaling
from models.decoder import Decoder
from models.layers import MOST_LAYERS
from models.vit import ViT

TEXT_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    **experts.CLASSES,
}
VISION_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
LLAVA_CLASS = "LlavaForConditionalGeneration"
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # of a vision and a text tower
KINDS = {"llava", audio.WHOLE, *TEXT_CLASSES, *VISION_CLASSES, *PAIRS, *audio.KINDS}

NULLS = ("sliding_window", "num_key_value_heads")  # fields in which null is not the default: none, as many as heads
TEXT_DEFAULTS: dict[str, Any] = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
)
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(vocab_size=32000, intermediate_size=11008),
    "mistral": dict(vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=28,
    ),
    "clip_vision_model": dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip_vision_model": dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "llava": dict(
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
}
FAMILY_DEFAULTS["qwen3"] = FAMILY_DEFAULTS["qwen2"] | dict(head_dim=128)
FAMILY_DEFAULTS |= experts.DEFAULTS
VISION_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224
)
# LLaVA's own default tower, for a config without vision_config: CLIP ViT-L/14 at 336 pixels
LLAVA_TOWER: dict[str, Any] = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
# Fields with one value that our models compute; another one is refused. None stands for absent.
TEXT_ONLY: dict[str, Any] = dict(attention_bias=False, mlp_bias=False, attention_dropout=0, partial_rotary_factor=1.0)
VISION_ONLY: dict[str, Any] = dict(num_channels=3, attention_dropout=0)


def read(config: Config, where: str) -> Parts:
    """The models of config.json, which `where` names in messages. Raises ConvertError."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise refused(where, "model_type", kind, f"this architecture is not supported; supported are {known}")
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            method = config[name].get("quant_method", "?") if isinstance(config[name], Mapping) else config[name]
            raise refused(
                where, name, method, "quantised weights are not read; take the original model, or dequantise it"
            )
    try:
        if kind == "llava":
            return _llava(config, where)
        if kind == audio.WHOLE:
            return _qwen2_audio(config, where)
        if kind in audio.KINDS:
            return Parts(audio=audio.read(config, where))
        if kind in TEXT_CLASSES:
            return Parts(llm=decoder(config, where))
        return Parts(vision=tower(vision_config(config), where))
    except ConvertError:
        raise
    except ValueError as error:  # sizes that contradict each other
        raise ConvertError(f"{where}: {error}") from error
    except KeyError as error:
        raise ConvertError(f"{where}: {error} is missing; get the file again") from error
    except (TypeError, AttributeError) as error:
        raise ConvertError(f"{where}: a field has another type than it must ({error}); get the file again") from error


def vision_config(config: Config) -> Config:
    """The vision config inside: of LLaVA, of a pair of towers (whose text tower no model of ours reads), or itself."""
    kind = config["model_type"]
    if kind in PAIRS:
        return {"model_type": PAIRS[kind], **(config.get("vision_config") or {})}
    return (config.get("vision_config") or LLAVA_TOWER) if kind == "llava" else config


def decoder(config: Config, where: str) -> Decoder:
    """The decoder of a text config."""
    kind = config["model_type"]
    c = TEXT_DEFAULTS | FAMILY_DEFAULTS[kind] | present(config)
    c |= {name: None for name in NULLS if config.get(name, 0) is None}
    if c["hidden_act"] != "silu":
        raise refused(where, "hidden_act", c["hidden_act"], "decoders are computed with 'silu' only")
    only(c, TEXT_ONLY | experts.ONLY, where)
    if c["num_hidden_layers"] > MOST_LAYERS:  # before anything goes through them one by one
        raise refused(where, "num_hidden_layers", c["num_hidden_layers"], f"there are at most {MOST_LAYERS} layers")
    theta, scaling = _rope(config, c["rope_theta"], where)
    return Decoder(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        head_dim=c.get("head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=c["rms_norm_eps"],
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        attention_bias=kind == "qwen2",
        sliding_window=_window(kind, c, where),
        tied=c["tie_word_embeddings"],
        experts=experts.read(config, c, where) if kind in experts.CLASSES else None,
    )


def _rope(config: Config, theta: float, where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling): from rope_parameters (transformers 5), else from rope_theta and rope_scaling."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(field) or {})
    theta = float(rope.pop("rope_theta", theta))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise refused(
            where, f"{field}.partial_rotary_factor", config[field]["partial_rotary_factor"], "only 1.0 is computed"
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        length = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 2048
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling("llama3", float(rope["factor"]), low, high, int(length))
    raise refused(where, f"{field}.rope_type", kind, "only 'default', 'linear' and 'llama3' are computed")


def _window(kind: str, c: Config, where: str) -> int | None:
    """Tokens that a query sees. Raises ConvertError if that differs between layers."""
    window = c.get("sliding_window") if kind != "llama" else None
    if kind.startswith("qwen") and not c.get("use_sliding_window", True):
        window = None
    layers = c["num_hidden_layers"]
    types: Sequence[str] | None = c.get("layer_types")
    if types is None:
        sliding = range(c.get("max_window_layers", 0) if kind in ("qwen2", "qwen3") else 0, layers)
        types = ["sliding_attention" if window and i in sliding else "full_attention" for i in range(layers)]
    if set(types) == {"full_attention"}:
        return None
    if set(types) == {"sliding_attention"} and window:
        return window
    raise refused(
        where, "layer_types", sorted(set(types)), "all layers must have the same attention, full or in a sliding window"
    )


def tower(config: Config, where: str, **changes: Any) -> ViT:
    """The vision tower of a vision config; alone, its output stays as wide as it is."""
    kind = config["model_type"]
    c = VISION_DEFAULTS | FAMILY_DEFAULTS[kind] | present(config)
    only(c, VISION_ONLY | {n: FAMILY_DEFAULTS[kind][n] for n in ("hidden_act", "layer_norm_eps")}, where)
    for name in ("image_size", "patch_size"):
        if not isinstance(c[name], int):
            raise refused(where, name, c[name], "pictures and patches must be square, given as one number")
    sizes: dict[str, Any] = dict(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        output_width=c["hidden_size"],
        variant=kind.split("_")[0],
    )
    return ViT(**(sizes | changes))


def _llava(config: Config, where: str) -> Parts:
    c = FAMILY_DEFAULTS["llava"] | present(config)
    text = {"model_type": "llama"} | dict(c.get("text_config") or {})
    vision = {"model_type": "clip_vision_model"} | dict(vision_config(config))
    _check_inner(where, text_config=(text, TEXT_CLASSES), vision_config=(vision, VISION_CLASSES))
    text.setdefault("tie_word_embeddings", c.get("tie_word_embeddings", False))
    if c["projector_hidden_act"] != "gelu":
        raise refused(where, "projector_hidden_act", c["projector_hidden_act"], "only the exact 'gelu' is computed")
    llm = decoder(text, f"{where}: text_config")
    choices = dict(
        feature_layer=c["vision_feature_layer"],
        select=c["vision_feature_select_strategy"],
        projector_bias=c["multimodal_projector_bias"],
    )
    return Parts(llm, tower(vision, f"{where}: vision_config", output_width=llm.width, **choices))


def _qwen2_audio(config: Config, where: str) -> Parts:
    text = {"model_type": "qwen2"} | dict(config.get("text_config") or {})
    tower = audio.inner(config)
    _check_inner(where, text_config=(text, TEXT_CLASSES), audio_config=(tower, ("qwen2_audio_encoder",)))
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    llm = decoder(text, f"{where}: text_config")
    return Parts(llm, audio=audio.read(tower, f"{where}: audio_config", output_width=llm.width))


def _check_inner(where: str, **configs: tuple[Config, Collection[str]]) -> None:
    """Raises ConvertError unless each config inside is of one of the kinds beside it, in plain numbers."""
    for field, (config, kinds) in configs.items():
        if config["model_type"] not in kinds:
            raise refused(
                where, f"{field}.model_type", config["model_type"], f"not supported; these are: {', '.join(kinds)}"
            )
        if config.get("quantization_config"):
            raise refused(where, f"{field}.quantization_config", "...", "quantised weights are not read")
