"""Tokenises so that a text stays text: special tokens in the ids come from where they are meant, and nowhere else.

A conversation is tokenised in one go, as transformers does it, because tokens may reach over the joins of its texts.
There `</s>` in an answer would end it. So the special tokens that are meant stand in the text as marks, which no text
has, and the tokenizer that reads it knows the marks in place of the special tokens.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from hetjax.data.problems import SampleError
from hetjax.data.settings import DataError

# Characters that Unicode keeps free of any meaning: around the number of a mark; inside of what only looks like a
# special token; around what {% generation %} marks; where no token may reach over
MARK, BREAK, OPEN, CLOSE, JOIN = "\U0010fffe", "\ufdd2", "\ufdd0", "\ufdd1", "\ufdd3"


class Token(NamedTuple):
    """An id, or a placeholder, and the stretch of the text that it stands for."""

    meaning: int | str
    start: int
    end: int


class Script:
    """A tokenizer in which nothing but a mark is special. `placeholders` are marked too, whatever they are to it.

    Raises DataError for a token that is special or not by the text beside it, which marks cannot be."""

    def __init__(self, tokenizer: Tokenizer, placeholders: Sequence[str]) -> None:
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        special = [text for text, token in added.items() if token.special]
        texts = list(dict.fromkeys([*special, *placeholders]))
        for text in texts:
            if text in added and added[text].single_word:
                raise DataError(
                    f"the special token {text!r} has single_word=true, so that it is text beside a letter; set it to "
                    "false in tokenizer.json"
                )
        self._tokenizer = tokenizer
        self._marks = {text: f"{MARK}{number}{MARK}" for number, text in enumerate(texts)}
        longest_first = sorted(texts, key=len, reverse=True)
        self._special = re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?!{BREAK})")
        content = json.loads(tokenizer.to_str())
        self._model = content["model"]
        without = parted(content) | {"post_processor": None}  # which would trim offsets
        self._reader = Tokenizer.from_str(json.dumps(without))
        self._reader.encode_special_tokens = True  # as text
        self._reader.add_tokens([_marked(mark, added.get(text)) for text, mark in self._marks.items()])
        ids = {text: id for text in texts if (id := tokenizer.token_to_id(text)) is not None}
        shown = {text: text if text in placeholders else ids[text] for text in texts}
        self._meanings = {self._reader.token_to_id(mark): shown[text] for text, mark in self._marks.items()}
        unknown = _unknown(self._model)
        self._never = {id: text for text, id in ids.items() if unknown not in (text, id)}

    def meant(self, text: str) -> str:
        """A text of the template: the special tokens and placeholders in it are what they look like."""
        return self._special.sub(lambda found: self._marks[found[0]], text).replace(BREAK, "")

    def plain(self, text: str, placeholders: Sequence[str] = ()) -> str:
        """A text of the data, in which the placeholders alone mean what they say. Raises SampleError."""
        for character in (MARK, BREAK, OPEN, CLOSE, JOIN):
            if character in text:
                raise SampleError("", f"its text holds {character!r}, which Unicode gives no meaning; take it out")
        for placeholder in placeholders:
            text = text.replace(placeholder, self._marks[placeholder])
        return text

    def guarded(self, text: str) -> str:
        """A text of the data that goes through a template, whose result `meant` reads. Raises SampleError."""
        return self._special.sub(lambda found: found[0][0] + BREAK + found[0][1:], self.plain(text))

    def read(self, text: str) -> list[Token]:
        """The tokens of what `meant` and `plain` made.

        Raises SampleError where the vocabulary itself makes a special token of a text."""
        encoding = self._reader.encode(text, add_special_tokens=False)
        return [Token(self._meaning(id), *place) for id, place in zip(encoding.ids, encoding.offsets, strict=True)]

    def merges_behind(self, text: str) -> bool:
        """Whether a token may reach from a text of the template over its end, into a letter or digit behind it."""
        tail = text.rpartition(MARK)[2]
        if not tail:  # a special token is never part of another; without one the question stands there
            return MARK not in text
        reader = self._reader
        normal = reader.normalizer.normalize_str(f"{tail}b") if reader.normalizer else f"{tail}b"
        cut = reader.pre_tokenizer.pre_tokenize_str(normal) if reader.pre_tokenizer else [(normal, (0, len(normal)))]
        if any(start == len(normal) - 1 for _, (start, _) in cut):
            return False
        if self._model.get("type") == "WordLevel":
            return True
        end = "".join(reader.encode(tail, add_special_tokens=False).tokens)
        return any(
            token[n].isalnum() and end.endswith(token[:n]) for token in reader.get_vocab() for n in range(1, len(token))
        )

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and behind a text."""
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        inside = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]

    def _meaning(self, id: int) -> int | str:
        if id in self._never:
            raise SampleError(
                "", f"its text spells {self._never[id]}, which the tokenizer cannot write as text; cut it"
            )
        return self._meanings.get(id, id)


def parted(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json in which no token reaches over a `JOIN`, which leaves none itself."""
    part = {"type": "Split", "pattern": {"String": JOIN}, "behavior": "Removed", "invert": False}
    cutting = tokenizer.get("pre_tokenizer")
    both = part if cutting is None else {"type": "Sequence", "pretokenizers": [part, cutting]}
    return {**tokenizer, "pre_tokenizer": both}


def _marked(mark: str, like: AddedToken | None) -> AddedToken:
    """A mark that is found where the special token would be, and takes the spaces beside it as that would; not special,
    as those are read as text."""
    if like is None:
        return AddedToken(mark, normalized=False, special=False)
    flags = dict(lstrip=like.lstrip, rstrip=like.rstrip, normalized=like.normalized)
    return AddedToken(mark, special=False, **flags)


def _unknown(model: Mapping[str, Any]) -> str | int | None:
    """What a tokenizer's model makes of a text that it does not know: a token or its id."""
    return model.get("unk_token", model.get("unk_id"))
