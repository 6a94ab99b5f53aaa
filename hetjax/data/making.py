"""A microbatch in the making: samples are placed by what is planned, and their files decoded meanwhile."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from hetjax.data.items import Values
from hetjax.data.microbatch import Filling, Placed, Planned
from hetjax.data.problems import SampleError


class Making:
    """A filling whose files the threads of `pool` decode."""

    def __init__(self, filling: Filling, pool: ThreadPoolExecutor) -> None:
        self.filling, self._pool = filling, pool
        self._reading: list[tuple[Placed, list[Future[Values]]]] = []

    def place(self, sample: Planned) -> bool:
        """Whether there was room; then its files are on their way."""
        placed = self.filling.place(sample)
        if placed is None:
            return False
        reads = [self._pool.submit(slot.item.reader.read, slot.file.path) for slot in placed.slots]
        self._reading.append((placed, reads))
        return True

    def settle(self) -> Iterator[tuple[int, SampleError]]:
        """Waits for the files, and masks the samples with one that is broken: (ordinal, why)."""
        for placed, reads in self._reading:
            try:
                values = [read.result() for read in reads]
            except SampleError as error:
                self.filling.mask(placed)
                yield placed.ordinal, error
                continue
            for slot, value in zip(placed.slots, values, strict=True):
                self.filling.put(slot, value)
