"""Llama, SmolLM2 and all that share their config: the plain decoder, whose every token sees all before it."""

from hetjax.hf.families import decoder
from models.decoder import Decoder


def is_plain(model: Decoder) -> bool:
    """Whether nothing but a window tells it from Llama."""
    return model.experts is None and not model.qk_norm and not model.attention_bias


FAMILY = decoder.family(
    "llama",
    "LlamaForCausalLM",
    holds=lambda model: is_plain(model) and model.sliding_window is None,
    defaults=dict(vocab_size=32000, intermediate_size=11008),
    traits=lambda c, where: dict(sliding_window=decoder.window({**c, "sliding_window": None}, where)),
    fields=lambda model: dict(attention_bias=False, mlp_bias=False),
)
