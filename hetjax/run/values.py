"""What a value of a gin file, or text of the command line, becomes in a field of a declared type.

On the command line the type decides: gin's reading holds where it fits the field, else the text itself where the field
takes text. So a `str` takes a#b, (1), @home, 007 and None without quotes, `str | tuple[int, ...]` takes 2 as text and
[2] as a tuple, and a quoted string is what is quoted. Items of lists and dicts go by the same rule: what stands between
two commas is one item, whole or refused.
"""

import collections.abc
import contextlib
import io
import itertools
import math
import re
import sys
import tokenize
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from gin import config_parser

WORDS = {"true": True, "false": False}  # for a bool of the command line, beside gin's True and False
DIGITS = {"1": "True", "0": "False"}  # which a bool does not take
QUOTES, OPENING, CLOSING = "'\"", "([{", ")]}"


class ConfigError(ValueError):
    """What a user can fix in a gin file or on the command line."""


class Name(NamedTuple):
    """`@scope/name()`, `@name` or `%name` in a value, and what the names of its file stand for."""

    text: str
    symbols: Mapping[str, Any]

    def __repr__(self) -> str:
        return self.text

    @property
    def calls(self) -> str:
        """The imported name that `@scope/name.attribute()` begins with; "" for another."""
        called = self.text.startswith("@") and self.text.endswith("()")
        return self.text[1:].rpartition("/")[2].partition(".")[0] if called else ""


class Typed(NamedTuple):
    """Text of the command line, and what gin reads there; where it reads nothing, `why`."""

    text: str
    value: Any
    why: str
    symbols: Mapping[str, Any]


class Delegate(config_parser.ParserDelegate):
    """Tells gin's parser what to make of `@name` and `%name`."""

    def __init__(self, symbols: Mapping[str, Any]) -> None:
        self.symbols = symbols

    def configurable_reference(self, name: str, evaluate: bool) -> Name:
        return Name(f"@{name}{'()' if evaluate else ''}", self.symbols)

    def macro(self, name: str) -> Name:
        return Name(f"%{name}", self.symbols)


def read_typed(text: str, symbols: Mapping[str, Any], where: str) -> Typed:
    """`text` as gin reads it, if it is one value and nothing else: a comment would be the end of a text with a #."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about text that was never meant as Python
            statements = list(config_parser.ConfigParser(f"value = {text.strip()}", Delegate(symbols)))
            tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
            kinds = [token.type for token in tokens]
            if len(statements) != 1 or tokenize.COMMENT in kinds:
                raise SyntaxError("Unable to parse value.")
            if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds):  # Python would join them
                raise SyntaxError("Two strings side by side: a comma is missing between them.")
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError, RecursionError) as error:  # text may be anything
        return Typed(text, None, f"{where}{explain(error)}", symbols)
    return Typed(text, statements[0].value, "", symbols)


def explain(error: Exception) -> str:
    """What is wrong with a value, from what gin's parser raised."""
    word = re.search(r"Failed to parse token '(.*)'", str(error.args[0]))
    if word and word[1][:1] not in QUOTES:
        return f"{word[1]} is not a value; a string needs quotes: '{word[1]}'"
    return f"{error.args[0]}"


def settle(typed: Typed, hint: Any, known: Callable[[Name], bool]) -> Any:
    """What `typed` is in a field of type `hint`, in gin's terms; a Name is one only if `known`, else it may be text.

    What suits no reading stays, for `fit` to refuse. Raises ConfigError where there is no type to read it by."""
    names = [leaf for leaf in leaves(typed.value) if isinstance(leaf, Name)]
    if names and all(map(known, names)):
        return typed.value
    if not names and not typed.why:
        with contextlib.suppress(TypeError):
            fit(typed.value, hint, digits=False)
            return typed.value
    if hint is Any and typed.why:
        raise ConfigError(typed.why)
    try:
        return _text(typed, hint, known)
    except TypeError:
        return typed.text if typed.why else typed.value


def _text(typed: Typed, hint: Any, known: Callable[[Name], bool]) -> Any:
    """The text itself, in a field that takes it. Raises TypeError for another."""
    text, (base, args) = typed.text, _parts(hint)
    if base is typing.Union:
        if str in args:
            return text
        for arg in args:
            with contextlib.suppress(TypeError):
                return _text(typed, arg, known)
    if base is str or (base is typing.Literal and text in args):
        return text
    if base is bool and text in WORDS:
        return WORDS[text]

    def read(item: str, hint: Any) -> Any:
        inner = read_typed(item, typed.symbols, "")
        if not item or (inner.why and item[0] in QUOTES):
            raise TypeError
        return settle(inner, hint, known)

    if _is_sequence(base) and args:
        return [read(item, args[0]) for item in _items(text, ("[]", "()"))]
    if _is_mapping(base) and args:
        pairs = [_pair(item) for item in _items(text, ("{}",))]
        found = {read(name, args[0]): read(value, args[1]) for name, value in pairs}
        if len(found) == len(pairs):  # no name twice
            return found
    raise TypeError


