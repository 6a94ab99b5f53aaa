"""What the model is asked: a conversation that ends on a question, with pictures and clips by field."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetjax.data import ItemSpec, media, source
from hetjax.data.conversations import read_talk
from hetjax.data.items import Item
from hetjax.data.paths import expanded
from hetjax.data.problems import SampleError, name_of


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`turns`: question, answer, question, ..., question. `files`: field ("image", "audio") -> paths.

    Files belong to the placeholders of the questions, in their order; those without one come before the first question.
    """

    turns: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    id: str = ""
    system: str | None = None  # the system turn, before the first question

    def __post_init__(self) -> None:
        if len(self.turns) % 2 == 0:
            raise ValueError(f"prompt {self.id!r} has {len(self.turns)} turns; it must end on a question")


def ask(question: str, **files: str | Sequence[str]) -> Prompt:
    """The prompt of one question: ask("What is it?", image="a.png")."""
    return Prompt((question,), {field: tuple(map(expanded, _names(names))) for field, names in files.items()})


def read_prompts(path: str | Path, items: Sequence[ItemSpec], media_root: str | None = None) -> list[Prompt]:
    """The prompts of a file, conversations in the spellings of the training data; an answer at its end is left out.

    File names are relative to `media_root`, or to the file. Raises ValueError for the first that is none, or names a
    file for no `items`.
    """
    path = expanded(path)
    found, root = (
        source.read(path, "--prompts"),
        Path(path).parent if media_root is None else Path(expanded(media_root)),
    )
    numbered = zip(found.lines, found.entries, strict=True)
    return [_prompt(value, f"{path}:{n}", n, items, root) for n, value in numbered]


def _prompt(value: Any, where: str, number: int, items: Sequence[ItemSpec], root: Path) -> Prompt:
    try:
        system, turns, files = read_talk(value, items)
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    located = {i.field: tuple(str(media.locate(root, name)) for name in files[i.name]) for i in items}
    return Prompt(turns[: len(turns) - 1 + len(turns) % 2], located, name_of(value, number), system)


def _names(names: Any) -> tuple[str, ...]:
    names = (names,) if isinstance(names, (str, Path)) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, (str, Path)) for name in names):
        raise ValueError(f"a prompt: files={names!r}; they must be a file name or a list of them")
    return tuple(str(name) for name in names)


def read_items(prompt: Prompt, items: Sequence[ItemSpec]) -> dict[str, list[Item]]:
    """Item name -> what the prompt's files hold. Raises ValueError for a file that no encoder takes, or is broken."""
    by_field = {item.field: item for item in items}
    for field, names in prompt.files.items():
        if names and field not in by_field:
            takes = f"it takes {', '.join(by_field)}" if by_field else "it takes text alone"
            raise ValueError(f"{field} {names[0]}: the model has no encoder for {field}; {takes}")
    try:
        return {i.name: [i.read(Path(name)) for name in prompt.files.get(i.field, ())] for i in items}
    except SampleError as error:
        raise ValueError(f"{error.path}: {error}; check the path and the file") from error


def placed(prompt: Prompt, items: Sequence[ItemSpec]) -> tuple[str, ...]:
    """The turns, with each missing placeholder on a line of its own before the first question. Raises SampleError."""
    return media.placed(prompt.turns, items, {item.name: prompt.files.get(item.field, ()) for item in items})
