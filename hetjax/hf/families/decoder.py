"""What the decoders share: a config of the Llama family with a few traits, and the keys of its arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hetjax.hf.families.family import HEAD_BIAS, HEADS, LINEAR, VECTOR, Family, Table
from hetjax.hf.fields import Config, is_of_4, nonzero, only, present, refused
from models.attention import RopeScaling
from models.decoder import Decoder
from models.layers import MOST_LAYERS

KEYS: Table = {
    "first/embed": ("model.embed_tokens.weight", "v d -> v d"),
    "layers/attention_norm": ("model.layers.N.input_layernorm.weight", VECTOR),
    "layers/attention/q": ("model.layers.N.self_attn.q_proj.weight", HEADS),
    "layers/attention/k": ("model.layers.N.self_attn.k_proj.weight", HEADS),
    "layers/attention/v": ("model.layers.N.self_attn.v_proj.weight", HEADS),
    "layers/attention/q_bias": ("model.layers.N.self_attn.q_proj.bias", HEAD_BIAS),
    "layers/attention/k_bias": ("model.layers.N.self_attn.k_proj.bias", HEAD_BIAS),
    "layers/attention/v_bias": ("model.layers.N.self_attn.v_proj.bias", HEAD_BIAS),
    "layers/attention/q_norm": ("model.layers.N.self_attn.q_norm.weight", VECTOR),
    "layers/attention/k_norm": ("model.layers.N.self_attn.k_norm.weight", VECTOR),
    "layers/attention/o": ("model.layers.N.self_attn.o_proj.weight", "h k d -> d (h k)"),
    "layers/mlp_norm": ("model.layers.N.post_attention_layernorm.weight", VECTOR),
    "layers/mlp/gate": ("model.layers.N.mlp.gate_proj.weight", LINEAR),
    "layers/mlp/up": ("model.layers.N.mlp.up_proj.weight", LINEAR),
    "layers/mlp/down": ("model.layers.N.mlp.down_proj.weight", LINEAR),
    "last/norm": ("model.norm.weight", VECTOR),
    "last/head": ("lm_head.weight", LINEAR),
}
NULLS = ("sliding_window", "num_key_value_heads")  # fields in which null is not the default: none, as many as heads
DEFAULTS: dict[str, Any] = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
)
# Fields with one value that our models compute, those of other mixtures among them; another one is refused. None stands
# for absent.
ONLY: dict[str, Any] = dict(
    is_causal=True,
    attention_bias=False,
    mlp_bias=False,
    partial_rotary_factor=1.0,
    shared_expert_intermediate_size=0,
    num_shared_experts=0,
    n_shared_experts=0,
)
SILU = ("silu", "swish")  # two names of one function
MAX_POSITIONS = 32768  # written where no source tells; a bound for generation, not for the model

Traits = Callable[[Config, str], dict[str, Any]]


def family(
    kind: str,
    architecture: str,
    *,
    holds: Callable[[Decoder], bool],
    defaults: Config,
    traits: Traits,
    fields: Callable[[Decoder], dict[str, Any]],
    keys: Table | None = None,
    renamed: Mapping[str, str] | None = None,
    computes: Sequence[str] = (),
    unapplied: Callable[[Config], dict[str, Any]] = lambda config: nonzero(config, "attention_dropout"),
) -> Family:
    """A family of decoders: `traits` of a config are settings of the model, `fields` of a model are in its config.

    `computes`: those of `ONLY` that it honours."""
    limits = {name: value for name, value in ONLY.items() if name not in computes}

    def read(config: Config, where: str) -> Decoder:
        c = DEFAULTS | dict(defaults) | present(config)
        c |= {name: None for name in NULLS if config.get(name, 0) is None}
        only(c, limits, where)
        return _read(config, c, traits, where)

    def write(model: Decoder) -> dict[str, Any]:
        return {"model_type": kind} | _write(model) | fields(model)

    return Family(
        kind=kind,
        part="llm",
        classes=(architecture,),
        holds=holds,
        keys=KEYS if keys is None else {**KEYS, **keys},
        read=read,
        write=write,
        renamed=renamed or {},
        resized=("vocab_size",),
        unapplied=unapplied,
    )


def _read(config: Config, c: Config, traits: Traits, where: str) -> Decoder:
    """The decoder of a text config, `c` with the defaults of its family."""
    if c["hidden_act"] not in SILU:
        raise refused(where, "hidden_act", c["hidden_act"], "decoders are computed with 'silu' only")
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
        tied=c["tie_word_embeddings"],
        **traits(c, where),
    )


def told_rope(config: Config) -> tuple[str, dict[str, Any]]:
    """(field that tells of rotary positions, what it says): rope_scaling, of transformers 4, precedes rope_parameters,
    of version 5, which version 4 does not read."""
    old = config.get("rope_scaling")
    if old or (is_of_4(config) and "rope_theta" in config):
        return "rope_scaling", dict(old or {})
    return "rope_parameters", dict(config.get("rope_parameters") or {})


def _rope(config: Config, theta: float, where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling); `theta` where the rotary settings do not tell it."""
    field, rope = told_rope(config)
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


def window(c: Config, where: str, *, first_layer: int = 0) -> int | None:
    """Tokens that a query sees; layers before `first_layer` have no window. Raises ConvertError if layers differ."""
    found: int | None = c.get("sliding_window")
    types: Sequence[str] | None = c.get("layer_types")
    if types is None:
        sliding = lambda layer: found and layer >= first_layer
        types = ["sliding_attention" if sliding(i) else "full_attention" for i in range(c["num_hidden_layers"])]
    if set(types) == {"full_attention"}:
        return None
    if set(types) == {"sliding_attention"} and found:
        return found
    raise refused(
        where, "layer_types", sorted(set(types)), "all layers must have the same attention, full or in a sliding window"
    )


def _write(model: Decoder) -> dict[str, Any]:
    """The fields that all families have."""
    return {
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
        "rope_scaling": _rope_scaling(model.rope_scaling),
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
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
