"""What an encoder asks of the data: which files it sees or hears, how they are read, and how many there is room for."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from hetjax.data.problems import SampleError
from hetjax.data.settings import DataConfig, Template

Abstract = tuple[tuple[int, ...], np.dtype]  # shape and dtype of an array
Values = Mapping[str, np.ndarray]


class Header(NamedTuple):
    """What a file's header tells before anything is decoded."""

    rows: int = 0  # positions of the sequence that it takes; 0: all that its encoder gives
    cut: str = ""  # what is left out of it, in words; "": nothing


class Item(NamedTuple):
    """One picture or clip as its encoder gets it."""

    values: Values  # those of its slot in the microbatch, by the arrays of its reader
    rows: int  # positions of the sequence that it takes


class Reader(Protocol):
    """Reads files of one kind. Frozen: two readers are equal if they read alike."""

    noun: ClassVar[str]  # of one of them, in messages
    rate: ClassVar[str]  # name of the metric that counts them

    @property
    def arrays(self) -> Mapping[str, Abstract]:
        """Array of the microbatch, without the encoder's name -> what a slot holds of it."""
        ...

    @property
    def blank(self) -> Mapping[str, float]:
        """Array -> the value that stands for nothing to see or hear; the arrays that are left out say no more."""
        ...

    def look(self, path: Path) -> Header:
        """What the file's header tells, which decides where its sample stands. Raises SampleError."""
        ...

    def read(self, path: Path) -> Values:
        """The values of one file, of as many rows as its header promises. Raises SampleError."""
        ...

    def to_rgb(self, values: Values) -> np.ndarray:
        """uint8 [height, width, 3]: what the encoder gets, to look at."""
        ...


@dataclasses.dataclass(frozen=True)
class ItemSpec:
    """The items of one encoder."""

    name: str  # of the encoder; its arrays are f"{name}.index" and f"{name}.{array}" for those of the reader
    rows: int  # rows of the encoder's output that one item has at most
    reader: Reader
    slots_per_group: int = 1  # items that a group has room for
    field: str = "image"  # key of the JSON that names the files
    placeholder: str = "<image>"  # stands for one item in a question
    places: int = 0  # positions of the sequence that one item takes; 0: as many as it has rows

    def __post_init__(self) -> None:
        for name in ("rows", "slots_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)}; it must be at least 1")
        for name in ("field", "placeholder"):
            if not getattr(self, name):
                raise ValueError(f"{self.name}: {name} is empty; give it a name, such as 'image' or '<image>'")

    def look(self, path: Path) -> Header:
        """What the header of a file tells. Raises SampleError with the path and the reason."""
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would never end; `Path` raises for long names
            why = f"cannot be read as a {self.reader.noun}: it is a directory or a device"
            raise SampleError(str(path), why)
        found = self.reader.look(path)
        return found._replace(rows=self.places or found.rows or self.rows)

    def read(self, path: Path) -> Item:
        """The item in a file. Raises SampleError with the path and the reason."""
        rows = self.look(path).rows
        return Item(self.reader.read(path), rows)


def count(microbatch: Mapping[str, np.ndarray], item: ItemSpec) -> int:
    """Slots that hold an item: each has its first row at one position."""
    index = microbatch[f"{item.name}.index"]
    return int(((index >= 0) & (index % item.rows == 0)).sum())


def blank(microbatch: Mapping[str, np.ndarray], items: Sequence[ItemSpec]) -> dict[str, np.ndarray]:
    """The microbatch with nothing to see or hear in any item: what is left is what the text says."""
    nothing = {f"{item.name}.{array}": value for item in items for array, value in item.reader.blank.items()}
    return {k: np.full_like(v, nothing[k]) if k in nothing else v for k, v in microbatch.items()}


def check_items(config: DataConfig, items: Sequence[ItemSpec]) -> None:
    """Raises ValueError unless the items can be told apart and one fits into a row."""
    for what in ("name", "field", "placeholder"):
        values = [getattr(item, what) for item in items]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{what} {value!r} is used by {values.count(value)} encoders; give each its own")
    for item in items:
        for other in items:
            if item is not other and item.placeholder in other.placeholder:
                raise ValueError(
                    f"{item.name}: placeholder {item.placeholder!r} is part of {other.name}'s {other.placeholder!r}; "
                    "choose texts that do not contain each other"
                )
        texts = dataclasses.asdict(config.template) if isinstance(config.template, Template) else {}
        for name, text in texts.items():
            if item.placeholder in text:
                raise ValueError(f"Template.{name}={text!r} contains {item.name}'s placeholder; leave it to questions")
        places = item.places or item.rows
        if places + 2 > config.seq_len:
            raise ValueError(
                f"DataConfig.seq_len={config.seq_len} is too short: one {item.reader.noun} of {item.name} takes up to "
                f"{places} positions, with a question and an answer at least {places + 2}; raise seq_len, or let "
                f"the encoder give fewer rows"
            )