def _pair(item: str) -> tuple[str, str]:
    """The name and the value of an item of a dict, without quotes or with. Raises TypeError."""
    pair = re.fullmatch(r"""('[^']*'|"[^"]*"|[^:]*?)\s*:\s*(.*)""", item, re.DOTALL)
    if not pair:
        raise TypeError
    return pair[1], pair[2]


def _items(text: str, brackets: tuple[str, ...]) -> list[str]:
    """What stands between the commas in one of the `brackets`, where quotes may begin an item, and in a dict its value.

    Raises TypeError."""
    text = text.strip()
    if text[:1] + text[1:][-1:] not in brackets:
        raise TypeError
    items, quote, depth, escaped = [""], "", 0, False
    before = ("", ":") if text[0] == "{" else ("",)
    for letter in text[1:-1]:
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in QUOTES and not depth and items[-1].rstrip()[-1:] in before:
            quote = letter
        elif letter == "," and not depth:
            items.append("")
            continue
        depth += (letter in OPENING) - (letter in CLOSING) if not quote else 0
        items[-1] += letter
    if quote or depth:
        raise TypeError
    return [item.strip() for item in (items if items[-1].strip() else items[:-1])]


def fit(value: Any, hint: Any, *, digits: bool = True) -> Any:
    """`value` as the declared type takes it: a list for a tuple, an int for a float, and for text too if `digits`.

    Raises TypeError for another, and for a float that is not finite."""
    if isinstance(value, Typed):
        value = settle(value, hint, lambda name: False)
    if hint is Any:
        return value
    base, args = _parts(hint)
    if base is typing.Union:
        for arg in sorted(args, key=lambda arg: arg is str):  # an int before the text of its digits
            with contextlib.suppress(TypeError):
                return fit(value, arg, digits=digits)
        raise TypeError
    if base is str and type(value) is int and digits:
        return str(value)
    if base is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:  # nan is not
            raise TypeError
        return float(value)
    if base is tuple and isinstance(value, list):
        value = tuple(value)
    if not _matches(value, base, args):
        raise TypeError
    if base is tuple and args:
        items = args[:1] * len(value) if args[-1] is ... else args
        if len(items) != len(value):
            raise TypeError
        return tuple(fit(item, one, digits=digits) for item, one in zip(value, items, strict=True))
    if isinstance(value, (list, tuple)) and _is_sequence(base) and args:
        return type(value)(fit(item, args[0], digits=digits) for item in value)
    if isinstance(value, dict) and args:
        return {fit(k, args[0], digits=digits): fit(item, args[1], digits=digits) for k, item in value.items()}
    return value


def _matches(value: Any, base: Any, args: tuple[Any, ...]) -> bool:
    """Whether `value` is of the kind, whatever is inside."""
    if base is typing.Literal:
        return value in args
    if not isinstance(base, type) or getattr(base, "_is_protocol", False):
        return True
    number, text = base is int and isinstance(value, bool), _is_sequence(base) and isinstance(value, str)
    return isinstance(value, base) and not number and not text


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its arguments, and these."""
    origin = typing.get_origin(hint)
    return typing.Union if origin is types.UnionType else origin or hint, typing.get_args(hint)


def _is_sequence(base: Any) -> bool:
    return base in (tuple, list, collections.abc.Sequence)


def _is_mapping(base: Any) -> bool:
    return base in (dict, collections.abc.Mapping)


def wanted(value: Any, hint: Any) -> str:
    """What a field of type `hint` takes in place of `value`, and how it is written, for an error."""
    args = _parts(hint)[1]
    name = hint.__name__ if isinstance(hint, type) and not args else str(hint)
    name = re.sub(r"\bfloat\b", "finite float", name)
    kinds = list(map(_parts, (hint, *args)))
    items = [inner for kind, inner in kinds if (_is_sequence(kind) or _is_mapping(kind)) and inner]
    listed = [inner for kind, inner in kinds if _is_sequence(kind)]
    if isinstance(value, str) and items and value.strip()[:1] in (*OPENING,):
        return f"{name}; between two commas of it stands one item, in quotes if it holds a comma"
    if isinstance(value, str | int | float) and listed:  # what may be the items of a list
        return f"{name}, in brackets: " + (f"[{value!r}]" if str in listed[0] else f"[{value}]")
    return name + _instead(value, {kind for kind, _ in kinds})


def _instead(value: Any, kinds: Collection[Any]) -> str:
    """How a field of one of `kinds` is told what `value` means, where that is plain."""
    text = str(value).strip().lower()
    if types.NoneType in kinds and text in ("none", "null", ""):
        return "; write None"
    if bool in kinds:
        return f"; write {DIGITS.get(text, 'True or False')}"
    with contextlib.suppress(ValueError):
        number = float(text)
        if float in kinds and math.isfinite(number):
            return f"; write {text}"
        if int in kinds and number.is_integer() and abs(number) < 2**53:
            return f"; write {int(number)}"
    return ""


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dicts hold, at any depth."""
    if type(value) in (list, tuple):
        for item in value:
            yield from leaves(item)
    elif type(value) is dict:
        for item in (*value.keys(), *value.values()):
            yield from leaves(item)
    else:
        yield value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied inside of lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(map_leaves(function, item) for item in value)
    if type(value) is dict:
        return {map_leaves(function, key): map_leaves(function, item) for key, item in value.items()}
    return function(value)
