"""The fields of a config.json that make a decoder a mixture of experts, of Mixtral or of Qwen3-MoE.

transformers 4.x names the number of experts num_local_experts (mixtral) or num_experts (qwen3_moe); version 5 reads
both for either and writes the first. The weight of the router's balancing loss (router_aux_loss_coef) is kept for the
export; that loss is not added here, as LLaVA's class in transformers does not add it.
"""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config
from models.decoder import Decoder
from models.moe import Experts

CLASSES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
COUNT = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": dict(
        vocab_size=32000,
        intermediate_size=14336,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_key_value_heads=4,
        sliding_window=4096,
        use_sliding_window=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    ),
}
# Fields of other mixtures, and noise in training: another value would change what the model computes.
ONLY: dict[str, Any] = dict(
    router_jitter_noise=0, shared_expert_intermediate_size=0, num_shared_experts=0, n_shared_experts=0
)


def read(config: Config, c: Config, where: str) -> Experts | None:
    """The experts of a text config, `c` with its family's defaults. None where each layer is dense.

    Raises ConvertError for fields that contradict each other."""
    kind = c["model_type"]
    given = {name: config[name] for name in COUNT.values() if config.get(name) is not None}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConvertError(f"{where}: {both} contradict each other; remove the one that is wrong")
    count = next(iter(given.values()), c[COUNT[kind]])
    if kind == "mixtral":
        return Experts(count, c["num_experts_per_tok"], c["intermediate_size"])
    layers, step = range(c["num_hidden_layers"]), c["decoder_sparse_step"]
    if step < 1:
        raise ConvertError(f"{where}: decoder_sparse_step={step}: it must be at least 1 (1: each layer has experts)")
    dense = tuple(i for i in layers if i in c["mlp_only_layers"] or (i + 1) % step)
    if len(dense) == len(layers):
        return None
    return Experts(count, c["num_experts_per_tok"], c["moe_intermediate_size"], c["norm_topk_prob"], dense)


def family(model: Decoder, experts: Experts) -> str:
    """The family that computes the same. Raises ConvertError if none does."""
    if model.qk_norm:
        return "qwen3_moe"
    for setting, value, wanted in (
        ("Experts.renormalise", experts.renormalise, True),
        ("Experts.dense_layers", experts.dense_layers, ()),
        ("Decoder.attention_bias", model.attention_bias, False),
    ):
        if value != wanted:
            raise ConvertError(
                f"{setting}={value!r} beside experts, without Decoder.qk_norm: no transformers model computes that; "
                f"train with qk_norm=True (Qwen3-MoE), or with {setting}={wanted!r} (Mixtral)"
            )
    return "mixtral"


def rename_count(config: dict[str, Any]) -> None:
    """Gives the number of experts the name that transformers 4.x and 5 both read; 4.x ignores the other."""
    if config.get("model_type") in COUNT:
        for other in set(COUNT.values()) & config.keys():
            config[COUNT[config["model_type"]]] = config.pop(other)


def write(kind: str, experts: Experts) -> dict[str, Any]:
    """The fields of a text config of family `kind`."""
    fields: dict[str, Any] = {
        COUNT[kind]: experts.count,
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    if kind == "mixtral":
        return fields | {"intermediate_size": experts.width, "router_jitter_noise": 0.0}
    return fields | {
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
    }
