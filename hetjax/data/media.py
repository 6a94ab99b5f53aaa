"""Which files an entry names, and where their placeholders stand. A file that no encoder takes makes a bad sample."""

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetjax.data import naming
from hetjax.data.items import ItemSpec
from hetjax.data.naming import NOTHING
from hetjax.data.paths import expanded
from hetjax.data.problems import SampleError, one_line, shown

# placeholders of common data sets; in a question they stand for a file, and never for their characters
PLACEHOLDER = re.compile(r"<(image|video|audio|speech)>|<\|?image[ _]?\d+\|?>|<img>.*?</img>", re.S)
INSIDE = ("bytes", "data", "base64")  # keys of an object that holds a file and does not name it
Files = dict[str, tuple[str, ...]]  # item name -> file names, in the order of the placeholders


def of_entry(entry: Mapping[str, Any], items: Sequence[ItemSpec]) -> Files:
    """The files that an entry names beside its turns. Raises SampleError."""
    spelled = {item.name: spellings(item, items) for item in items}
    keys = [key for keys in spelled.values() for key in keys]
    for name, named in naming.files(entry, keys):
        help = f"those of the run read {', '.join(keys)}" if keys else "give the run one, or take the sample out"
        raise SampleError("", f"no encoder takes its {name}={shown(named)}; {help}")
    return {item.name: _names(entry, item, spelled[item.name]) for item in items}


def check_read(value: Mapping[str, Any], where: str, read: Sequence[str] = ()) -> None:
    """Raises SampleError if a turn, or a part of one, names a file under another key than those that are `read`."""
    for name, named in naming.files(value, read):
        raise SampleError("", f"{where} names {name}={shown(named)}; files stand beside the turns, or in parts")


def spellings(item: ItemSpec, items: Sequence[ItemSpec]) -> tuple[str, ...]:
    """The keys under which an item's files may stand: image or images, unless the latter is another's of `items`."""
    plural = f"{item.field}s"
    return (item.field,) if any(other.field == plural for other in items) else (item.field, plural)


def only(value: Mapping[str, Any], names: Sequence[str], where: str, nothing: Sequence[Any] = (None,)) -> Any:
    """What stands under that one of the names which is there, else None. Raises SampleError if several are.

    `nothing`: values that say no more than a key that is left out."""
    found = [name for name in names if value.get(name) not in nothing]
    if len(found) > 1:
        raise SampleError("", f"{where} has both {found[0]} and {found[1]}; leave one out")
    return value[found[0]] if found else None


def file_name(value: Any, field: str) -> str:
    """A file's name as an entry gives it, or an object with its path. Raises SampleError for what is no name."""
    if isinstance(value, dict):
        named = only(value, ("path", "url"), field, NOTHING)
        if named is None and any(value.get(key) not in NOTHING for key in INSIDE):
            raise _lies_inside(value, field)
        value = value if named is None else named
    if not isinstance(value, str) or not value:
        raise SampleError("", f"{field}={shown(value)}; it must be a file name or a list of them")
    check_text(value, field)
    if value.startswith("data:"):
        raise _lies_inside(value, field)
    if re.match("(https?|s3|gs|hf|ftp)://", value):
        raise SampleError("", f"{field}={shown(value)} is a web address; fetch the file and name it")
    return urllib.parse.unquote(value.removeprefix("file://")) if value.startswith("file://") else value


def _lies_inside(value: Any, field: str) -> SampleError:
    why = "the file lies inside of the entry; write it beside and name it"
    return SampleError("", f"{field}={one_line(shown(value), 40)}: {why}")


def check_placeholders(text: str, where: str, items: Sequence[ItemSpec], *, system: bool = False) -> None:
    """Raises SampleError for a placeholder of what no encoder takes, or of another spelling; in a `system` text for
    any, as a question alone may show a file."""
    for item in items:
        if system and item.placeholder in text:
            raise SampleError("", f"{where} contains {item.placeholder}; it may stand in questions only")
        text = text.replace(item.placeholder, "")
    if found := PLACEHOLDER.search(text):
        take = ", ".join(item.placeholder for item in items)
        help = f"those of the run take {take}" if items else "give the run one, or take the sample out"
        raise SampleError("", f"{where} has {one_line(found[0], 30)}, which no encoder takes; {help}")


def check_text(text: str, where: str) -> None:
    """Raises SampleError for half a character, which no tokenizer takes and no file system."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"at {error.start} of {len(text)}"
        raise SampleError("", f"{where} holds half a character, or bytes that are not UTF-8, {place}") from error


def locate(root: Path, name: str) -> Path:
    """The file: names are relative to `root`, and ~/ is the home directory."""
    return root / (expanded(name) if name.startswith("~/") else name)


def missing(questions: Sequence[str], answers: Sequence[str], item: ItemSpec, count: int) -> int:
    """How many of an item's `count` files no placeholder stands for. Raises SampleError for what cannot be told.

    Without files, an answer may spell the placeholder: it is text then, as in LLaVA."""
    if count and any(item.placeholder in answer for answer in answers):
        raise SampleError("", f"an answer contains {item.placeholder}; it may stand in questions only")
    placed = sum(question.count(item.placeholder) for question in questions)
    if placed > count:
        raise SampleError("", f"its questions have {placed} {item.placeholder}, {item.field} names {count} files")
    return count - placed


def placed(turns: Sequence[str], items: Sequence[ItemSpec], files: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The turns, with each missing placeholder on a line of its own before the first question. Raises SampleError."""
    front = "".join(
        f"{item.placeholder}\n" * missing(turns[::2], turns[1::2], item, len(files[item.name])) for item in items
    )
    return (front + turns[0], *turns[1:])


def _names(entry: Mapping[str, Any], item: ItemSpec, keys: Sequence[str]) -> tuple[str, ...]:
    value = only(entry, keys, "it", NOTHING)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(file_name(v, item.field) for v in values)
