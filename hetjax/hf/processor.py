"""What lies beside a model's weights: tokenizer, chat template, picture or sound processor, generation settings.

Files that came with the source go back as they were, unless transformers 4.57 could not read them. What a run says
otherwise (its tokenizer, its template, how it reads pictures, where an answer ends) is written from its settings. All
are in the form that versions 4.57 and 5 both read.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hetjax.data import ChatTemplate, Pictures, writing
from hetjax.data.items import ItemSpec
from hetjax.data.script import Script, parted
from hetjax.data.tokens import load_tokenizer, token_of
from hetjax.hf import chat_template, older, pictures, prompts
from hetjax.hf.families import registry
from hetjax.hf.folder import TOKENIZER
from hetjax.hf.parts import Parts
from hetjax.hf.source import Extras, Source, read_json
from hetjax.hf.stored import Workdir
from hetjax.run.experiment import Encoder, Experiment

LOG = logging.getLogger(__name__)
GENERATION = "generation_config.json"
LEFT_OUT = ("chat_template", "add_bos_token", "split_special_tokens")  # of tokenizer_config.json: a run has its own
PROCESSORS = (pictures.FILE, pictures.NESTED)


class Beside(NamedTuple):
    """Files of the export: copied from paths, and made; and the token that stands for a picture's or clip's rows."""

    copied: Mapping[str, Path]
    made: Mapping[str, Mapping[str, Any] | str]  # JSON, or a text
    item_token: int | None


def find(source: Source, parts: Parts, named: Mapping[str, str], extras: Mapping[str, Extras]) -> Beside:
    """All that goes beside the weights of `parts`, which the source names as `named` says."""
    came: dict[str, Path] = {}
    for part in ("vision", "audio", "llm"):  # the language model's tokenizer wins
        files = extras[part].files if part in extras else {}
        came |= {n: p for n, p in files.items() if part == "llm" or parts.llm is None or n in PROCESSORS}
    whole = registry.whole_of(parts)
    tokens = (item_token(found, whole.item) for found in extras.values() if whole is not None)
    token = next((t for t in tokens if t is not None), None)
    made: dict[str, Any] = older.rewritten(came)
    if isinstance(source, Workdir) and parts.llm is None and parts.vision is not None:
        reader = next(e.items.reader for e in source.run.encoders if e.name == named["vision"])
        assert isinstance(reader, Pictures)
        made |= pictures.rewritten(came, reader)
    if not isinstance(source, Workdir) or parts.llm is None:
        return Beside({n: p for n, p in came.items() if n not in made}, made, token)
    run = source.run
    encoder = None if whole is None else next(e for e in run.encoders if e.name == named[whole.encoder])
    tokenizer = read_json(run.data.tokenizer_path)
    same = prompts.TOKENIZER in came and read_json(came[prompts.TOKENIZER]) == tokenizer
    settings = _tokenizer_settings(came, made) if same else {}
    if whole is not None and encoder is not None:
        encoder, shown = _shown(encoder, run, tokenizer, token)
        if shown != token or not whole.serves(encoder, came):
            came = {n: p for n, p in came.items() if n not in PROCESSORS}
            made |= whole.processor(encoder)
        elif pictures.NESTED in came:
            nested = made.get(pictures.NESTED) or read_json(came[pictures.NESTED])
            made[pictures.NESTED] = {name: value for name, value in nested.items() if name != "chat_template"}
        token = shown
    made |= spoken(run, [] if encoder is None else [encoder.items], tokenizer, settings, whole=parts.whole)
    alone = "" if parts.whole else registry.family_of(parts.llm).kind
    other = prompts.otherwise(made[prompts.TOKENIZER], made[prompts.CONFIG], alone)
    if other:
        LOG.warning(
            "the exported tokenizer is read as %s by AutoTokenizer of transformers 5, with other ids; "
            "PreTrainedTokenizerFast.from_pretrained reads it as the run did",
            other,
        )
    gone = {*made, *TOKENIZER, prompts.LEGACY}
    kept = {n: p for n, p in came.items() if n not in gone and not n.startswith(prompts.NAMED)}
    return Beside(kept, made, token)


def _shown(encoder: Encoder, run: Experiment, tokenizer: dict[str, Any], came: int | None) -> tuple[Encoder, int]:
    """(the encoder whose placeholder is a token of the tokenizer, which may get it as a new one; its id). A placeholder
    that is none stands for the token that the folder had, `came`."""
    text, known = token_of(encoder.items, run.data.template), _ids(tokenizer)
    if text not in known and came is not None:
        text = next((token for token, id in known.items() if id == came), text)
    return dataclasses.replace(encoder, placeholder=text), _add_token(tokenizer, text)


def _tokenizer_settings(came: Mapping[str, Path], made: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of the folder that a run started from, with the special tokens that other files name."""
    if prompts.CONFIG not in came:
        return dict(prompts.specials(came))
    settings = made.get(prompts.CONFIG) or read_json(came[prompts.CONFIG])
    return {**settings, **prompts.specials(came)}


