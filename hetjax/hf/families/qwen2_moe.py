"""Qwen2-MoE (Qwen1.5-MoE): Qwen2 with experts, beside a shared one that a sigmoid of the token weighs."""

from typing import Any

from hetjax.hf.families import decoder, experts, qwen2, qwen3_moe
from hetjax.hf.families.family import LINEAR
from hetjax.hf.fields import Config
from models.decoder import Decoder

KEYS = qwen3_moe.KEYS | {
    "layers/moe/shared/gate": ("model.layers.N.mlp.shared_expert.gate_proj.weight", LINEAR),
    "layers/moe/shared/up": ("model.layers.N.mlp.shared_expert.up_proj.weight", LINEAR),
    "layers/moe/shared/down": ("model.layers.N.mlp.shared_expert.down_proj.weight", LINEAR),
    "layers/moe/shared_gate": ("model.layers.N.mlp.shared_expert_gate.weight", LINEAR),
}


def traits(c: Config, where: str) -> dict[str, Any]:
    """Experts, biases and window."""
    shared = dict(shared_width=c["shared_expert_intermediate_size"], shared_gate=True)
    mixture = experts.of_qwen(c, where, default=60, **shared)
    return dict(attention_bias=c["qkv_bias"], experts=mixture, sliding_window=qwen2.window(c, where, first_layer=0))


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of experts, window and biases. Raises ConvertError for other mixtures."""
    mixture = model.experts
    assert mixture is not None
    experts.check(mixture, "Qwen2-MoE", experts.SOFTMAX | dict(shared_gate=True))
    own = dict(shared_expert_intermediate_size=mixture.shared_width, qkv_bias=model.attention_bias)
    return qwen2.fields(model) | experts.write_qwen(mixture) | own


FAMILY = decoder.family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    holds=lambda model: model.experts is not None and not model.qk_norm and model.experts.shared_width > 0,
    defaults=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        sliding_window=4096,
        use_sliding_window=False,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=(),
        qkv_bias=True,
    ),
    traits=traits,
    fields=fields,
    keys=KEYS,
    renamed={"num_local_experts": "num_experts"},
    computes=("shared_expert_intermediate_size",),
)
