"""Reads LLaVA JSON: a file becomes samples, and entries that are no sample become problems with a name and a reason.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "a circle"}]}

`image` may be missing, one name, or a list: as many as there are placeholders in the questions, in their order. So may
`audio`, for <audio>, and whatever other field an encoder has.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hetjax.data.items import ItemSpec
from hetjax.data.settings import DataError

ROLES = ("human", "gpt")


class Problem(NamedTuple):
    """A sample that is left out. `path` is the picture or clip at fault, else the file that holds the sample."""

    sample: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample!r} ({self.path}): {self.reason}"


class SampleError(Exception):
    """Why one sample cannot be used; `path` as in `Problem`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `ordinal` is its place in the file."""

    ordinal: int
    id: str
    turns: tuple[str, ...]  # question, answer, question, answer, ...
    files: Mapping[str, tuple[str, ...]]  # item name -> file names, in the order of the placeholders


class Conversations(NamedTuple):
    """A file's entries, in its order. `digest` tells whether two files are the same."""

    entries: tuple[Sample | Problem, ...]
    digest: str


def read(path: str, items: Sequence[ItemSpec]) -> Conversations:
    """Every entry of the file. Raises DataError if it cannot be read, is empty, or if a sample can never fit."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"DataConfig.path={path!r}: {error.strerror}; name a file of conversations") from error
    raw = list(_lines(content, path) if path.endswith(".jsonl") else _list(content, path))
    if not raw:
        raise DataError(f"{path} holds no conversation; a run needs at least one")
    entries = tuple(_entry(value, ordinal, items, path) for ordinal, value in enumerate(raw))
    for entry in entries:
        if isinstance(entry, Sample):
            _check_slots(entry, items, path)
    return Conversations(entries, hashlib.sha256(content).hexdigest()[:16])


def _list(content: bytes, path: str) -> list[Any]:
    value = _parse(content, path)
    if not isinstance(value, list):
        raise DataError(
            f"{path} holds {_kind(value)}, but a .json file must hold a list of conversations; "
            "for one conversation a line use .jsonl"
        )
    return value


def _lines(content: bytes, path: str) -> Iterator[Any]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _parse(line, f"{path}:{number}")


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}; save it as UTF-8") from error


def _entry(value: Any, ordinal: int, items: Sequence[ItemSpec], path: str) -> Sample | Problem:
    name = str(value.get("id", ordinal)) if isinstance(value, dict) else str(ordinal)
    try:
        turns = read_turns(value)
        if len(turns) % 2:
            raise SampleError("", "the conversation ends on human, so its last question has no answer")
        files = {item.name: _files(value, item, turns) for item in items}
    except SampleError as error:
        return Problem(name, path, error.reason)
    return Sample(ordinal, name, turns, files)


def read_turns(value: Any) -> tuple[str, ...]:
    """The texts of an entry: question, answer, question, ... Raises SampleError."""
    if not isinstance(value, dict):
        raise SampleError("", f"it is {_kind(value)}, but must be an object with conversations")
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SampleError("", "it has no conversations; they must be a list of turns")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleError("", f'turn {number} must be {{"from": ..., "value": text}}, not {turn!r}')
        if turn.get("from") not in ROLES:
            raise SampleError("", f"turn {number} is from {turn.get('from')!r}; it must be one of {', '.join(ROLES)}")
        if turn["from"] != ROLES[number % 2]:
            raise SampleError("", f"turn {number} is from {turn['from']}; human and gpt take turns, human begins")
    return tuple(turn["value"] for turn in turns)


def read_files(value: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The file names of an entry. Raises SampleError."""
    files = value.get(field)
    files = [] if files is None else [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(f, str) and f for f in files):
        raise SampleError("", f"{field}={files!r}; it must be a file name or a list of them")
    return tuple(files)


def _files(value: dict[str, Any], item: ItemSpec, turns: tuple[str, ...]) -> tuple[str, ...]:
    files = read_files(value, item.field)
    if any(item.placeholder in answer for answer in turns[1::2]):
        raise SampleError("", f"an answer contains {item.placeholder}; it may stand in questions only")
    count = sum(question.count(item.placeholder) for question in turns[::2])
    if count != len(files):
        raise SampleError("", f"its questions have {count} {item.placeholder}, {item.field} names {len(files)} files")
    return files


def _check_slots(sample: Sample, items: Sequence[ItemSpec], path: str) -> None:
    for item in items:
        count = len(sample.files[item.name])
        if count > item.slots_per_group:
            raise DataError(
                f"sample {sample.id!r} ({path}) has {count} {item.reader.noun}s for {item.name}, but slots_per_group="
                f"{item.slots_per_group}: no group can hold it; raise slots_per_group to {count} or take the sample out"
            )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")
