"""Reads gin files and `NAME = VALUE` settings into bindings, each with the place where it stands.

The syntax is gin's, and so is the parser. On top of it, one line may import several modules, an include is looked up
beside the file that names it, and every name and field must exist. `config.py` says what the bindings mean.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

MOVED = {  # what gin files and workdirs of before call the modules that are in rooms now
    "hetjax.experiment": "hetjax.run.experiment",
    "hetjax.layout": "hetjax.core.layout",
    "hetjax.optimizer": "hetjax.core.optimizer",
}
PLAIN_TEXT = r"[^@%'\"#\\()\[\]{}]+"  # has nothing that looks like a reference, a quoted string or a container


class ConfigError(ValueError):
    """What a user can fix in a gin file or on the command line."""


class Name(NamedTuple):
    """`@scope/name()`, `@name` or `%name` in a value, and what the names of its file stand for."""

    text: str
    symbols: Mapping[str, Any]

    def __repr__(self) -> str:
        return self.text


class _Delegate(config_parser.ParserDelegate):
    """Tells gin's parser what to make of `@name` and `%name`."""

    def __init__(self, symbols: Mapping[str, Any]) -> None:
        self.symbols = symbols

    def configurable_reference(self, name: str, evaluate: bool) -> Name:
        return Name(f"@{name}{'()' if evaluate else ''}", self.symbols)

    def macro(self, name: str) -> Name:
        return Name(f"%{name}", self.symbols)


class Key(NamedTuple):
    """What a binding sets."""

    scope: str
    target: Any
    field: str


class Bare(NamedTuple):
    """A value of the command line that gin cannot read (`why`): text without quotes, where the field takes text."""

    text: str
    why: str


class Binding(NamedTuple):
    """A value, where it was set (the prefix of an error), the name that stood there, and whether by a file."""

    value: Any
    where: str
    name: str
    in_file: bool


class Reader:
    """Reads files and bindings in order, follows includes and imports; later bindings win.

    `replaced`: what stood in a file before the command line set the same.
    """

    def __init__(self) -> None:
        self.bindings: dict[Key, Binding] = {}
        self.replaced: list[Binding] = []
        self.macros: dict[str, Binding] = {}
        self.symbols: dict[str, Any] = {}  # name -> module, of all files

    def read_file(self, path: str, where: str = "") -> None:
        """`where` is the place of the include, as a prefix of an error."""
        if not os.path.isfile(path):
            near = nearest(Path(path).name, [p.name for p in Path(path).parent.glob("*.gin")])
            raise ConfigError(f"{where}no such gin file: {path}{near}")
        symbols: dict[str, Any] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        for number, line in enumerate(lines):
            if line.split()[:1] in (["from"], ["import"]):  # gin's parser takes only one module per line
                symbols |= _import(line, f"{path}:{number + 1}: ")
                lines[number] = ""
        for statement in _statements("\n".join(lines) + "\n", symbols, path):
            where = f"{path}:{statement.location.line_num}: "
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(os.path.join(os.path.dirname(path), statement.filename), where)
            elif isinstance(statement, config_parser.BindingStatement):
                self._bind(statement, symbols, where, in_file=True)
        self.symbols |= symbols

    def read_binding(self, text: str) -> None:
        """One binding of the command line; it may use what any of the files imports."""
        try:
            statements = list(_statements(text, self.symbols, ""))
        except ConfigError as error:
            name, _, value = text.partition(" = ")
            if not re.fullmatch(PLAIN_TEXT, value):
                raise
            statements = [s._replace(value=Bare(value, str(error))) for s in _statements(f"{name} = 0", {}, "")]
        for statement in statements:
            self._bind(statement, self.symbols, _place(text), in_file=False)

    def _bind(
        self, statement: config_parser.BindingStatement, symbols: Mapping[str, Any], where: str, *, in_file: bool
    ) -> None:
        scope, selector, field, value, _ = statement
        if not field:
            name = scoped(scope, selector)
            self.macros[name] = Binding(value, where, name, in_file)
            return
        target = resolve(selector, symbols, where)
        parameters = inspect.signature(target).parameters
        if field not in parameters:
            raise ConfigError(f"{where}{selector} has no field {field}{nearest(field, parameters)}")
        key, name = Key(scope, target, field), scoped(scope, f"{selector}.{field}")
        if not in_file and key in self.bindings:
            self.replaced.append(self.bindings[key])
        self.bindings[key] = Binding(value, where, name, in_file)


def _statements(text: str, symbols: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The statements of a file, or of one binding where `path` is empty."""
    try:
        yield from config_parser.ConfigParser(text, _Delegate(symbols))
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        word = re.search(r"Failed to parse token '(.*)'", str(error.args[0]))
        why = f"{word[1]} is not a value; a string needs quotes: '{word[1]}'" if word else f"{error.args[0]}"
        raise ConfigError(f"{f'{path}:{line}: ' if path else _place(text)}{why}") from error


def _place(binding: str) -> str:
    """Where a binding of the command line stands, as a prefix of an error."""
    return f"--gin.{'='.join(binding.split(' = ', 1))}: "


def _import(line: str, where: str) -> dict[str, Any]:
    """Name -> module, for a line with an import of one or several modules."""
    match = re.fullmatch(r"(?:from\s+([\w.]+)\s+)?import\s+([\w.,\s]+?)\s*(?:#.*)?", line.strip())
    if not match:
        raise ConfigError(f"{where}not an import of modules on one line: {line.strip()}")
    if match[1] == "__gin__":
        return {}  # `dynamic_registration`, which other readers of gin files want to be told
    found: dict[str, Any] = {}
    for item in match[2].split(","):
        name, _, alias = (part.strip() for part in item.partition(" as "))
        module = _module(f"{match[1]}.{name}" if match[1] else name, where)
        first = name.partition(".")[0]
        found[alias or first] = module if alias or match[1] else sys.modules[first]
    return found


def _module(name: str, where: str) -> Any:
    name = MOVED.get(name, name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):
            raise  # the module is there, and something that it needs is not
    parent, _, last = missing.rpartition(".")
    package = getattr(importlib.import_module(parent), "__path__", None) if parent else None
    if parent and not package:
        raise ConfigError(f"{where}gin imports modules: import {parent} and write {parent.rpartition('.')[2]}.{last}")
    near = [module.name for module in pkgutil.iter_modules(package)]
    raise ConfigError(f"{where}no module named {missing}{nearest(last, near)}")


def resolve(selector: str, symbols: Mapping[str, Any], where: str) -> Any:
    """What `selector` names, through the imports."""
    head, *rest = selector.split(".")
    if head not in symbols:
        raise ConfigError(f"{where}{head} is not imported{nearest(head, symbols)}")
    value = symbols[head]
    for i, name in enumerate(rest):
        moved = MOVED.get(".".join([head, *rest[: i + 1]]))
        if moved in sys.modules:
            value = sys.modules[moved]
            continue
        if name not in dir(value):
            public = [n for n, v in vars(value).items() if not n.startswith("_") and callable(v)]
            raise ConfigError(f"{where}{'.'.join([head, *rest[:i]])} has no {name}{nearest(name, public)}")
        value = getattr(value, name)
    if not callable(value):
        raise ConfigError(f"{where}{selector} is not a class or a function, so it has no settings")
    return value


def scoped(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error about `name`: the most similar of `names`, or a few of them."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there is {', '.join(known[:12])}" if known else ""
