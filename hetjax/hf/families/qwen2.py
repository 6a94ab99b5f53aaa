"""Qwen2 and Qwen2.5: biases of queries, keys and values, and a sliding window that is mostly switched off."""

from typing import Any

from hetjax.hf.families import decoder
from hetjax.hf.fields import Config
from models.decoder import Decoder

DEFAULTS: dict[str, Any] = dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
)


def window(c: Config, where: str, *, first_layer: int) -> int | None:
    """Tokens that a query sees, where the switch is on."""
    seen = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    return decoder.window({**c, "sliding_window": seen}, where, first_layer=first_layer)


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of the window."""
    return dict(
        sliding_window=model.sliding_window,
        max_window_layers=0,
        use_sliding_window=model.sliding_window is not None,
    )


FAMILY = decoder.family(
    "qwen2",
    "Qwen2ForCausalLM",
    holds=lambda model: model.experts is None and model.attention_bias and not model.qk_norm,
    defaults=DEFAULTS,
    traits=lambda c, where: dict(
        attention_bias=True, sliding_window=window(c, where, first_layer=c["max_window_layers"])
    ),
    fields=fields,
)
