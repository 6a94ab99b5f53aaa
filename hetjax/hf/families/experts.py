"""What mixtures of experts share.

transformers 4.x names the number of experts num_local_experts (mixtral) or num_experts (qwen3_moe); version 5 reads
both for either and writes the first. The weight of the router's balancing loss (router_aux_loss_coef) is kept for the
export; that loss is not added here, as LLaVA's class in transformers does not add it.
"""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.fields import Config, nonzero
from models.moe import Experts

COUNTS = ("num_local_experts", "num_experts")


def count(c: Config, where: str, *, default: int) -> int:
    """The number of experts in either spelling. Raises ConvertError if they contradict each other."""
    given = {name: c[name] for name in COUNTS if name in c}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConvertError(f"{where}: {both} contradict each other; remove the one that is wrong")
    found: int = next(iter(given.values()), default)
    return found


def unapplied(config: Config, *names: str) -> dict[str, Any]:
    """Noise in training, of `names` too, and the weight of the router's loss where transformers adds that."""
    loss = ("router_aux_loss_coef",) if config.get("output_router_logits") else ()
    return nonzero(config, "attention_dropout", *names, *loss)


def write(experts: Experts) -> dict[str, Any]:
    """The fields that both families have."""
    return {
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
