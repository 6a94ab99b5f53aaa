"""Qwen3: norms of queries and keys, no biases, and the window of Qwen2."""

from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families import decoder, qwen2
from models.decoder import Decoder


def fields(model: Decoder) -> dict[str, Any]:
    """The fields of window and biases. Raises ConvertError for biases, which no such model has."""
    if model.attention_bias:
        raise ConvertError(
            "Decoder.qk_norm=True with attention_bias=True: no transformers model has norms of queries and keys "
            "beside biases without one of the output; train with either"
        )
    return qwen2.fields(model) | dict(attention_bias=False)


FAMILY = decoder.family(
    "qwen3",
    "Qwen3ForCausalLM",
    holds=lambda model: model.experts is None and model.qk_norm,
    defaults=qwen2.DEFAULTS | dict(head_dim=128),
    traits=lambda c, where: dict(
        qk_norm=True, sliding_window=qwen2.window(c, where, first_layer=c["max_window_layers"])
    ),
    fields=fields,
)
