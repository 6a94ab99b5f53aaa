"""Qwen3-MoE: Qwen3 with experts in all layers or in some."""

from typing import Any

from hetjax.hf.families import decoder, experts, qwen2, qwen3
from hetjax.hf.families.family import LINEAR
from hetjax.hf.fields import Config
from models.decoder import Decoder

KEYS = {
    "layers/moe/router": ("model.layers.N.mlp.gate.weight", LINEAR),
    "layers/moe/gate": ("model.layers.N.mlp.experts.E.gate_proj.weight", LINEAR),
    "layers/moe/up": ("model.layers.N.mlp.experts.E.up_proj.weight", LINEAR),
    "layers/moe/down": ("model.layers.N.mlp.experts.E.down_proj.weight", LINEAR),
}


def traits(c: Config, where: str) -> dict[str, Any]:
    """Experts, norms and window."""
    mixture = experts.of_qwen(c, where, default=128)
    return dict(qk_norm=True, experts=mixture, sliding_window=qwen2.window(c, where, first_layer=0))


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of experts, window and biases."""
    mixture = model.experts
    assert mixture is not None
    experts.check(mixture, "Qwen3-MoE", experts.SOFTMAX | experts.NOT_SHARED)
    return qwen3.fields(model) | experts.write_qwen(mixture)


FAMILY = decoder.family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    holds=lambda model: model.experts is not None and model.qk_norm and model.experts.scores == "softmax",
    defaults=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_key_value_heads=4,
        sliding_window=4096,
        use_sliding_window=False,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    ),
    traits=traits,
    fields=fields,
    keys=KEYS,
    renamed={"num_local_experts": "num_experts"},
)
