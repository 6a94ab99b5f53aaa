"""What lies beside a model's weights: tokenizer, chat template, picture or sound processor, generation settings.

Files that came with the source go back as they were, unless transformers 4.57 could not read them. What a run says
otherwise (its tokenizer, its template, how it reads pictures, where an answer ends) is written from its settings. All
are in the form that versions 4.57 and 5 both read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hetjax.data import Pictures
from hetjax.data.items import ItemSpec
from hetjax.hf import chat_template, older, pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.folder import TOKENIZER
from hetjax.hf.parts import Parts
from hetjax.hf.source import Extras, Source, read_json
from hetjax.hf.stored import Workdir
from hetjax.run.experiment import Experiment

GENERATION, OLD_TEMPLATE = "generation_config.json", "chat_template.json"
PROCESSORS = (pictures.FILE, pictures.NESTED)


class Beside(NamedTuple):
    """Files of the export: copied from paths, and made; and the token that stands for a picture's or clip's rows."""

    copied: Mapping[str, Path]
    made: Mapping[str, Mapping[str, Any] | str]  # JSON, or a text
    item_token: int | None


def find(source: Source, parts: Parts, named: Mapping[str, str], extras: Mapping[str, Extras]) -> Beside:
    """All that goes beside the weights of `parts`, which the source names as `named` says.

    Raises ConvertError if no id is left for the token of pictures or clips."""
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
    tokenizer = read_json(run.data.tokenizer_path)
    if (
        "tokenizer.json" in came and read_json(came["tokenizer.json"]) != tokenizer
    ):  # the one it was trained with counts
        came = {name: path for name, path in came.items() if name not in TOKENIZER}
        made = {name: value for name, value in made.items() if name not in TOKENIZER}
    encoder = None if whole is None else next(e for e in run.encoders if e.name == named[whole.encoder])
    if encoder is not None and token is None:
        token = _add_token(tokenizer, encoder.placeholder, parts.llm.vocab_size)
        came.pop("tokenizer.json", None)
    if parts.whole and Tokenizer.from_str(json.dumps(tokenizer)).num_special_tokens_to_add(False):
        tokenizer["post_processor"] = None  # processors let it add tokens, which no prompt of the training had
        came.pop("tokenizer.json", None)
    if "tokenizer.json" not in came:
        made["tokenizer.json"] = tokenizer
    if "tokenizer_config.json" not in came:
        made["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": run.data.template.end_token,
            "clean_up_tokenization_spaces": False,
        }
    if whole is not None and encoder is not None and not whole.serves(encoder, came):
        came = {n: p for n, p in came.items() if n not in PROCESSORS}
        made |= whole.processor(encoder)
    made |= _answers(run, [] if encoder is None else [encoder.items], tokenizer, came)
    return Beside({n: p for n, p in came.items() if n not in (*made, OLD_TEMPLATE)}, made, token)


def _answers(
    run: Experiment, items: Sequence[ItemSpec], tokenizer: Mapping[str, Any], came: Mapping[str, Path]
) -> dict[str, Any]:
    """How prompts are written and where answers end, as in the training."""
    settings = read_json(came[GENERATION]) if GENERATION in came else {}
    end = _ids(tokenizer)[run.data.template.end_token]
    return {
        chat_template.FILE: chat_template.write(run.data.template, items),
        GENERATION: {"pad_token_id": end} | settings | {"eos_token_id": end},
    }


def item_token(extras: Extras, field: str) -> int | None:
    """The id that stands for the rows of a picture ("image") or clip ("audio") in the source's config.json: of its two
    names "id" precedes "index" in all versions of transformers."""
    values = ((extras.config or {}).get(f"{field}_token_{name}") for name in ("id", "index"))
    return next((value for value in values if isinstance(value, int)), None)


def _add_token(tokenizer: dict[str, Any], text: str, vocab_size: int) -> int:
    """The id of `text` in the tokenizer, which gets it as a new one if it has none."""
    added = tokenizer.setdefault("added_tokens", [])
    ids = _ids(tokenizer)
    if text in (token["content"] for token in added):
        return ids[text]
    new = ids.get(text, max(ids.values()) + 1)
    if new >= vocab_size:
        raise ConvertError(
            f"Decoder.vocab_size={vocab_size}: all ids are taken by the tokenizer's {new} tokens, and {text} needs one "
            f"in the exported model; give the tokenizer a token {text}, or train with vocab_size={new + 1} or more"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": new, "content": text, **flags, "special": True})
    return new


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json."""
    vocab = tokenizer["model"]["vocab"]
    ids: dict[str, int] = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
