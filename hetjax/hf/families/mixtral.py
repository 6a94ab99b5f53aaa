"""Mixtral: Mistral with experts in every layer, whose weights add up to one."""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families import decoder, experts
from hetjax.hf.families.family import LINEAR
from hetjax.hf.fields import Config, nonzero
from models.decoder import Decoder
from models.moe import Experts

KEYS = {
    "layers/moe/router": ("model.layers.N.block_sparse_moe.gate.weight", LINEAR),
    "layers/moe/gate": ("model.layers.N.block_sparse_moe.experts.E.w1.weight", LINEAR),
    "layers/moe/up": ("model.layers.N.block_sparse_moe.experts.E.w3.weight", LINEAR),
    "layers/moe/down": ("model.layers.N.block_sparse_moe.experts.E.w2.weight", LINEAR),
}


def traits(c: Config, where: str) -> dict[str, Any]:
    """Experts and window."""
    sizes = experts.count(c, where, default=8), c["num_experts_per_tok"], c["intermediate_size"]
    mixture = Experts(*sizes, balance_loss=experts.balance_loss(c))
    return dict(experts=mixture, sliding_window=decoder.window(c, where))


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of experts and window. Raises ConvertError for other mixtures."""
    mixture = model.experts
    assert mixture is not None
    for setting, value, wanted in (
        ("Experts.renormalise", mixture.renormalise, True),
        ("Experts.dense_layers", mixture.dense_layers, ()),
        ("Decoder.attention_bias", model.attention_bias, False),
    ):
        if value != wanted:
            raise ConvertError(
                f"{setting}={value!r} beside experts, without Decoder.qk_norm: no transformers model computes that; "
                f"train with qk_norm=True (Qwen3-MoE), or with {setting}={wanted!r} (Mixtral)"
            )
    experts.check(mixture, "Mixtral", experts.SOFTMAX)
    own = dict(
        num_local_experts=mixture.count,
        intermediate_size=mixture.width,
        router_jitter_noise=0.0,
        sliding_window=model.sliding_window,
    )
    return experts.write(mixture) | own


FAMILY = decoder.family(
    "mixtral",
    "MixtralForCausalLM",
    holds=lambda model: model.experts is not None and not model.qk_norm,
    defaults=dict(
        vocab_size=32000,
        intermediate_size=14336,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_experts_per_tok=2,
    ),
    traits=traits,
    fields=fields,
    keys=KEYS,
    renamed={"num_experts": "num_local_experts"},
    unapplied=lambda config: nonzero(config, "attention_dropout", "router_jitter_noise"),
)
