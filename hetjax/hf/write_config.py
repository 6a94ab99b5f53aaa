"""From our models to a Hugging Face config.json, in the style of transformers 4.x, which version 5 reads too.

Rotary settings are written as rope_theta and rope_scaling: 4.57 given only version 5's rope_parameters uses a theta of
10000 in silence. Ties are written at the top and in text_config, the precision as dtype and torch_dtype.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from hetjax.hf import read_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import experts, registry
from hetjax.hf.families.decoder import told_rope
from hetjax.hf.fields import VERSION
from hetjax.hf.parts import OF_DATA, OF_PROJECTOR, Model, Parts

Config = dict[str, Any]


def write(
    parts: Parts, *, dtype: str, item_token: int | None = None, sources: Mapping[str, Config] | None = None
) -> Config:
    """config.json of the models. `item_token` stands for a picture's or clip's rows.

    `sources`: those that "llm", "vision" and "audio" came with, kept where they say the same."""
    parts, sources = _without_training(parts), {part: _told(source, parts) for part, source in (sources or {}).items()}
    found = [sources.get(part) for part in parts.models]
    if found[0] is not None and all(source == found[0] for source in found) and _same(found[0], parts):
        return _modernised(copy.deepcopy(found[0]), dtype) | _dtype(dtype)
    inner = {part: _one(part, model, sources.get(part)) for part, model in parts.models.items()}
    whole = registry.whole_of(parts)
    if whole is None:
        (config,) = inner.values()
        classes = registry.OF_KIND[config["model_type"]].classes
        own = [name for name in config.get("architectures") or () if name in classes]
        return config | {"architectures": own or [classes[0]]} | _dtype(dtype)
    if item_token is None:
        raise ConvertError(
            "image_token_index or audio_token_index: nothing tells which token stands for a picture or clip; export "
            "the run's workdir, or a checkpoint made of a LLaVA or Qwen2-Audio folder"
        )
    assert parts.llm is not None
    return {
        "architectures": [whole.architecture],
        "model_type": whole.kind,
        f"{whole.item}_token_index": item_token,
        **whole.write(parts),
        "tie_word_embeddings": parts.llm.tied,
        **{whole.fields[part]: config | _dtype(dtype) for part, config in inner.items()},
    } | _dtype(dtype)


def _without_training(parts: Parts) -> Parts:
    """The models, without what of their routers' training no config tells."""
    llm = parts.llm
    if llm is None or llm.experts is None:
        return parts
    return dataclasses.replace(
        parts, llm=dataclasses.replace(llm, experts=dataclasses.replace(llm.experts, z_loss=0.0, bias_rate=0.0))
    )


def _told(source: Config, parts: Parts) -> Config:
    """A source's config, which tells of the load-balancing loss that the run had."""
    field = registry.fields(source).get("llm")
    mixture = None if parts.llm is None else parts.llm.experts
    if field is None or mixture is None:
        return source
    if not field:
        return source | experts.told_loss(source, mixture)
    inner = source.get(field) or {}
    return source | {field: inner | experts.told_loss(inner, mixture)} if inner else source


def _dtype(dtype: str) -> Config:
    return {"torch_dtype": dtype, "dtype": dtype}


def _one(part: str, model: Model, source: Config | None) -> Config:
    """The config that a model came with, which tells of its token ids and of what lies behind it; else one made for
    it."""
    theirs = {} if source is None else registry.inner(source).get(part)
    if theirs:
        family = registry.OF_KIND[theirs["model_type"]]
        theirs |= {name: getattr(model, name) for name in family.resized}
        left_open = {*OF_PROJECTOR, *OF_DATA} - {"variant"}
        behind = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name in left_open}
        try:
            if family.read(theirs, "config.json", **behind) == model:
                return _modernised(copy.deepcopy(theirs))
        except ValueError:
            pass
    return registry.family_of(model).write(model)


def _same(source: Config, parts: Parts) -> bool:
    if parts.audio is not None:  # how long its clips are is no part of a folder
        parts = dataclasses.replace(parts, audio=dataclasses.replace(parts.audio, max_frames=None))
    try:
        return read_config.read(source, "config.json") == parts
    except ConvertError:
        return False


def _modernised(config: Config, dtype: str | None = None) -> Config:
    """A source's config as 4.x and 5 both read it, each fact told the same wherever it stands; `dtype` None is left."""
    _, tied = registry.tie(config)
    whole = registry.WHOLE_OF_KIND.get(config["model_type"])
    inside = [] if whole is None else [config[field] for field in whole.fields.values() if config.get(field)]
    for inner in (config, *inside):
        family = registry.OF_KIND.get(inner.get("model_type", ""))
        for new, old in family.renamed.items() if family is not None else ():
            if new in inner:
                inner[old] = inner.pop(new)
        if "rope_parameters" in inner:
            _write_rope(inner, config.get(VERSION))
        inner |= {name: dtype for name in _dtype("") if dtype and name in inner}
    if whole is not None and config.get(whole.fields["llm"]):
        config[registry.TIE] = config[whole.fields["llm"]][registry.TIE] = tied
    return config


def _write_rope(config: Config, version: str | None) -> None:
    """The rotary settings in the fields of version 4."""
    field, rope = told_rope({VERSION: version, **config})
    config.pop("rope_parameters")
    if field == "rope_parameters":
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
