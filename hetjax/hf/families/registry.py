"""All families, and which of them a config or a model belongs to."""

from collections.abc import Mapping, Sequence
from typing import Any

from hetjax.hf.families import (
    clip,
    dots1,
    llama,
    llava,
    mistral,
    mixtral,
    qwen2,
    qwen2_audio,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    siglip,
    whisper,
)
from hetjax.hf.families.family import Family, Whole
from hetjax.hf.fields import VERSION, Config, is_of_4
from hetjax.hf.parts import PART_OF, Model, Parts
from hetjax.hf.pictures import NAFLEX

FAMILIES = (
    *(llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen2_moe.FAMILY, mixtral.FAMILY, qwen3_moe.FAMILY),
    dots1.FAMILY,
    *(clip.FAMILY, siglip.FAMILY, whisper.FAMILY, whisper.ENCODER),
)
WHOLES = (llava.FAMILY, qwen2_audio.FAMILY)

OF_KIND = {family.kind: family for family in FAMILIES}
WHOLE_OF_KIND = {whole.kind: whole for whole in WHOLES}
PAIRS = {family.pair: family for family in FAMILIES if family.pair}
# Kinds that are known and not read -> why, and what to take
REFUSED = dict.fromkeys(("siglip2", "siglip2_vision_model"), NAFLEX)
TIE = "tie_word_embeddings"
KINDS = sorted({*OF_KIND, *WHOLE_OF_KIND, *PAIRS})


def family_of(model: Model) -> Family:
    """The family that a model belongs to; what the family does not compute of it, its `write` refuses."""
    return next(f for f in FAMILIES if f.part == PART_OF[type(model)] and f.holds(model))


def whole_of(parts: Parts) -> Whole | None:
    """The family of a language model with an encoder; None for either alone."""
    return next(w for w in WHOLES if w.encoder == parts.encoder) if parts.whole else None


def fields(config: Config) -> Mapping[str, str]:
    """Module name -> field of the config that describes it, "" for the config itself. `config` is of one of `KINDS`."""
    kind = config["model_type"]
    if kind in WHOLE_OF_KIND:
        return WHOLE_OF_KIND[kind].fields
    if kind in PAIRS:  # of a vision and a text tower, which no model of ours reads
        family = PAIRS[kind]
        return {family.part: next((name for name in family.pair_fields if config.get(name)), family.pair_fields[-1])}
    return {OF_KIND[kind].part: ""}


def inner(config: Config) -> dict[str, dict[str, Any]]:
    """Module name -> the config that describes it, model_type in each. `config` is of one of `KINDS`."""
    kind = config["model_type"]
    if kind in PAIRS:
        ((part, field),) = fields(config).items()
        return {part: {"model_type": PAIRS[kind].kind, **(config.get(field) or {})}}
    if kind not in WHOLE_OF_KIND:
        return {OF_KIND[kind].part: dict(config)}
    whole = WHOLE_OF_KIND[kind]
    found = {}
    for part, default in whole.defaults.items():
        given = config.get(whole.fields[part])
        found[part] = {"model_type": default["model_type"], **given} if given else dict(default)
    _, found["llm"][TIE] = tie(config)
    if VERSION in config:
        found["llm"].setdefault(VERSION, config[VERSION])
    return found


def kinds_inside(config: Config, part: str) -> Sequence[str]:
    """Those of which the config of a module inside may be."""
    kind = config["model_type"]
    if kind in PAIRS:
        return (PAIRS[kind].kind,)
    if part != "llm" and kind in WHOLE_OF_KIND:
        return WHOLE_OF_KIND[kind].kinds
    return [family.kind for family in FAMILIES if family.part == part]


def tie(config: Config) -> tuple[str, bool]:
    """(field that tells, whether the head is the embedding). transformers 5 ties a whole if one of two places says so;
    version 4, and a class of 5 that ties nothing itself, look into the config inside."""
    whole = WHOLE_OF_KIND.get(config["model_type"])
    if whole is None:
        return TIE, config.get(TIE) or False
    field = whole.fields["llm"]
    inside = (config.get(field) or {}).get(TIE)
    told_inside = (is_of_4(config) or not whole.ties) and inside is not None
    if told_inside or (inside and not config.get(TIE)):
        return f"{field}.{TIE}", bool(inside)
    return TIE, config.get(TIE) or False
