"""Reads gin files and `NAME = VALUE` settings into bindings, each with the place where it stands.

The syntax is gin's, and so is the parser. On top of it, one line may import several modules, a file sees what those
before it and around it import, an include is looked up beside the file that names it, then, as gin does, where the
command runs, and every name and field must exist. `values.py` says what a value becomes in its field, `config.py` what
the bindings mean.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import os
import pkgutil
import re
import sys
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from hetjax.data.paths import expanded
from hetjax.run.values import ConfigError, Delegate, Name, Typed, explain, leaves, read_typed, settle

MOVED = {  # what gin files and workdirs of before call the modules that are in rooms now
    "hetjax.experiment": "hetjax.run.experiment",
    "hetjax.layout": "hetjax.core.layout",
    "hetjax.optimizer": "hetjax.core.optimizer",
}
NAME = r"[\w./]+"


class Key(NamedTuple):
    """What a binding sets."""

    scope: str
    target: Any
    field: str


class Binding(NamedTuple):
    """A value, where it was set (the prefix of an error), the name that stood there, and whether by a file."""

    value: Any
    where: str
    name: str
    in_file: bool


class Reader:
    """Reads files and bindings in order, follows includes and imports; later bindings win.

    `replaced`: what stood before the command line set the same, and what it set. `typed`: the command line, as a file
    has it.
    """

    def __init__(self) -> None:
        self.bindings: dict[Key, Binding] = {}
        self.replaced: list[tuple[Binding, Binding]] = []
        self.macros: dict[str, Binding] = {}
        self.symbols: dict[str, Any] = {}  # name -> module; each file sees those of the files before it
        self.imported: dict[str, str] = {}  # name -> where
        self.typed: list[str] = []

    def read_file(self, path: str, where: str = "", outer: tuple[str, ...] = ()) -> None:
        """`where` is the place of the include, as a prefix of an error, `outer` the files that it lies in."""
        if os.path.realpath(path) in map(os.path.realpath, outer):
            way = ", ".join(outer[outer.index(path) + 1 :]) if path in outer else ""
            raise ConfigError(f"{where}{path} includes itself{f', by way of {way}' if way else ''}")
        lines = read_text(path, where).split("\n")
        for number in _import_lines("\n".join(lines)):  # gin's parser takes only one module per line
            self._import(lines[number], f"{path}:{number + 1}")
            lines[number] = ""
        for statement in _statements("\n".join(lines) + "\n", self.symbols, path):
            where = f"{path}:{statement.location.line_num}: "
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(_included(statement.filename, path), where, (*outer, path))
            elif isinstance(statement, config_parser.BindingStatement):
                self._bind(statement, where, in_file=True)

    def read_command_line(self, bindings: Iterable[str]) -> None:
        """Bindings `NAME = VALUE`; they may use what any of the files imports, and each other's macros."""
        read = [_binding(text, self.symbols) for text in bindings]
        for statement, where in sorted(read, key=lambda pair: bool(pair[0].arg_name)):  # macros first
            self._bind(statement, where, in_file=False)

    def _import(self, line: str, where: str) -> None:
        for name, module in _import(line, f"{where}: ").items():
            before = self.symbols.setdefault(name, module)
            if before is not module:
                raise ConfigError(
                    f"{where}: {name} is {module.__name__} here, but {before.__name__} at {self.imported[name]}; "
                    f"import one of them as another name: import {module.__name__} as NAME"
                )
            self.imported.setdefault(name, where)

    def _bind(self, statement: config_parser.BindingStatement, where: str, *, in_file: bool) -> None:
        scope, selector, field, value, _ = statement
        if not field:
            name = scoped(scope, selector)
            if isinstance(value, Typed):
                self.typed.append(f"{name} = {value.text if value.why else value.value!r}")
                value = value.value if any(isinstance(leaf, Name) for leaf in leaves(value.value)) else value
            self.macros[name] = Binding(value, where, name, in_file)
            return
        target = resolve(selector, self.symbols, where)
        parameters = inspect.signature(target).parameters
        if field not in parameters:
            raise ConfigError(f"{where}{selector} has no field {field}{nearest(field, parameters)}")
        key, name = Key(scope, target, field), scoped(scope, f"{selector}.{field}")
        if isinstance(value, Typed):
            value = settle(value, typing.get_type_hints(target).get(field, Any), self._known)
            self.typed.append(f"{name} = {value!r}")
        binding = Binding(value, where, name, in_file)
        if not in_file and key in self.bindings:
            self.replaced.append((self.bindings[key], binding))
        self.bindings[key] = binding

    def _known(self, name: Name) -> bool:
        return name.calls in self.symbols or name.text.removeprefix("%") in self.macros


def read_text(path: str, where: str = "") -> str:
    """The text of a gin file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        near = nearest(Path(path).name, [p.name for p in Path(path).parent.glob("*.gin")])
        raise ConfigError(f"{where}no such gin file: {path}{near}") from error
    except OSError as error:
        raise ConfigError(f"{where}{path} cannot be read: {error.strerror}; name a gin file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _included(name: str, path: str) -> str:
    """Where `name`, which the file at `path` includes, lies: beside that file, else where the command runs."""
    beside = os.path.join(os.path.dirname(path), expanded(name))
    return beside if os.path.exists(beside) or not os.path.exists(expanded(name)) else expanded(name)


def _statements(text: str, symbols: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The statements of a file."""
    try:
        yield from config_parser.ConfigParser(text, Delegate(symbols))
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        raise ConfigError(f"{path}:{line}: {explain(error)}") from error
    except TypeError as error:  # a dict's key that is a list, a dict or a reference
        raise ConfigError(f"{path}: {error}") from error


def _binding(text: str, symbols: Mapping[str, Any]) -> tuple[config_parser.BindingStatement, str]:
    """A binding of the command line, and where it stands, as a prefix of an error."""
    name, _, value = text.partition("=")
    name, value = name.removesuffix(" "), value.removeprefix(" ")
    where = f"--gin.{name}={value}: "
    found = list(_statements(f"{name} = 0", {}, "")) if re.fullmatch(NAME, name) else []
    if len(found) != 1:
        raise ConfigError(f"{where}{name!r} is not the name of a setting, such as experiment.Experiment.steps")
    return found[0]._replace(value=read_typed(value, symbols, where)), where


def _import_lines(text: str) -> list[int]:
    """Which lines, counted from 0, are imports; inside of a string none is."""
    found, begins = [], True
    with contextlib.suppress(SyntaxError, tokenize.TokenError):  # the parser will say what is wrong
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if begins and token.string in ("from", "import"):
                found.append(token.start[0] - 1)
            begins = token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return found


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
