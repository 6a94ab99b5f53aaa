"""Tokenises so that a text stays text: special tokens in the ids come from where they are meant, and nowhere else.

A conversation is tokenised in one go, as transformers does it, because tokens may reach over the joins of its texts.
There `</s>` in an answer would end it. So the special tokens that are meant stand in the text as marks, which no text
has, and the tokenizer that reads it knows the marks in place of the special tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hetjax.data.problems import SampleError

MARK = "\U0010fffe"  # Unicode keeps it free of any meaning


class Script:
    """A tokenizer in which nothing but a mark is special. `placeholders` are marked too, whatever they are to it."""

    def __init__(self, tokenizer: Tokenizer, placeholders: Sequence[str]) -> None:
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        special = [text for text, token in added.items() if token.special]
        texts = list(dict.fromkeys([*special, *placeholders]))
        self._marks = {text: f"{MARK}{number}{MARK}" for number, text in enumerate(texts)}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        content = tokenizer.to_str()
        self._reader = Tokenizer.from_str(content)
        self._reader.encode_special_tokens = True  # as text
        self._reader.add_tokens([_marked(mark, added.get(text)) for text, mark in self._marks.items()])
        ids = {text: id for text in texts if (id := tokenizer.token_to_id(text)) is not None}
        shown = {text: text if text in placeholders else ids[text] for text in texts}
        self._meanings = {self._reader.token_to_id(mark): shown[text] for text, mark in self._marks.items()}
        unknown = _unknown(json.loads(content)["model"])
        self._never = {id: text for text, id in ids.items() if unknown not in (text, id)}

    def meant(self, text: str) -> str:
        """A text of the template: the special tokens in it are special."""
        return self._special.sub(lambda found: self._marks[found[0]], text)

    def plain(self, text: str, placeholders: Sequence[str] = ()) -> str:
        """A text of the data, in which the placeholders alone mean what they say. Raises SampleError."""
        if MARK in text:
            raise SampleError("", f"its text holds {MARK!r}, which Unicode gives no meaning; take it out")
        for placeholder in placeholders:
            text = text.replace(placeholder, self._marks[placeholder])
        return text

    def encode(self, text: str) -> list[int | str]:
        """The ids of what `meant` and `plain` made; of a mark what it stands for, if that is a placeholder.

        Raises SampleError where the vocabulary itself makes a special token of a text."""
        return [self._meaning(id) for id in self._reader.encode(text, add_special_tokens=False).ids]

    def _meaning(self, id: int) -> int | str:
        if id in self._never:
            raise SampleError(
                "", f"its text spells {self._never[id]}, which the tokenizer cannot write as text; cut it"
            )
        return self._meanings.get(id, id)


def _marked(mark: str, like: AddedToken | None) -> AddedToken:
    """A mark that takes the spaces beside it as the special token would; not special, as those are read as text."""
    strips = dict(lstrip=like.lstrip, rstrip=like.rstrip) if like else {}
    return AddedToken(mark, normalized=False, special=False, **strips)


def _unknown(model: Mapping[str, Any]) -> str | int | None:
    """What a tokenizer's model makes of a text that it does not know: a token or its id."""
    return model.get("unk_token", model.get("unk_id"))
