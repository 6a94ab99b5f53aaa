"""Mistral: Llama with a sliding window."""

from hetjax.hf.families import decoder
from hetjax.hf.families.llama import is_plain

FAMILY = decoder.family(
    "mistral",
    "MistralForCausalLM",
    holds=lambda model: is_plain(model) and model.sliding_window is not None,
    defaults=dict(vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, sliding_window=4096),
    traits=lambda c, where: dict(sliding_window=decoder.window(c, where)),
    fields=lambda model: dict(sliding_window=model.sliding_window),
)
