"""The order of a data set, and where a run stands in it.

One global order of samples, drawn from (seed, epoch) alone, is cut into global microbatches: layouts, threads and
prefetching have no say. `state()` is the position after the last step handed out, and resuming from it repeats the
following steps bit for bit.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hetjax.data import conversations, media, microbatch, tokens
from hetjax.data.ahead import Ahead, in_order, threads
from hetjax.data.conversations import Sample
from hetjax.data.items import Abstract, ItemSpec, check_items, count
from hetjax.data.making import Broken, Made, Making, Position
from hetjax.data.microbatch import Arrays, File, Planned, Prepare
from hetjax.data.problems import Problem, SampleError
from hetjax.data.settings import DataConfig, DataError
from hetjax.data.tally import Tally
from hetjax.data.together import ALONE, Here, agree
from hetjax.data.tokens import TooLong


class Loader:
    """Microbatches of a data set. Raises ValueError at once for what can be known before the first file is read.

    `tally` counts what is not trained on as it stands; `prepare` is called with each microbatch of the training, in the
    data thread. `here`: which media this process reads, one of several that all use their loaders alike.
    """

    def __init__(
        self, config: DataConfig, items: Sequence[ItemSpec] = (), prepare: Prepare = dict, here: Here = ALONE
    ) -> None:
        self.config, self.items, self._prepare, self._here = config, tuple(items), prepare, here
        self._entries, self._digest = conversations.read(config.path, self.items)
        check_items(config, self.items)  # behind the path, which may be wrong for all of them
        self.tokenizer = tokens.load_tokenizer(config, self.items)
        self._speller = tokens.Speller(self.tokenizer, self.items, config.template)
        if self._speller.split:
            self._entries = tuple(self._each_answer(self._entries))
        self.tally = Tally(config, len(self._entries))
        self._position = Position()
        self._ahead: Ahead[Made] | None = None
        self._waited = self.last_wait = 0.0  # seconds, in all before the threads that read now, and for the last step
        self.media_bytes: list[int] = []  # of the files read for what was handed out, by process
        self._used = dict.fromkeys(["tokens", *(item.name for item in self.items)], 0)
        self._handed_out = 0
        for ordinal, entry in enumerate(self._entries):
            if isinstance(entry, Problem):
                self.tally.reject(ordinal, entry)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bad(self) -> list[Problem]:
        """Malformed samples and those with a missing or broken file, each once."""
        return self.tally.bad

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

    @property
    def digest(self) -> str:
        """Of the conversations and the tokenizer."""
        return f"{self._digest} {hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()}"

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
            self._ahead = Ahead(self._prepared(), self.config.prefetch)
        before = self.seconds_waited
        step = self._take(self._ahead, num_microbatches)
        self.last_wait = self.seconds_waited - before
        self._position = step[-1].after
        for made in step:
            self._count(made.arrays)
        return [made.arrays for made in step]

    def read_first(self, *, endless: bool) -> Arrays:
        """The microbatch that `next_step` would begin with, or (`endless` False) `one_pass`, which still will.

        Raises DataError if there is none."""
        with contextlib.closing(self._make(self._position if endless else Position(), endless=endless)) as made:
            return self._take(made, 1)[0].arrays

    def one_pass(self) -> Iterator[tuple[Arrays, np.ndarray]]:
        """(microbatch, owner) over the whole file once, in its order; the last ones may have empty rows.

        owner is int32 [samples, seq_len]: the ordinal of the sample whose answer is trained on there, else -1. Leaves
        the position of `next_step` alone.
        """
        with contextlib.closing(Ahead(self._make(Position(), endless=False), self.config.prefetch)) as made:
            while step := self._take(made, 1):
                yield step[0].arrays, step[0].filling.owner

    def questions(self, count: int) -> Iterator[tuple[Arrays, np.ndarray]]:
        """(microbatch, owner) of the first `count` samples that are well-formed, one a row, each up to its last answer.

        owner is int32 [samples, seq_len]: the ordinal of the sample at the last position of its row, else -1.
        """
        with contextlib.closing(self._ask(count)) as made:
            while step := self._take(made, 1):
                yield step[0].arrays, step[0].filling.owner

    def _ask(self, count: int) -> Generator[Made, None, None]:
        ready = (self._plan(ordinal, tokens.ask) for ordinal in range(self.num_samples))
        waiting = list(itertools.islice((s for s in ready if isinstance(s, Planned)), count))
        config = dataclasses.replace(self.config, pack=False)
        with threads(self.config.workers) as pool:
            while waiting:
                making = Making(config, self.items, pool, self._here.slots)
                waiting = [s for s in waiting if not making.place(s)]
                yield making.finish()

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

    def _each_answer(self, entries: Sequence[Sample | Problem]) -> Iterator[Sample | Problem]:
        """The entries with a conversation for each answer, as templates need that write them otherwise later on."""
        ordinals = itertools.count()
        for entry in entries:
            if isinstance(entry, Problem):
                next(ordinals)
                yield entry
                continue
            for part in conversations.split(entry, self.items):
                yield dataclasses.replace(part, ordinal=next(ordinals))

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

    def _prepared(self) -> Generator[Made, None, None]:
        """The microbatches of the steps to come."""
        with contextlib.closing(self._make(self._position, endless=True)) as made:
            for each in made:
                yield each._replace(arrays=self._prepare(each.arrays))

    def _make(self, position: Position, *, endless: bool) -> Generator[Made, None, None]:
        """Microbatches from a position on. A sample that fits nowhere waits, and is the first to enter the next one."""
        held = [(o, position._replace(waiting=())) for o in position.waiting]
        inputs = itertools.chain(held, self._following(position, endless=endless))
        with (
            threads(self.config.workers) as pool,
            contextlib.closing(in_order(pool, self._plan_at, inputs, 2 * self.config.workers)) as results,
        ):
            waiting = [r for _, r in itertools.islice(results, len(held)) if isinstance(r, Planned)]
            good = self._good(results)
            while True:
                making = Making(self.config, self.items, pool, self._here.slots)
                waiting = [s for s in waiting if not making.place(s)]
                while not making.filling.full and len(waiting) < self.config.lookahead:
                    after, sample = next(good, (position, None))
                    if sample is None:
                        break
                    position = after
                    if not making.place(sample):
                        waiting.append(sample)
                if making.filling.empty:
                    return
                position = position._replace(waiting=tuple(s.ordinal for s in waiting))
                yield making.finish(position)

    def _good(
        self, results: Iterator[tuple[tuple[int, Position], Planned | Problem | TooLong]]
    ) -> Iterator[tuple[Position, Planned]]:
        """What can be placed, in order; the rest is counted. Raises DataError if nothing is left."""
        for (ordinal, after), result in results:
            if isinstance(result, Problem):
                self.tally.reject(ordinal, result)
            elif isinstance(result, TooLong):
                self.tally.cut(self.samples[ordinal], self.tally.too_long, f"it is skipped: {result}")
            else:
                if result.text.truncated:
                    self.tally.cut(self.samples[ordinal], self.tally.truncated, "it is truncated")
                if result.cut:
                    self.tally.cut(self.samples[ordinal], self.tally.cut_items, result.cut)
                yield after, result

    def _plan_at(self, place: tuple[int, Position]) -> Planned | Problem | TooLong:
        ordinal, _ = place
        return self._plan(ordinal)

    def _plan(self, ordinal: int, encode: Callable[..., tokens.Encoded] = tokens.encode) -> Planned | Problem | TooLong:
        """The sample, tokenised and with what its files' headers tell. Runs in the workers' threads."""
        sample = self._entries[ordinal]
        if isinstance(sample, Problem):
            return sample
        root = self.config.media_path
        try:
            paths = {item.name: [media.locate(root, name) for name in sample.files[item.name]] for item in self.items}
            headers = {item.name: [item.look(path) for path in paths[item.name]] for item in self.items}
            rows = {name: [header.rows for header in found] for name, found in headers.items()}
            text = encode(sample, self._speller, self.config, rows)
        except TooLong as error:
            return error
        except SampleError as error:
            return Problem(sample.id, error.path or self.config.path, error.reason)
        files = {name: [File(*pair) for pair in zip(paths[name], rows[name], strict=True)] for name in paths}
        cut = (header.cut for found in headers.values() for header in found if header.cut)
        return Planned(ordinal, text, files, next(cut, ""))

    def _take(self, source: Iterator[Made], count: int) -> list[Made]:
        """The next microbatches, fewer at the end. Samples with a file that a process found broken are named, and
        masked where they stand."""
        made, broken, sizes = agree(source, count, self._here, self.bad)
        self.media_bytes = [sum(both) for both in itertools.zip_longest(self.media_bytes, sizes, fillvalue=0)]
        return [self._masked(*each) for each in zip(made, broken, strict=True)]

    def _masked(self, made: Made, broken: Sequence[Broken]) -> Made:
        for file in broken:
            placed = made.placed[file.sample]
            made.filling.mask(placed)
            problem = Problem(self.samples[placed.ordinal].id, file.path, file.reason)
            self.tally.reject(placed.ordinal, problem, masked=True)
        if not broken or made.arrays is made.filling.arrays:
            return made
        return made._replace(arrays=self._prepare(made.filling.arrays))

    def _count(self, arrays: Arrays) -> None:
        self._handed_out += 1
        self._used["tokens"] += int((arrays["segment_ids"] > 0).sum())
        for item in self.items:
            self._used[item.name] += count(arrays, item)
