"""Turns a conversation into token positions, and says by position which of them are trained on.

text    <image> \\n what is it ?  blue <end>
inputs  0 0 0 0    5   7  8 9   12
targets 0 0 0 5    7   8  9 12  2         the next token; 0 where an item's position follows
weights 0 0 0 0    0   0  0 1   1         1 where the target belongs to an answer
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hetjax.data import writing
from hetjax.data.conversations import Sample
from hetjax.data.items import ItemSpec
from hetjax.data.problems import SampleError
from hetjax.data.script import Script, Token
from hetjax.data.settings import ChatTemplate, DataConfig, DataError, Template

Rows = Mapping[str, Sequence[int]]  # item name -> positions of each of its pictures or clips
NO_TEXT = 0  # token at an item's positions and at padding; masks go by position, so any id would do


class Encoded(NamedTuple):
    """A sample as a stretch of a row. Arrays are [n], n <= seq_len."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    weights: np.ndarray  # float32
    starts: Mapping[str, tuple[int, ...]]  # item name -> first position of each item
    truncated: bool


class TooLong(Exception):
    """The sample has more than seq_len positions, and may or can not be cut."""


def load_tokenizer(config: DataConfig, items: Sequence[ItemSpec]) -> Tokenizer:
    """The tokenizer of the run, in which each placeholder is one token. Raises DataError if it cannot be read or has no
    end token."""
    path, end = config.tokenizer_path, config.template.end_token
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}; set DataConfig.tokenizer to a Hugging Face tokenizer.json")
    tokenizer = open_tokenizer(path)
    if tokenizer.token_to_id(end) is None:
        kind = type(config.template).__name__
        raise DataError(f"{kind}.end_token={end!r} is no token of {path}; name the one that ends an answer there")
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([item.placeholder for item in items if item.placeholder not in known])
    return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which neither cuts nor pads. Raises DataError if it is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
    tokenizer.no_truncation()  # a tokenizer.json may carry either, and both would change samples in silence
    tokenizer.no_padding()
    return tokenizer


def vocab_size(tokenizer: Tokenizer, items: Sequence[ItemSpec]) -> int:
    """The least vocabulary that holds every id in a row: all of the tokenizer but those of placeholders."""
    never = {item.placeholder for item in items}
    return 1 + max(id for token, id in tokenizer.get_vocab(with_added_tokens=True).items() if token not in never)


class Spelled(NamedTuple):
    """A conversation as positions."""

    tokens: list[int]
    answer: list[bool]  # whether the position belongs to an answer
    starts: dict[str, list[int]]  # item name -> first position of each item


class Speller:
    """Makes positions of conversations, by one template (None: of a model without one) and one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, items: Sequence[ItemSpec], template: Template | ChatTemplate | None
    ) -> None:
        self._items = {token_of(item, template): item for item in items}
        self._writer = writing.make(template, Script(tokenizer, list(self._items)))

    @property
    def split(self) -> bool:
        """Whether a conversation is trained on as one for each of its answers."""
        return self._writer.split

    def spell(self, turns: Sequence[str], rows: Rows, *, system: str | None = None) -> Spelled:
        """The positions of question, answer, question, ... with as many for each item as `rows` says.

        All is tokenised in one go, placeholders and all: so the ids are those that transformers' processors make.
        Behind a last question the answer would follow: that is a prompt. Raises SampleError for a text that cannot be
        told from a special token, and if the template does not show each item once.
        """
        shown = [item for item in self._items.values() if rows[item.name]]
        written = self._writer.write(turns, shown, system)
        script = self._writer.script
        tokens, answer = self._read(written)
        before, behind = script.around if written.special else ([], [])
        spelled = Spelled([*before], [False] * len(before), {item.name: [] for item in self._items.values()})
        for (token, _, _), trained in zip(tokens, answer, strict=True):
            ids = [token] if isinstance(token, int) else self._place(spelled, rows, self._items[token])
            spelled.tokens.extend(ids)
            spelled.answer.extend([trained] * len(ids))
        spelled.tokens.extend(behind)
        spelled.answer.extend([False] * len(behind))
        for item in shown:
            self._check_shown(item, len(spelled.starts[item.name]), len(rows[item.name]))
        return spelled

    def _read(self, written: writing.Written) -> tuple[list[Token], list[bool]]:
        """The tokens of a text, and which of them are trained on: all that reach into an answer."""
        script, pieces = self._writer.script, written.pieces
        tokens = script.read("".join(piece.text for piece in pieces))
        trained, place = [False] * len(tokens), 0
        for piece in pieces:
            start, place = place, place + len(piece.text)
            inside = [n for n, t in enumerate(tokens) if t.start < place and t.end > start] if piece.trained else []
            if inside:  # tokens without a character of their own lie between others
                trained[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
        return tokens, trained

    def _place(self, spelled: Spelled, rows: Rows, item: ItemSpec) -> list[int]:
        """The positions of an item's next picture or clip."""
        starts = spelled.starts[item.name]
        starts.append(len(spelled.tokens))
        if len(starts) > len(rows[item.name]):
            self._check_shown(item, len(starts), len(rows[item.name]))
        return [NO_TEXT] * rows[item.name][len(starts) - 1]

    def _check_shown(self, item: ItemSpec, shown: int, count: int) -> None:
        if shown != count:
            raise SampleError("", f"the template shows {shown} of its {count} {item.field} file(s); name each once")


