"""A file of JSON, in any encoding, becomes its entries; what is no JSON stands in its place as `Malformed`."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hetjax.data.naming import TURNS
from hetjax.data.settings import DataError

DIGITS = 4300  # of a number that Python converts; longer ones stay texts


class Malformed(NamedTuple):
    """A line that is no JSON, and why."""

    reason: str


class Repeated(dict[str, Any]):
    """An object in which `key` stands twice, so that one of its values is lost."""

    key = ""


class Source(NamedTuple):
    """Entries of a file in its order, the line of each (1 is the first), and what tells the file from others."""

    entries: tuple[Any, ...]
    lines: tuple[int, ...]
    digest: str


def read(path: str, setting: str) -> Source:
    """The entries of a .json file (a list) or of any other (one a line; blank lines are none).

    Bytes that are no text become half characters, which the entries that have them are refused for. Raises DataError,
    which names `setting`, if there is no such file, no entry, or no list in a .json file.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{setting}={path!r}: {why}; name a file of conversations") from error
    text = _decode(content, path)
    if path.lower().endswith(".json"):
        found = list(enumerate(_list(text, path), 1))
    else:
        _check_lines(text, path)
        found = list(_lines(text))
    if not found:
        raise DataError(f"{path} holds no conversation; a run needs at least one")
    lines, entries = zip(*found, strict=True)
    return Source(entries, lines, hashlib.sha256(content).hexdigest()[:16])


def _decode(content: bytes, path: str) -> str:
    encoding = json.detect_encoding(content)  # any UTF, with or without a byte-order mark
    try:
        return content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in {encoding}: {error.reason}; save it as UTF-8") from error


def _list(text: str, path: str) -> list[Any]:
    try:
        value = parse(text)
    except (ValueError, RecursionError) as error:
        rule = "a .json file must hold one list, without comments or a comma at its end"
        if str(error).startswith("Extra data"):  # behind a first value
            rule = "a .json file must hold one list; for one conversation a line use .jsonl"
        raise DataError(f"{path} is not JSON: {error}; {rule}") from error
    if not isinstance(value, list):
        within = value if isinstance(value, dict) else {}
        lists = [key for key, found in within.items() if isinstance(found, list) and key not in TURNS]
        one = f"if the one under {lists[0]!r} is it, write that alone" if lists else ""
        help = one or "for one conversation a line use .jsonl"
        raise DataError(f"{path} holds {kind(value)}, but a .json file must hold a list of conversations; {help}")
    return value


def _check_lines(text: str, path: str) -> None:
    """Raises DataError for a list where entries stand one a line."""
    text = text.lstrip(" \t\r\n\ufeff")
    try:
        whole = text.startswith("[") and isinstance(parse(text), list)
    except (ValueError, RecursionError):
        return
    if whole:
        raise DataError(f"{path} holds one list, and no conversation a line; call it .json")


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # `splitlines` would also cut inside of texts
        line = line.strip(" \t\n\ufeff")  # files that were joined have a byte-order mark amid the lines
        if not line:
            continue
        try:
            yield number, parse(line)
        except (ValueError, RecursionError) as error:
            yield number, Malformed(f"line {number} is not JSON: {error}")


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    repeated = Repeated(found)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < DIGITS else digits


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", Repeated: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")
