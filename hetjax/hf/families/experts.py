"""What mixtures of experts share.

transformers 4.x names the number of experts num_local_experts (mixtral) or num_experts (qwen3_moe); version 5 reads
both for either and writes the first. The weight of the load-balancing loss is router_aux_loss_coef where
output_router_logits is true, with which transformers adds that loss, and 0 elsewhere. It is part of no folder's model:
a run may have another, which its export tells.
"""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config
from models.moe import Experts

COUNTS = ("num_local_experts", "num_experts")
COEFFICIENT = 0.001  # router_aux_loss_coef of both families where it is missing


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
    if balance_loss(config) == weight:
        return {}
    return {"output_router_logits": weight > 0} | ({"router_aux_loss_coef": weight} if weight else {})


def write(experts: Experts) -> dict[str, Any]:
    """The fields that both families have."""
    return {
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": experts.balance_loss > 0,
        "router_aux_loss_coef": experts.balance_loss or COEFFICIENT,
    }
