"""Turns a conversation into token positions, and says by position which of them are trained on.

text    <image> \\n what is it ?  blue <end>
inputs  0 0 0 0    5   7  8 9   12
targets 0 0 0 5    7   8  9 12  2         the next token; 0 where an item's position follows
weights 0 0 0 0    0   0  0 1   1         1 where the target belongs to an answer
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hetjax.data.conversations import Sample, SampleError
from hetjax.data.items import Item, ItemSpec
from hetjax.data.settings import DataConfig, DataError, Template

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
        raise DataError(f"Template.end_token={end!r} is no token of {path}; name the one that ends an answer there")
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


def spell(
    turns: Sequence[str],
    tokenizer: Tokenizer,
    items: Sequence[ItemSpec],
    template: Template,
    found: Mapping[str, Sequence[Item]],
) -> Spelled:
    """The positions of question, answer, question, ... with as many for each item as `found` says.

    A prompt is tokenised in one go, placeholders and all: so its ids are those that transformers' processors make.
    Behind a last question the answer would follow: that is a prompt. Raises SampleError if the tokenizer does not make
    one token of each placeholder, and of nothing else.
    """
    spelled = Spelled([], [], {item.name: [] for item in items})
    shown = {tokenizer.token_to_id(item.placeholder): item for item in items}
    assert None not in shown  # `load_tokenizer` saw to it
    for trained, text in _texts(turns, template):
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            ids = [token]
            if token in shown:
                name = shown[token].name
                number = len(spelled.starts[name])
                ids = [NO_TEXT] * (found[name][number].rows if number < len(found[name]) else 0)
                spelled.starts[name].append(len(spelled.tokens))
            spelled.tokens.extend(ids)
            spelled.answer.extend([trained] * len(ids))
    for item in items:
        seen, count = len(spelled.starts[item.name]), len(found[item.name])
        if seen < count:
            what = f"the tokenizer sees {seen} of its {count} {item.placeholder}"
            raise SampleError("", f"{what}: a longer token holds the others; put spaces around them")
        if seen > count:
            what = f"the tokenizer sees {seen} {item.placeholder} where the text has {count}"
            raise SampleError("", f"{what}: other spellings give the same token; take them out of the text")
    return spelled


def encode(
    sample: Sample,
    tokenizer: Tokenizer,
    items: Sequence[ItemSpec],
    config: DataConfig,
    found: Mapping[str, Sequence[Item]],
) -> Encoded:
    """The sample's positions, with as many for each item as `found` says.

    Raises TooLong if it does not fit and may not, or cannot, be truncated.
    """
    tokens, answer, starts = spell(sample.turns, tokenizer, items, config.template, found)
    count = min(len(tokens) - 1, config.seq_len)  # the last token is a target only
    if len(tokens) - 1 > config.seq_len:
        _check_cut(len(tokens) - 1, answer, starts, found, config)
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


def ask(
    sample: Sample,
    tokenizer: Tokenizer,
    items: Sequence[ItemSpec],
    config: DataConfig,
    found: Mapping[str, Sequence[Item]],
) -> Encoded:
    """The sample up to its last answer, with weight at the position behind which the answer starts.

    Raises TooLong if nothing fits behind it.
    """
    tokens, _, starts = spell(sample.turns[:-1], tokenizer, items, config.template, found)
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
    found: Mapping[str, Sequence[Item]],
    config: DataConfig,
) -> None:
    needs = f"it needs {count} positions, but seq_len={config.seq_len}"
    if config.on_long == "skip":
        raise TooLong(f"{needs} and on_long='skip'")
    ends = (s + item.rows for name in starts for s, item in zip(starts[name], found[name], strict=True))
    if any(end > config.seq_len for end in ends):
        raise TooLong(f"{needs}, and truncation would cut a picture or clip")
    if not any(answer[1 : config.seq_len + 1]):
        raise TooLong(f"{needs}, and truncation would leave no answer")


def _texts(turns: Sequence[str], template: Template) -> Iterator[tuple[bool, str]]:
    """(trained on, text), in order. Prompts and answers are tokenised apart, as in generation."""
    for number, turn in enumerate(turns):
        if number % 2:
            yield from ((True, turn), (True, template.end_token))
        else:
            opening = template.answer_suffix if number else template.start
            yield False, opening + template.human_prefix + turn + template.human_suffix