def token_of(item: ItemSpec, template: Template | ChatTemplate | None) -> str:
    """What stands for an item in the text that the template makes."""
    parts = template.parts if isinstance(template, ChatTemplate) else {}
    return parts.get(item.field, item.placeholder)


def encode(sample: Sample, speller: Speller, config: DataConfig, rows: Rows) -> Encoded:
    """The sample's positions, with as many for each item as `rows` says.

    Raises TooLong if it does not fit and may not, or cannot, be truncated.
    """
    tokens, answer, starts = speller.spell(sample.turns, rows, system=sample.system)
    count = min(len(tokens) - 1, config.seq_len)  # the last token is a target only
    if len(tokens) - 1 > config.seq_len:
        _check_cut(len(tokens) - 1, answer, starts, rows, config)
    if count < 1:
        raise SampleError("", "it has no question before its answer; a conversation needs at least 2 tokens")
    ids_array, weights = np.asarray(tokens, np.int32), np.asarray(answer, np.float32)
    return Encoded(
        ids_array[:count],
        ids_array[1 : count + 1],
        weights[1 : count + 1],
        {name: tuple(places) for name, places in starts.items()},
        len(tokens) - 1 > count,
    )


def ask(sample: Sample, speller: Speller, config: DataConfig, rows: Rows) -> Encoded:
    """The sample up to its last answer, with weight at the position behind which the answer starts.

    Raises TooLong if nothing fits behind it.
    """
    tokens, _, starts = speller.spell(sample.turns[:-1], rows, system=sample.system)
    if not 0 < len(tokens) < config.seq_len:
        raise TooLong(f"its question has {len(tokens)} positions of seq_len={config.seq_len}")
    weights = np.zeros(len(tokens), np.float32)
    weights[-1] = 1
    empty = np.zeros(len(tokens), np.int32)
    places = {name: tuple(first) for name, first in starts.items()}
    return Encoded(np.asarray(tokens, np.int32), empty, weights, places, False)


def _check_cut(
    count: int,
    answer: list[bool],
    starts: Mapping[str, list[int]],
    rows: Rows,
    config: DataConfig,
) -> None:
    needs = f"it needs {count} positions, but seq_len={config.seq_len}"
    if config.on_long == "skip":
        raise TooLong(f"{needs} and on_long='skip'")
    ends = (s + count for name in starts for s, count in zip(starts[name], rows[name], strict=True))
    if any(end > config.seq_len for end in ends):
        raise TooLong(f"{needs}, and truncation would cut a picture or clip")
    if not any(answer[1 : config.seq_len + 1]):
        raise TooLong(f"{needs}, and truncation would leave no answer")
