"""The order of a data set, and where a run stands in it.

One global order of samples, drawn from (seed, epoch) alone, is cut into global microbatches: layouts, threads and
prefetching have no say. `state()` is the position after the last step handed out, and resuming from it repeats the
following steps bit for bit.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetjax.data import conversations, microbatch, tokens
from hetjax.data.ahead import Ahead, in_order
from hetjax.data.conversations import Problem, Sample, SampleError
from hetjax.data.items import Abstract, ItemSpec, check_items, count
from hetjax.data.microbatch import Arrays, Filling, Prepared
from hetjax.data.settings import DataConfig, DataError
from hetjax.data.tokens import TooLong

LOG = logging.getLogger(__name__)


class Position(NamedTuple):
    """The first `place` samples of an epoch are read and used, but for the ordinals in `waiting`."""

    epoch: int = 0
    place: int = 0
    waiting: tuple[int, ...] = ()


class Made(NamedTuple):
    """A microbatch, the ordinal of the sample that each target belongs to, and the position after it."""

    arrays: Arrays
    owner: np.ndarray
    after: Position


class Loader:
    """Microbatches of a data set. Raises ValueError at once for what can be known before the first file is read.

    bad: malformed samples and those with a missing or broken file, each once.
    truncated, too_long: ordinals of samples that were cut, and of those skipped for their length.
    """

    def __init__(self, config: DataConfig, items: Sequence[ItemSpec] = ()) -> None:
        self.config, self.items = config, tuple(items)
        check_items(config, self.items)
        self._entries, self._digest = conversations.read(config.path, self.items)
        self.tokenizer = tokens.load_tokenizer(config, self.items)
        self.bad: list[Problem] = []
        self.truncated: set[int] = set()
        self.too_long: set[int] = set()
        self._named: set[int] = set()  # ordinals in `bad`
        self._naming = threading.Lock()  # a pass for evaluation may run beside the thread that works ahead
        self._position = Position()
        self._ahead: Ahead[Made] | None = None
        self._waited = 0.0
        self._used = dict.fromkeys(["tokens", *(item.name for item in self.items)], 0)
        self._handed_out = 0
        for ordinal, entry in enumerate(self._entries):
            if isinstance(entry, Problem):
                self._reject(ordinal, entry)
        if len(self.bad) == len(self._entries):
            raise self._nothing_left()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_samples(self) -> int:
        """Samples in the file, bad ones included."""
        return len(self._entries)

    @property
    def vocab_size(self) -> int:
        """The least vocabulary that the language model needs."""
        return tokens.vocab_size(self.tokenizer, self.items)

    @property
    def seconds_waited(self) -> float:
        """Time that `next_step` has spent waiting for data."""
        return self._waited + (self._ahead.seconds_waited if self._ahead else 0.0)

    def abstract(self) -> dict[str, Abstract]:
        """Shape and dtype of every array of a microbatch; loads nothing."""
        return microbatch.abstract(self.config, self.items)

    @functools.cached_property
    def samples(self) -> dict[int, Sample]:
        """The well-formed samples by their ordinal, the number that `one_pass` calls them by."""
        return {ordinal: entry for ordinal, entry in enumerate(self._entries) if isinstance(entry, Sample)}

    def next_step(self, num_microbatches: int) -> list[Arrays]:
        """The global microbatches of the next step."""
        if num_microbatches < 1:
            raise ValueError(f"num_microbatches={num_microbatches}; a step needs at least 1")
        if self._ahead is None:
            self._ahead = Ahead(self._make(self._position, endless=True), self.config.prefetch)
        step = list(itertools.islice(self._ahead, num_microbatches))
        self._position = step[-1].after
        for made in step:
            self._count(made.arrays)
        return [made.arrays for made in step]

    def read_first(self, *, endless: bool) -> None:
        """Reads the microbatch that `next_step` would begin with, or (`endless` False) `one_pass`, and forgets it.

        Raises DataError if there is none."""
        with contextlib.closing(self._make(self._position if endless else Position(), endless=endless)) as made:
            next(made)

    def one_pass(self) -> Iterator[tuple[Arrays, np.ndarray]]:
        """(microbatch, owner) over the whole file once, in its order; the last ones may have empty rows.

        owner is int32 [samples, seq_len]: the ordinal of the sample whose answer is trained on there, else -1. Leaves
        the position of `next_step` alone.
        """
        with contextlib.closing(Ahead(self._make(Position(), endless=False), self.config.prefetch)) as made:
            for arrays, owner, _ in made:
                yield arrays, owner

    def questions(self, count: int) -> Iterator[tuple[Arrays, np.ndarray]]:
        """(microbatch, owner) of the first `count` samples that can be read, one a row, each up to its last answer.

        owner is int32 [samples, seq_len]: the ordinal of the sample at the last position of its row, else -1.
        """
        ready = (self._prepare(ordinal, tokens.ask) for ordinal in range(self.num_samples))
        waiting = list(itertools.islice((s for s in ready if isinstance(s, Prepared)), count))
        config = dataclasses.replace(self.config, pack=False)
        while waiting:
            filling = Filling(config, self.items)
            waiting = [s for s in waiting if not filling.place(s)]
            yield filling.arrays, filling.owner

    def fill(self) -> dict[str, float]:
        """How much of what was handed out by `next_step` is not padding: of the positions, and of each item's slots."""
        room = {"tokens": self.config.samples * self.config.seq_len}
        room |= {item.name: self.config.groups * item.slots_per_group for item in self.items}
        return {name: self._used[name] / max(1, room[name] * self._handed_out) for name in room}

    def state(self) -> dict[str, Any]:
        """The position after the last step handed out, for JSON."""
        epoch, place, waiting = self._position
        return dict(epoch=epoch, place=place, waiting=list(waiting), **self._order_settings())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues behind the step after which `state` was taken. Raises DataError if the order would be another."""
        for name, value in self._order_settings().items():
            if name not in state or state[name] != value:
                raise DataError(
                    f"{self.config.path}: the saved data position has {name}={state.get(name)!r}, this run {value!r}: "
                    "it would continue in another order; resume with the same file, seed and shuffle, or start afresh"
                )
        self.close()
        self._position = Position(state["epoch"], state["place"], tuple(state["waiting"]))

    def close(self) -> None:
        """Ends the threads. `next_step` may be called again, and continues where it was."""
        if self._ahead:
            self._ahead.close()
            self._waited += self._ahead.seconds_waited
            self._ahead = None

    def _order_settings(self) -> dict[str, Any]:
        return dict(file=self._digest, seed=self.config.seed, shuffle=self.config.shuffle)

    def _order(self, epoch: int) -> np.ndarray:
        """The ordinals in an epoch's order. Sorts raw bits, which every NumPy draws alike, unlike `permutation`."""
        return np.argsort(np.random.Philox(key=[self.config.seed, epoch]).random_raw(self.num_samples), kind="stable")

    def _following(self, position: Position, *, endless: bool) -> Iterator[tuple[int, Position]]:
        """(ordinal, position after it) from a position on; `endless` shuffles as configured, else the file's order."""
        epoch, start, _ = position
        while True:
            order = self._order(epoch) if endless and self.config.shuffle else np.arange(self.num_samples)
            for place in range(start, self.num_samples):
                yield int(order[place]), Position(epoch, place + 1)
            if not endless:
                return
            epoch, start = epoch + 1, 0

    def _make(self, position: Position, *, endless: bool) -> Generator[Made, None, None]:
        """Microbatches from a position on. A sample that fits nowhere waits, and is the first to enter the next one."""
        held = [(o, position._replace(waiting=())) for o in position.waiting]
        inputs = itertools.chain(held, self._following(position, endless=endless))
        reader = in_order(lambda pair: self._prepare(pair[0]), inputs, self.config.workers)
        with contextlib.closing(reader):
            results = iter(reader)
            waiting = [r for _, r in itertools.islice(results, len(held)) if isinstance(r, Prepared)]
            good = self._good(results)
            while True:
                filling = Filling(self.config, self.items)
                waiting = [s for s in waiting if not filling.place(s)]
                while not filling.full and len(waiting) < self.config.lookahead:
                    after, sample = next(good, (position, None))
                    if sample is None:
                        break
                    position = after
                    if not filling.place(sample):
                        waiting.append(sample)
                if filling.empty:
                    return
                position = position._replace(waiting=tuple(s.ordinal for s in waiting))
                yield Made(filling.arrays, filling.owner, position)

    def _good(
        self, results: Iterator[tuple[tuple[int, Position], Prepared | Problem | TooLong]]
    ) -> Iterator[tuple[Position, Prepared]]:
        """What can be placed, in order; the rest is counted. Raises DataError if a whole epoch is left out."""
        left_out = 0
        for (ordinal, after), result in results:
            left_out += 1
            if isinstance(result, Prepared):
                left_out = 0
                if result.text.truncated:
                    self._count_long(ordinal, self.truncated, "it is truncated")
                yield after, result
            elif isinstance(result, Problem):
                self._reject(ordinal, result)
            else:
                self._count_long(ordinal, self.too_long, f"it is skipped: {result}")
            if left_out == self.num_samples:
                raise self._nothing_left()

    def _prepare(
        self, ordinal: int, encode: Callable[..., tokens.Encoded] = tokens.encode
    ) -> Prepared | Problem | TooLong:
        """The sample, tokenised and with its items. Runs in the workers' threads."""
        sample = self._entries[ordinal]
        if isinstance(sample, Problem):
            return sample
        root = self.config.media_path
        try:
            items = {i.name: [i.read(root / f) for f in sample.files[i.name]] for i in self.items}
            text = encode(sample, self.tokenizer, self.items, self.config, items)
        except TooLong as error:
            return error
        except SampleError as error:
            return Problem(sample.id, error.path or self.config.path, error.reason)
        return Prepared(ordinal, text, items)

    def _reject(self, ordinal: int, problem: Problem) -> None:
        if self.config.on_bad_item == "stop":
            raise DataError(f"{problem}; repair it, or set DataConfig.on_bad_item='skip' to go on without it")
        with self._naming:
            if ordinal in self._named:
                return
            self._named.add(ordinal)
            self.bad.append(problem)
        LOG.warning("skipped %s", problem)

    def _count_long(self, ordinal: int, seen: set[int], what: str) -> None:
        if not seen:
            LOG.warning("sample %r: %s; further ones are only counted", self.samples[ordinal].id, what)
        seen.add(ordinal)

    def _nothing_left(self) -> DataError:
        reasons = "; ".join(str(p) for p in self.bad[:3])
        return DataError(
            f"{self.config.path}: every one of its {self.num_samples} samples is left out, {len(self.bad)} as bad and "
            f"{len(self.too_long)} as longer than seq_len={self.config.seq_len}. {reasons or 'Raise seq_len'}"
        )

    def _count(self, arrays: Arrays) -> None:
        self._handed_out += 1
        self._used["tokens"] += int((arrays["segment_ids"] > 0).sum())
        for item in self.items:
            self._used[item.name] += count(arrays, item)
