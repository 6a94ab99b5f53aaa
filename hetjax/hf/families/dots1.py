"""dots.llm1: Qwen3's attention, and the experts of DeepSeek-V3 behind a few dense layers.

Its router takes a sigmoid of each logit, chooses with a bias among the best groups of experts, and weighs without; all
tokens go to the shared expert. transformers 4.57 gives experts of other groups 0, not -inf, where it chooses, which is
another choice where biases are so negative that a sum of the chosen groups is below 0.
"""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families import decoder, experts, qwen3_moe
from hetjax.hf.families.family import LINEAR, VECTOR
from hetjax.hf.fields import Config
from models.decoder import Decoder
from models.moe import Experts

KEYS = qwen3_moe.KEYS | {
    "layers/moe/bias": ("model.layers.N.mlp.gate.e_score_correction_bias", VECTOR),
    "layers/moe/shared/gate": ("model.layers.N.mlp.shared_experts.gate_proj.weight", LINEAR),
    "layers/moe/shared/up": ("model.layers.N.mlp.shared_experts.up_proj.weight", LINEAR),
    "layers/moe/shared/down": ("model.layers.N.mlp.shared_experts.down_proj.weight", LINEAR),
}
ROUTER: dict[str, Any] = dict(scores="sigmoid", selection_bias=True, shared_gate=False)


def traits(c: Config, where: str) -> dict[str, Any]:
    """Experts, norms and window. Raises ConvertError for sizes without which transformers makes no such model."""
    for name in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"):
        if not c.get(name):
            raise ConvertError(f"{where}: {name}={c.get(name)!r}: a dots1 needs at least 1")
    dense = tuple(range(min(c["first_k_dense_replace"], c["num_hidden_layers"])))
    window = decoder.window(c, where, first_layer=c["max_window_layers"])
    mixture = Experts(
        count=c["n_routed_experts"],
        per_token=c["num_experts_per_tok"],
        width=c["moe_intermediate_size"],
        renormalise=c["norm_topk_prob"],
        dense_layers=dense,
        groups=c["n_group"],
        chosen_groups=c["topk_group"],
        scale=float(c["routed_scaling_factor"]),
        shared_width=c["n_shared_experts"] * c["moe_intermediate_size"],
        **ROUTER,
    )
    return dict(qk_norm=True, experts=None if len(dense) == c["num_hidden_layers"] else mixture, sliding_window=window)


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of experts, window and biases. Raises ConvertError for other mixtures."""
    mixture = model.experts
    assert mixture is not None
    dense = mixture.dense_layers
    experts.check(mixture, "dots1", ROUTER | dict(dense_layers=tuple(range(len(dense)))))
    if model.attention_bias:
        raise ConvertError("Decoder.attention_bias=True: dots1 has biases of the output beside; train with False")
    if not mixture.shared_width or mixture.shared_width % mixture.width:
        raise ConvertError(
            f"Experts.shared_width={mixture.shared_width}: of dots1 it is a multiple of width={mixture.width}; train "
            "with that"
        )
    return dict(
        n_routed_experts=mixture.count,
        n_shared_experts=mixture.shared_width // mixture.width,
        num_experts_per_tok=mixture.per_token,
        moe_intermediate_size=mixture.width,
        first_k_dense_replace=len(dense),
        norm_topk_prob=mixture.renormalise,
        n_group=mixture.groups,
        topk_group=mixture.chosen_groups,
        routed_scaling_factor=mixture.scale,
        sliding_window=model.sliding_window,
        max_window_layers=0,
        attention_bias=False,
    )


FAMILY = decoder.family(
    "dots1",
    "Dots1ForCausalLM",
    holds=lambda model: model.experts is not None and model.qk_norm and model.experts.scores == "sigmoid",
    defaults=dict(
        vocab_size=152064,
        hidden_size=4608,
        intermediate_size=10944,
        num_hidden_layers=62,
        moe_intermediate_size=1408,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        sliding_window=4096,
        max_window_layers=62,
    ),
    traits=traits,
    fields=fields,
    keys=KEYS,
    computes=("n_shared_experts",),
)
