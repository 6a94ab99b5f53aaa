"""An entry of a data set becomes a sample, or a problem with a name and a reason.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "a circle"}]}

is LLaVA's spelling. The other common one has messages, role, content, user and assistant, and a question's content may
be a list of parts: [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}].
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hetjax.data import media, source, trained
from hetjax.data.items import ItemSpec
from hetjax.data.media import Files
from hetjax.data.naming import NOTHING, TURNS
from hetjax.data.problems import Problem, SampleError, name_of, shown
from hetjax.data.settings import DataError
from hetjax.data.source import Malformed, Repeated, kind

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
# what chat templates write of a message, or of an entry, beside texts and files
WRITTEN = ("reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "function_call")
WRITTEN_BESIDE = ("tools", "functions", "documents", "chat_template_kwargs")
ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT, "system": SYSTEM, "developer": SYSTEM}
ROLES |= dict.fromkeys(("model", "chatgpt", "bing", "bard"), GPT)
PAIRS = {"instruction": "output", "prompt": "completion", "question": "answer"}  # as other data sets have them


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `ordinal` is its place in the file."""

    ordinal: int
    id: str
    turns: tuple[str, ...]  # question, answer, question, answer, ...
    files: Mapping[str, tuple[str, ...]]  # item name -> file names, in the order of the placeholders
    system: str | None = None  # the system turn, before the first question


class Conversations(NamedTuple):
    """A file's entries, in its order. `digest` tells whether two files are the same."""

    entries: tuple[Sample | Problem, ...]
    digest: str


class Talk(NamedTuple):
    """What an entry says, and the files that it names; placeholders may be missing."""

    system: str | None
    turns: tuple[str, ...]  # question, answer, question, ...
    files: Files


class Turn(NamedTuple):
    """One turn, and the files that its parts name: (item name, file name)."""

    role: str
    text: str
    files: tuple[tuple[str, str], ...]


def read(path: str, items: Sequence[ItemSpec]) -> Conversations:
    """Every entry of the file. Raises DataError if it cannot be read, is empty, or if a sample can never fit."""
    found = source.read(path, "DataConfig.path")
    entries = tuple(_entry(value, ordinal, items, path) for ordinal, value in enumerate(found.entries))
    for entry in entries:
        if isinstance(entry, Sample):
            _check_slots(entry, items, path)
    return Conversations(entries, found.digest)


def split(sample: Sample, items: Sequence[ItemSpec]) -> Iterator[Sample]:
    """A conversation for each answer of a sample, up to it; ordinals are still the sample's."""
    for count in range(2, len(sample.turns) + 1, 2):
        turns = sample.turns[:count]
        shown = {item.name: sum(turn.count(item.placeholder) for turn in turns[::2]) for item in items}
        files = {name: files[: shown[name]] for name, files in sample.files.items()}
        yield dataclasses.replace(sample, turns=turns, files=files)


def _entry(value: Any, ordinal: int, items: Sequence[ItemSpec], path: str) -> Sample | Problem:
    name = name_of(value, ordinal)
    try:
        talk = read_talk(value, items)
        trained.check(value, [turn for turn in _turns(value) if _speaker(turn.get("from") or turn.get("role")) == GPT])
        if len(talk.turns) % 2:
            raise SampleError("", "the conversation ends on human, so its last question has no answer")
        turns = media.placed(talk.turns, items, talk.files)
    except SampleError as error:
        return Problem(name, path, error.reason)
    return Sample(ordinal, name, turns, talk.files, talk.system)


def read_talk(value: Any, items: Sequence[ItemSpec]) -> Talk:
    """The texts and files of an entry, whose files are all for one of `items`. Raises SampleError.

    A gpt turn before the first question is left out, as LLaVA does: it answers nothing."""
    if isinstance(value, Malformed):
        raise SampleError("", value.reason)
    if not isinstance(value, dict):
        raise SampleError("", f"it is {kind(value)}, but must be an object with conversations")
    _check_keys(value, "it", WRITTEN_BESIDE)
    turns = [_turn(turn, f"turn {number}", items) for number, turn in enumerate(_turns(value))]
    system, first = _system(value, turns, items)
    files = _joined(media.of_entry(value, items), [file for turn in turns for file in turn.files], items)
    first += len(turns) > first and turns[first].role == GPT
    for number, turn in enumerate(turns[first:]):
        if turn.role == SYSTEM:
            raise SampleError("", f"turn {first + number} is a system turn; only the first one may be")
        if turn.role != (HUMAN, GPT)[number % 2]:
            raise SampleError("", f"turn {first + number} is from {turn.role}; human and gpt take turns, human begins")
        if turn.role == HUMAN:
            media.check_placeholders(turn.text, f"turn {first + number}", items)
    if first == len(turns):
        raise SampleError("", "it has no question; human and gpt take turns")
    return Talk(system, tuple(turn.text for turn in turns[first:]), files)


