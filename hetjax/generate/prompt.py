"""What the model is asked: a conversation that ends on a question, with pictures and clips by field."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetjax.data import ItemSpec
from hetjax.data.conversations import SampleError, read_files, read_turns
from hetjax.data.items import Item
from hetjax.data.paths import expanded


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`turns`: question, answer, question, ..., question. `files`: field ("image", "audio") -> paths.

    Files belong to the placeholders of the questions, in their order; those without one come before the first question.
    """

    turns: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if len(self.turns) % 2 == 0:
            raise ValueError(f"prompt {self.id!r} has {len(self.turns)} turns; it must end on a question")


def ask(question: str, **files: str | Sequence[str]) -> Prompt:
    """The prompt of one question: ask("What is it?", image="a.png")."""
    return Prompt((question,), {field: _names(names) for field, names in files.items()})


def read_prompts(path: str | Path, fields: Sequence[str]) -> list[Prompt]:
    """The prompts of a .jsonl file, one conversation of LLaVA's JSON a line; an answer at its end is left out.

    File names are relative to the file. Raises ValueError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside of texts
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts={path} cannot be read: {error}") from error
    found = [
        _prompt(line, f"{path}:{n}", str(n), fields, Path(path).parent)
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"--prompts={path} holds no conversation; write one a line")
    return found


def _prompt(line: str, where: str, number: str, fields: Sequence[str], root: Path) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    try:
        texts = read_turns(value)
        files = {field: tuple(str(root / name) for name in read_files(value, field)) for field in fields}
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    return Prompt(texts[: len(texts) - 1 + len(texts) % 2], files, str(value.get("id", number)))


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
        return {i.name: [i.read(Path(expanded(name))) for name in prompt.files.get(i.field, ())] for i in items}
    except SampleError as error:
        raise ValueError(f"{error.path}: {error}; check the path and the file") from error


def missing_placeholders(prompt: Prompt, items: Sequence[ItemSpec]) -> list[ItemSpec]:
    """The item of each file without a placeholder, in order.

    Raises ValueError if there are more placeholders, or some in an answer."""
    lacking = []
    for item in items:
        if any(item.placeholder in answer for answer in prompt.turns[1::2]):
            raise ValueError(f"an answer of the prompt has {item.placeholder}; it may stand in questions only")
        count = sum(turn.count(item.placeholder) for turn in prompt.turns[::2])
        files = prompt.files.get(item.field, ())
        if count > len(files):
            raise ValueError(
                f"the prompt has {count} {item.placeholder}, but {len(files)} {item.field} file(s); give one for each"
            )
        lacking += [item] * (len(files) - count)
    return lacking