def spoken(
    run: Experiment,
    items: Sequence[ItemSpec],
    tokenizer: dict[str, Any],
    settings: dict[str, Any],
    *,
    whole: bool,
) -> dict[str, Any]:
    """The files that say how prompts are written and tokenised and where answers end: as in the training.

    Nothing that the folder of before says of answers stays, and of prompts what the run took from it."""
    template, ids = run.data.template, _ids(tokenizer)
    made: dict[str, Any] = {prompts.TOKENIZER: tokenizer}
    if isinstance(template, ChatTemplate):
        made[chat_template.FILE] = chat_template.kept(template, items)
        settings = settings | {name: text for name, text in template.names.items() if text in ids}
    else:
        script = Script(load_tokenizer(run.data, items), [item.placeholder for item in items])
        joint = writing.joint(template, script)
        made[chat_template.FILE] = chat_template.write(template, items, joint)
        if joint:
            made[prompts.TOKENIZER] = tokenizer = parted(tokenizer)
        settings = settings | {"eos_token": template.end_token}
    adds = whole and Tokenizer.from_str(json.dumps(tokenizer)).num_special_tokens_to_add(False)
    if adds and not (isinstance(template, ChatTemplate) and template.whole):
        # processors let it add tokens, which no prompt of the training had
        made[prompts.TOKENIZER] = tokenizer | {"post_processor": None}
    pad = settings.get("pad_token")
    pad = pad if pad in ids else template.end_token
    made[prompts.CONFIG] = {
        **{name: value for name, value in settings.items() if name not in LEFT_OUT},
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it stands
        "pad_token": pad,
        "padding_side": "left",  # so that answers of several prompts at once begin where these end
        "clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces", False),
    }
    made[GENERATION] = {"eos_token_id": ids[template.end_token], "pad_token_id": ids[pad]}
    return made


def item_token(extras: Extras, field: str) -> int | None:
    """The id that stands for the rows of a picture ("image") or clip ("audio") in the source's config.json: of its two
    names "id" precedes "index" in all versions of transformers."""
    values = ((extras.config or {}).get(f"{field}_token_{name}") for name in ("id", "index"))
    return next((value for value in values if isinstance(value, int)), None)


def _add_token(tokenizer: dict[str, Any], text: str) -> int:
    """The id of `text` in the tokenizer, which gets it as a new one if it has none; the vocabulary may have to grow."""
    added = tokenizer.setdefault("added_tokens", [])
    ids = _ids(tokenizer)
    new = ids.get(text, max(ids.values()) + 1)
    if text not in (token["content"] for token in added):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": new, "content": text, **flags, "special": True})
    return new


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json."""
    vocab = tokenizer["model"]["vocab"]
    ids: dict[str, int] = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