def _turns(value: Mapping[str, Any]) -> list[Any]:
    found = media.only(value, TURNS, "it", (None, []))
    if found is None and (asked := next((key for key in PAIRS if key in value), None)):
        turns = f'[{{"from": "human", "value": {asked}}}, {{"from": "gpt", "value": {PAIRS[asked]}}}]'
        raise SampleError("", f"it has no conversations; write them as {turns}")
    if not isinstance(found, list):
        raise SampleError("", "it has no conversations; they must be a list of turns")
    return found


def _speaker(role: Any) -> str | None:
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def _check_keys(value: Mapping[str, Any], where: str, lost: Sequence[str] = ()) -> None:
    if isinstance(value, Repeated):
        raise SampleError("", f"{where} has {shown(value.key)} twice; leave one out")
    for key in lost:
        if value.get(key) not in NOTHING:
            raise SampleError("", f"{where} has {key}={shown(value[key])}, which is not trained on; write it as text")


def _system(value: Mapping[str, Any], turns: Sequence[Turn], items: Sequence[ItemSpec]) -> tuple[str | None, int]:
    """(the system text, the turns that it takes)."""
    text, taken = media.only(value, ("system", "system_prompt"), "it", (None, "")), turns[0].role == SYSTEM
    if taken and text is not None:
        raise SampleError("", f"system={shown(text)} has a system turn beside it; leave one out")
    text = turns[0].text if taken else text
    if text is None:
        return None, 0
    if not isinstance(text, str):
        raise SampleError("", f"system={shown(text)} must be a text")
    media.check_text(text, "system")
    media.check_placeholders(text, "its system text", items, system=True)
    return text, int(taken)


def _turn(turn: Any, where: str, items: Sequence[ItemSpec]) -> Turn:
    wanted = '{"from": ..., "value": text} or {"role": ..., "content": text or parts}'
    if not isinstance(turn, dict):
        raise SampleError("", f"{where} must be {wanted}, not {shown(turn)}")
    _check_keys(turn, where, WRITTEN)
    role = media.only(turn, ("from", "role"), where)
    content = media.only(turn, ("value", "content"), where)
    if not isinstance(content, (str, list)):
        raise SampleError("", f"{where} must be {wanted}, not {shown(turn)}")
    speaker = _speaker(role)
    if speaker is None:
        raise SampleError("", f"{where} is from {shown(role)}; it must be one of {', '.join(ROLES)}")
    media.check_read(turn, where)
    parts = [content] if isinstance(content, str) else [_part(part, where, speaker, items) for part in content]
    text = "".join(part if isinstance(part, str) else part[0] for part in parts)
    media.check_text(text, where)
    return Turn(speaker, text, tuple(part[1] for part in parts if isinstance(part, tuple) and part[1]))


def _part(part: Any, where: str, role: str, items: Sequence[ItemSpec]) -> str | tuple[str, tuple[str, str] | None]:
    """A part's text; of a picture or clip its placeholder on a line of its own, and the file if the part names it."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise SampleError("", f'{where} has a part {shown(part)}; it must be {{"type": "text", "text": ...}}')
    _check_keys(part, where)
    form = part["type"]
    if form == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError("", f"{where} has a part {shown(part)} without a text")
        media.check_read(part, where)
        return part["text"]
    item = next((i for i in items if form in (i.field, f"{i.field}_url", f"input_{i.field}")), None)
    if item is None:
        raise SampleError("", f"{where} has a part of type {shown(form)}, which no encoder takes")
    if role != HUMAN:
        raise SampleError("", f"{where} is from {role} and has a part of type {shown(form)}; questions alone may")
    keys = tuple(dict.fromkeys((item.field, form, "path", "url")))
    media.check_read(part, where, (*keys, *media.INSIDE))
    named = media.only(part, keys, where)
    if named is None:
        held = part["source"] if isinstance(part.get("source"), dict) else part
        named = held if any(held.get(key) for key in media.INSIDE) else None
    file = None if named is None else (item.name, media.file_name(named, item.field))
    return f"{item.placeholder}\n", file


def _joined(beside: Files, within: Sequence[tuple[str, str]], items: Sequence[ItemSpec]) -> Files:
    """The files of an entry, which stand beside its turns or within them."""
    for item in items:
        names = tuple(file for name, file in within if name == item.name)
        if names and beside[item.name]:
            raise SampleError("", f"it names files both under {item.field} and in the parts of its turns")
        beside[item.name] += names
    return beside


def _check_slots(sample: Sample, items: Sequence[ItemSpec], path: str) -> None:
    for item in items:
        count = len(sample.files[item.name])
        if count > item.slots_per_group:
            raise DataError(
                f"sample {sample.id!r} ({path}) has {count} {item.reader.noun}s for {item.name}, but slots_per_group="
                f"{item.slots_per_group}: no group can hold it; raise slots_per_group to {count} or take the sample out"
            )
