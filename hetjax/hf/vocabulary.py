"""A vocabulary that is full gets rows for the token of pictures or clips, as transformers' own converter of LLaVA does.

Nothing of them is trained: features stand at that token, and the new rows of the head are the mean of the others, so
that no answer changes: a logit that is the mean of all is never the largest.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from hetjax.hf.parts import Parts
from hetjax.hf.tensors import Tensor

MULTIPLE = 64  # of rows, as the converter has it: a grown vocabulary can be cut over devices
KEYS = ("embed_tokens.weight", "lm_head.weight")


def wider(parts: Parts, token: int | None) -> Parts:
    """The models, with a vocabulary that holds `token`."""
    llm = parts.llm
    if llm is None or token is None or token < llm.vocab_size:
        return parts
    return dataclasses.replace(parts, llm=dataclasses.replace(llm, vocab_size=(token // MULTIPLE + 1) * MULTIPLE))


def grown(parts: Parts, found: Mapping[str, Tensor], token: int | None) -> tuple[Parts, dict[str, Tensor]]:
    """(the models, their tensors) with a vocabulary that holds `token`."""
    models = wider(parts, token)
    if models is parts:
        return parts, dict(found)
    assert models.llm is not None
    rows = models.llm.vocab_size
    return models, {key: _grown(t, rows) if key.endswith(KEYS) else t for key, t in found.items()}


def _grown(tensor: Tensor, rows: int) -> Tensor:
    """A tensor [v, d] as one [rows, d]."""

    def read() -> np.ndarray:
        values = tensor.read()
        mean = values.mean(0, keepdims=True, dtype=np.promote_types(np.float32, values.dtype)).astype(values.dtype)
        return np.concatenate([values, np.repeat(mean, rows - len(values), 0)])

    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, read)
