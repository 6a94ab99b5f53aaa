"""What a model scores on held-out conversations: with their pictures and clips, with blank ones, and text alone."""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetjax.core.trainer import State, Trainer
from hetjax.data import Loader, Sample, blank
from hetjax.data.settings import DataError

Arrays = Mapping[str, np.ndarray]
UNREAD = ("truncation", "padding", "post_processor", "decoder")  # what a tokenizer.json tells, and no prompt is made of


class Score(NamedTuple):
    """Over all target tokens and all samples that have any."""

    loss: float  # mean over target tokens
    accuracy: float  # of samples: every target token was the most likely one, so greedy decoding gives the answer
    token_accuracy: float  # of target tokens that were the most likely ones, given those before them
    samples: frozenset[int]  # their ordinals


def score(trainer: Trainer, state: State, batches: Iterable[tuple[Arrays, np.ndarray]]) -> Score:
    """The score over (microbatch, owner) pairs; `owner` [batch, seq] is each target's sample, -1 elsewhere."""
    loss = tokens = 0.0
    targets: collections.Counter[int] = collections.Counter()
    hits: collections.Counter[int] = collections.Counter()
    for microbatch, owner in batches:
        total, likeliest = trainer.evaluate(state, microbatch)
        loss += total
        tokens += float(microbatch["weights"].sum(dtype=np.float64))
        scored = owner >= 0
        targets.update(owner[scored].tolist())
        hits.update(owner[scored & (likeliest == microbatch["targets"])].tolist())
    right = sum(hits[sample] == count for sample, count in targets.items())
    token_accuracy = hits.total() / max(targets.total(), 1)
    return Score(loss / max(tokens, 1.0), right / max(len(targets), 1), token_accuracy, frozenset(targets))


def check(train: Loader, held_out: Loader) -> None:
    """Reads a held-out microbatch. Raises DataError if there is none, or if it has other ids than the training."""
    if _reading(held_out) != _reading(train):
        theirs, ours = held_out.config.tokenizer_path, train.config.tokenizer_path
        raise DataError(
            f"{theirs} reads text otherwise than {ours}, which the run trains with; set Experiment.held_out's "
            f"DataConfig.tokenizer={str(ours)!r}"
        )
    held_out.read_first(endless=False)


def _reading(loader: Loader) -> dict[str, Any]:
    return {name: value for name, value in json.loads(loader.tokenizer.to_str()).items() if name not in UNREAD}


def values(
    trainer: Trainer, state: State, held_out: Loader, microbatches: int, stopped: Sequence[object] = ()
) -> dict[str, float]:
    """Loss and accuracies on the first `microbatches` of held-out data (0: all of them), by their names in metrics.

    It ends early, with values of no use, once `stopped` holds something."""
    return _named(score(trainer, state, _first(held_out, microbatches, stopped)))


def last_values(
    trainer: Trainer,
    state: State,
    train: Loader,
    held_out: Loader,
    microbatches: int,
    stopped: Sequence[object] = (),
) -> dict[str, float]:
    """Those of the last evaluation: with pictures and clips, with blank ones (all, and of one encoder where there are
    several), and what the questions alone give away."""
    found = score(trainer, state, _first(held_out, microbatches, stopped))
    named = _named(found)
    several = {f"_blank_{item.name}": (item,) for item in held_out.items} if len(held_out.items) > 1 else {}
    for what, items in {"_blank": held_out.items, **several}.items() if held_out.items else ():
        unseen = ((blank(arrays, items), owner) for arrays, owner in _first(held_out, microbatches, stopped))
        named |= _named(score(trainer, state, unseen), what)
    asked = [held_out.samples[ordinal] for ordinal in sorted(found.samples)]
    named["eval/accuracy_prior"] = prior_accuracy(train.samples.values(), asked)
    return named


def _first(held_out: Loader, microbatches: int, stopped: Sequence[object]) -> Iterator[tuple[Arrays, np.ndarray]]:
    batches = itertools.islice(held_out.one_pass(), microbatches or None)
    return itertools.takewhile(lambda _: not stopped, batches)


def _named(found: Score, what: str = "") -> dict[str, float]:
    return {f"eval/{name}{what}": getattr(found, name) for name in ("loss", "accuracy", "token_accuracy")}


def prior_accuracy(train: Iterable[Sample], held_out: Iterable[Sample]) -> float:
    """How often the commonest training answer to the same question, or to any, is right: what text alone can score."""
    by_question: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    overall: collections.Counter[str] = collections.Counter()
    for question, answer in map(_question_and_answer, train):
        by_question[question][answer] += 1
        overall[answer] += 1
    right = total = 0
    for question, answer in map(_question_and_answer, held_out):
        right += by_question.get(question, overall).most_common(1)[0][0] == answer
        total += 1
    return right / max(total, 1)


def _question_and_answer(sample: Sample) -> tuple[str, str]:
    return "\n".join(sample.turns[::2]), "\n".join(sample.turns[1::2])
