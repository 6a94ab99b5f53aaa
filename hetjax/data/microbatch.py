"""A global microbatch of fixed shape, and the first fit of samples into it.

Its rows and the slots of its items (pictures, clips) are cut into equal groups; an item's slot lies in its sample's
group:

    groups=2, samples_per_group=2, slots_per_group=3
    rows   0 1 | 2 3        index[row, position] = slot * rows + row of the item, or -1
    slots  0 1 2 | 3 4 5    so a group never needs what another holds; used[slot] = 1 where an item is

What stands where is decided before any picture or clip is decoded, by texts and headers. A sample with one that then
turns out to be broken is masked where it stands: so whoever reads none but its own pictures makes the same microbatch,
once it is told of the broken ones of others (together.py).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetjax.data.items import Abstract, ItemSpec, Values
from hetjax.data.settings import DataConfig
from hetjax.data.tokens import Encoded

Arrays = dict[str, np.ndarray]
Prepare = Callable[[Arrays], Arrays]  # what becomes of a microbatch in the thread that makes it


class File(NamedTuple):
    """A picture or clip of which the header was read."""

    path: Path
    rows: int  # positions of the sequence that it takes


class Planned(NamedTuple):
    """A sample that is ready to be placed: its text and its files' headers are read."""

    ordinal: int
    text: Encoded
    files: Mapping[str, Sequence[File]]  # item name -> its files, in the order of their placeholders
    cut: str = ""  # what is left out of its files, in words


class Slot(NamedTuple):
    """Where the values of a file go."""

    item: ItemSpec
    file: File
    number: int  # of the item's slots in the microbatch
    places: slice  # positions of its row


class Placed(NamedTuple):
    """Where a sample stands."""

    ordinal: int
    row: int
    places: slice
    slots: tuple[Slot, ...]


def abstract(config: DataConfig, items: Sequence[ItemSpec]) -> dict[str, Abstract]:
    """Shape and dtype of every array of a microbatch."""
    text = config.samples, config.seq_len
    names = "tokens", "positions", "segment_ids", "targets"
    shapes: dict[str, Abstract] = {name: (text, np.dtype(np.int32)) for name in names}
    shapes["weights"] = text, np.dtype(np.float32)
    for item in items:
        shapes[f"{item.name}.index"] = text, np.dtype(np.int32)
        slots = config.groups * item.slots_per_group
        shapes[f"{item.name}.used"] = (slots,), np.dtype(np.int32)
        for array, (shape, dtype) in item.reader.arrays.items():
            shapes[f"{item.name}.{array}"] = (slots, *shape), dtype
    return shapes


class Filling:
    """One microbatch that is being filled. Rows that get nothing keep segment 0 and weight 0."""

    def __init__(self, config: DataConfig, items: Sequence[ItemSpec]) -> None:
        self._config, self._items = config, items
        self.arrays: Arrays = {k: np.zeros(shape, dtype) for k, (shape, dtype) in abstract(config, items).items()}
        for item in items:
            self.arrays[f"{item.name}.index"][:] = -1
        self.owner = np.full((config.samples, config.seq_len), -1, np.int32)  # ordinal where a target is trained on
        self._used = [0] * config.samples  # positions of each row
        self._segments = [0] * config.samples
        self._slots = {item.name: [0] * config.groups for item in items}  # taken in each group

    @property
    def empty(self) -> bool:
        """Whether nothing was placed."""
        return not any(self._used)

    @property
    def full(self) -> bool:
        """Whether no further sample can fit."""
        return all(used >= self._config.seq_len if self._config.pack else used for used in self._used)

    def place(self, sample: Planned) -> Placed | None:
        """Where the first row with room, in a group with slots, took the sample. Its slots are empty yet."""
        for row in range(self._config.samples):
            if self._fits(sample, row):
                return self._put(sample, row)
        return None

    def put(self, slot: Slot, values: Values) -> None:
        """Fills a slot."""
        for array, value in values.items():
            self.arrays[f"{slot.item.name}.{array}"][slot.number] = value

    def mask(self, placed: Placed) -> None:
        """Nothing is trained on in a sample, nor do its slots show anything; every other one stays where it is."""
        self.arrays["weights"][placed.row, placed.places] = 0
        self.owner[placed.row, placed.places] = -1
        for slot in placed.slots:
            self.arrays[f"{slot.item.name}.index"][placed.row, slot.places] = -1
            self.arrays[f"{slot.item.name}.used"][slot.number] = 0
            for array in slot.item.reader.arrays:
                self.arrays[f"{slot.item.name}.{array}"][slot.number] = 0

    def _fits(self, sample: Planned, row: int) -> bool:
        if self._used[row] and not self._config.pack:
            return False
        if self._used[row] + len(sample.text.tokens) > self._config.seq_len:
            return False
        group = row // self._config.samples_per_group
        return all(self._slots[i.name][group] + len(sample.files[i.name]) <= i.slots_per_group for i in self._items)

    def _put(self, sample: Planned, row: int) -> Placed:
        text, start = sample.text, self._used[row]
        place = slice(start, start + len(text.tokens))
        self._segments[row] += 1
        self._used[row] = place.stop
        self.arrays["tokens"][row, place] = text.tokens
        self.arrays["targets"][row, place] = text.targets
        self.arrays["weights"][row, place] = text.weights
        self.arrays["positions"][row, place] = np.arange(len(text.tokens))
        self.arrays["segment_ids"][row, place] = self._segments[row]
        self.owner[row, place] = np.where(text.weights > 0, sample.ordinal, -1)
        slots = tuple(
            self._slot(sample, row, start, item, n) for item in self._items for n in range(len(sample.files[item.name]))
        )
        return Placed(sample.ordinal, row, place, slots)

    def _slot(self, sample: Planned, row: int, start: int, item: ItemSpec, number: int) -> Slot:
        """The slot that a sample's file gets, whose rows stand in the index."""
        group, file = row // self._config.samples_per_group, sample.files[item.name][number]
        slot = group * item.slots_per_group + self._slots[item.name][group]
        self._slots[item.name][group] += 1
        first = start + sample.text.starts[item.name][number]
        places = slice(first, first + file.rows)
        self.arrays[f"{item.name}.index"][row, places] = slot * item.rows + np.arange(file.rows)
        self.arrays[f"{item.name}.used"][slot] = 1
        return Slot(item, file, slot, places)
