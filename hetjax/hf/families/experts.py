"""What mixtures of experts share.

transformers 4.x names the number of experts num_local_experts (mixtral) or num_experts (qwen3_moe); version 5 reads
both for either and writes the first. The weight of the load-balancing loss is router_aux_loss_coef where
output_router_logits is true, with which transformers adds that loss, and 0 elsewhere. It is part of no folder's model:
a run may have another, which its export tells. Routers of sigmoids have no such loss there.
"""

from collections.abc import Mapping
from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config
from models.moe import Experts

COUNTS = ("num_local_experts", "num_experts")
COEFFICIENT = 0.001  # router_aux_loss_coef of all families where it is missing
# Settings of the families whose routers are plain, and of those without a shared expert
SOFTMAX: dict[str, Any] = dict(scores="softmax", selection_bias=False, groups=1, scale=1.0)
NOT_SHARED: dict[str, Any] = dict(shared_width=0)


def count(c: Config, where: str, *, default: int) -> int:
    """The number of experts in either spelling. Raises ConvertError if they contradict each other."""
    given = {name: c[name] for name in COUNTS if name in c}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConvertError(f"{where}: {both} contradict each other; remove the one that is wrong")
    found: int = next(iter(given.values()), default)
    return found


def balance_loss(config: Config) -> float:
    """The weight with which transformers adds the load-balancing loss."""
    return float(config.get("router_aux_loss_coef", COEFFICIENT)) if config.get("output_router_logits") else 0.0


def told_loss(config: Config, experts: Experts) -> dict[str, Any]:
    """The fields in which the config of these experts must differ from `config`, for their load-balancing loss."""
    weight = experts.balance_loss
    if experts.scores == "sigmoid" or balance_loss(config) == weight:
        return {}
    return {"output_router_logits": weight > 0} | ({"router_aux_loss_coef": weight} if weight else {})


def check(experts: Experts, family: str, wanted: Mapping[str, Any]) -> None:
    """Raises ConvertError for a setting with another value than the one that a family's class computes."""
    for setting, value in wanted.items():
        if getattr(experts, setting) != value:
            raise ConvertError(
                f"Experts.{setting}={getattr(experts, setting)!r}: {family}, the nearest class of transformers, "
                f"computes {value!r} alone; train with that"
            )


def layers(c: Config, where: str) -> tuple[int, ...]:
    """Those without experts, of the two families of Qwen. Raises ConvertError for a step that is none."""
    step = c["decoder_sparse_step"]
    if step < 1:
        raise ConvertError(f"{where}: decoder_sparse_step={step}: it must be at least 1 (1: each layer has experts)")
    return tuple(i for i in range(c["num_hidden_layers"]) if i in c["mlp_only_layers"] or (i + 1) % step)


def of_qwen(c: Config, where: str, *, default: int, **more: Any) -> Experts | None:
    """The mixture of the two families of Qwen, with what else one of them sets; None where each layer is dense."""
    number, dense = count(c, where, default=default), layers(c, where)
    if len(dense) == c["num_hidden_layers"]:
        return None
    sizes = number, c["num_experts_per_tok"], c["moe_intermediate_size"]
    return Experts(*sizes, c["norm_topk_prob"], dense, balance_loss=balance_loss(c), **more)


def write_qwen(experts: Experts) -> dict[str, Any]:
    """The fields of the two families of Qwen."""
    return write(experts) | {
        "num_experts": experts.count,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
    }


def write(experts: Experts) -> dict[str, Any]:
    """The fields that families with a softmax have."""
    return {
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": experts.balance_loss > 0,
        "router_aux_loss_coef": experts.balance_loss or COEFFICIENT,
    }
