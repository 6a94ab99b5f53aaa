"""A microbatch in the making: samples are placed by what is planned, and their files decoded meanwhile."""

import contextlib
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from hetjax.data.items import ItemSpec, Values
from hetjax.data.microbatch import Arrays, Filling, Placed, Planned, Slot
from hetjax.data.problems import SampleError
from hetjax.data.settings import DataConfig

Slots = Mapping[str, Collection[int]]  # item name -> numbers of its slots in a microbatch


class Broken(NamedTuple):
    """A file that was to be decoded, and cannot be: the number of its sample in the microbatch, and its own there."""

    sample: int
    file: int
    path: str
    reason: str


class Position(NamedTuple):
    """The first `place` samples of an epoch are read and used, but for the ordinals in `waiting`."""

    epoch: int = 0
    place: int = 0
    waiting: tuple[int, ...] = ()


class Made(NamedTuple):
    """A microbatch with the files that this process reads; those that are broken are not masked yet."""

    filling: Filling
    arrays: Arrays  # the filling's, or what was prepared of them
    after: Position
    placed: Sequence[Placed]  # its samples
    broken: Sequence[Broken]
    size: int  # bytes of the files that were read

    @property
    def plan(self) -> int:
        """A number that tells which samples stand where."""
        places = [
            (p.ordinal, p.row, p.places.start, p.places.stop, [(s.number, s.file.rows) for s in p.slots])
            for p in self.placed
        ]
        return zlib.crc32(repr(places).encode())


class Making:
    """A filling whose files the threads of `pool` decode: those of `slots`, or of all where that is None."""

    def __init__(
        self, config: DataConfig, items: Sequence[ItemSpec], pool: ThreadPoolExecutor, slots: Slots | None = None
    ) -> None:
        self.filling, self._pool, self._slots = Filling(config, items), pool, slots
        self._reading: list[tuple[Placed, list[Future[Values] | None]]] = []

    def place(self, sample: Planned) -> bool:
        """Whether there was room; then its files are on their way."""
        placed = self.filling.place(sample)
        if placed is None:
            return False
        reads = [self._pool.submit(s.item.reader.read, s.file.path) if self._is_read(s) else None for s in placed.slots]
        self._reading.append((placed, reads))
        return True

    def finish(self, after: Position = Position()) -> Made:  # noqa: B008
        """The microbatch, once its files are read; `after` is the position behind it."""
        broken, size = [], 0
        for number, (placed, reads) in enumerate(self._reading):
            for file, (slot, read) in enumerate(zip(placed.slots, reads, strict=True)):
                if read is None:
                    continue
                with contextlib.suppress(OSError):
                    size += os.path.getsize(slot.file.path)
                try:
                    self.filling.put(slot, read.result())
                except SampleError as error:
                    broken.append(Broken(number, file, error.path, error.reason))
        return Made(self.filling, self.filling.arrays, after, [placed for placed, _ in self._reading], broken, size)

    def _is_read(self, slot: Slot) -> bool:
        return self._slots is None or slot.number in self._slots[slot.item.name]
