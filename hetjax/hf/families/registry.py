"""All families, and which of them a config or a model belongs to."""

from typing import Any

from hetjax.hf.families import (
    clip,
    llama,
    llava,
    mistral,
    mixtral,
    qwen2,
    qwen2_audio,
    qwen3,
    qwen3_moe,
    siglip,
    whisper,
)
from hetjax.hf.families.family import Family, Whole
from hetjax.hf.fields import Config
from hetjax.hf.parts import PART_OF, Model, Parts

FAMILIES = (
    *(llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, mixtral.FAMILY, qwen3_moe.FAMILY),
    *(clip.FAMILY, siglip.FAMILY, whisper.FAMILY, whisper.ENCODER),
)
WHOLES = (llava.FAMILY, qwen2_audio.FAMILY)

OF_KIND = {family.kind: family for family in FAMILIES}
WHOLE_OF_KIND = {whole.kind: whole for whole in WHOLES}
PAIRS = {family.pair: family for family in FAMILIES if family.pair}
KINDS = sorted({*OF_KIND, *WHOLE_OF_KIND, *PAIRS})


def family_of(model: Model) -> Family:
    """The family that a model belongs to; what the family does not compute of it, its `write` refuses."""
    return next(f for f in FAMILIES if f.part == PART_OF[type(model)] and f.holds(model))


def whole_of(parts: Parts) -> Whole | None:
    """The family of a language model with an encoder; None for either alone."""
    return next(w for w in WHOLES if w.encoder == parts.encoder) if parts.whole else None


def inner(config: Config) -> dict[str, dict[str, Any]]:
    """Module name -> the config that describes it, model_type in each: of a whole, of a pair of towers (whose text
    tower no model of ours reads), or the config itself. `config` is of one of `KINDS`."""
    kind = config["model_type"]
    if kind in PAIRS:
        return {PAIRS[kind].part: {"model_type": PAIRS[kind].kind, **(config.get("vision_config") or {})}}
    if kind not in WHOLE_OF_KIND:
        return {OF_KIND[kind].part: dict(config)}
    whole = WHOLE_OF_KIND[kind]
    found = {}
    for part, default in whole.defaults.items():
        given = config.get(whole.fields[part])
        found[part] = {"model_type": default["model_type"], **given} if given else dict(default)
    return found
