"""Sample answers during training: greedy decoding through the run's own programs, under whatever layouts it has.

A token more is the microbatch evaluated again with that token at its end. That is slower than a cache of keys and
values (hetjax/generate/), and needs neither another program nor another copy of the weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from hetjax import data
from hetjax.core.trainer import State, Trainer
from hetjax.data import Loader, media

Arrays = Mapping[str, np.ndarray]


class Sample(NamedTuple):
    """What the model says to a held-out question."""

    id: str
    question: str
    answer: str
    expected: str
    pictures: tuple[np.ndarray, ...]  # uint8 [height, width, 3]; of a clip what it looks like; if they were asked for


def take(trainer: Trainer, state: State, held_out: Loader, *, count: int, tokens: int, pictures: bool) -> list[Sample]:
    """The model's answers, of at most `tokens` tokens, to the first `count` questions of the held-out data, with their
    `pictures` if those are to be seen.

    Needs `trainer.compile(evaluate=True)`."""
    end = held_out.tokenizer.token_to_id(held_out.config.template.end_token)
    assert end is not None  # the loader looked for it
    found: dict[int, Sample] = {}
    for arrays, owner in held_out.questions(count):
        rows, places = np.nonzero(owner >= 0)
        for row, place, said in zip(rows, places, decode(trainer, state, arrays, owner, end, tokens), strict=True):
            sample = held_out.samples[int(owner[row, place])]
            answer = held_out.tokenizer.decode(said)
            seen = tuple(_pictures(sample, held_out)) if pictures else ()
            found[sample.ordinal] = Sample(sample.id, sample.turns[-2], answer, sample.turns[-1], seen)
    return [found[ordinal] for ordinal in sorted(found)]


def decode(
    trainer: Trainer, state: State, arrays: Arrays, owner: np.ndarray, end: int, tokens: int
) -> Iterable[list[int]]:
    """The tokens behind each position with an owner, one a row, without the `end`; they stop where the row does."""
    arrays = {name: array.copy() if array.shape == owner.shape else array for name, array in arrays.items()}
    rows, places = np.nonzero(owner >= 0)
    said: list[list[int]] = [[] for _ in rows]
    going = np.ones(len(rows), bool)
    for _ in range(tokens):
        _, likeliest = trainer.evaluate(state, arrays)
        new = likeliest[rows, places]
        going &= new != end
        for number in np.flatnonzero(going):
            said[number].append(int(new[number]))
        going &= places + 1 < owner.shape[1]
        if not going.any():
            break
        places = places + going  # what has ended stays inside of its row
        at = rows[going], places[going]
        arrays["tokens"][at] = new[going]
        arrays["positions"][at] = places[going]  # a row holds one sample
        arrays["segment_ids"][at] = 1
    return said


def _pictures(sample: data.Sample, held_out: Loader) -> Iterator[np.ndarray]:
    """Read anew: those of the microbatch may be another process's."""
    for item in held_out.items:
        for name in sample.files[item.name]:
            yield item.reader.to_rgb(item.reader.read(media.locate(held_out.config.media_path, name)))
