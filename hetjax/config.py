"""gin at the edge: files and `--gin.NAME=VALUE` become one frozen dataclass; nothing else in the project imports gin.

A file imports what it names (`from hetjax import layout, train`) and binds fields of the dataclasses it finds there:

    train.Experiment.steps = 100
    train.Experiment.layouts = {"vision": @vision/layout.Layout()}
    vision/layout.Layout.dp = 4

Every name, field and simple type is checked before gin sees the file, and a binding that ended up in no value is an
error: gin alone accepts a misspelt scope in silence. Errors name file, line, and the nearest valid name.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util  # gin 0.5.0 reads `importlib.util` without importing it
import inspect
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
import jax
from gin import config_parser

T = TypeVar("T")
HEADER = "from __gin__ import dynamic_registration"


class ConfigError(ValueError):
    """What a user can fix in a gin file or on the command line."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line. `workdir` is "" for a command without one; `flags` are the command's own."""

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]  # gin syntax: "train.Experiment.steps = 100"
    workdir: str
    flags: argparse.Namespace


def parse_arguments(
    argv: Sequence[str], parser: argparse.ArgumentParser | None = None, *, needs_workdir: bool = True
) -> Arguments:
    """The arguments in `argv` (without the program's name). `parser` brings the command's own flags.

    Adds `--gin_file=FILE` and `--gin.NAME=VALUE`, both repeatable, and `--workdir=DIR` where the command needs one.
    Exits with status 2 on an unknown flag, naming the nearest one.
    """
    parser = parser or argparse.ArgumentParser()
    parser.allow_abbrev = False
    parser.add_argument("--gin_file", action="append", required=True, metavar="FILE", help="repeatable; later ones win")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="binds one setting, as in --gin.train.Experiment.steps=100")
    if needs_workdir:
        parser.add_argument("--workdir", required=True, metavar="DIR", help="metrics, checkpoints, configuration")
    bindings = [a for a in argv if a.startswith("--gin.")]
    flags, unknown = parser.parse_known_args([a for a in argv if not a.startswith("--gin.")])
    for binding in bindings:
        if "=" not in binding:
            parser.error(f"{binding} has no value: write {binding}=VALUE")
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{_nearest(unknown[0].split('=')[0], known)}")
    names = (binding.removeprefix("--gin.").partition("=") for binding in bindings)
    return Arguments(
        tuple(flags.gin_file), tuple(f"{n} = {v}" for n, _, v in names), getattr(flags, "workdir", ""), flags
    )


def emulate_devices(count: int) -> None:
    """Makes this process run on `count` emulated CPU devices. Call it before the first array.

    Also sets PJRT_NPROC, the width of the CPU client's thread pool: in one as narrow as a small machine's, programs
    with collectives starve each other and the client aborts. Both are read when the backend starts, not by `import jax`.
    """
    os.environ.setdefault("PJRT_NPROC", str(max(64, 8 * count)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend has started, in a notebook or a test: enough devices will do
        pass
    found = jax.devices()
    if found[0].platform != "cpu" or len(found) < count:
        raise ConfigError(
            f"{count} emulated CPU devices asked for, but jax already runs on {len(found)} {found[0].platform} device(s): "
            "start a fresh process, or set emulated devices before the first use of jax"
        )


def use_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled programs in `directory`; None is $XDG_CACHE_HOME/hetjax or ~/.cache/hetjax, "" keeps none.

    A directory that jax was already given (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if directory == "":
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(directory or Path(root) / "hetjax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def load(gin_files: Iterable[str], bindings: Iterable[str], root: Callable[..., T]) -> T:
    """`root()` with every field that the files and then the bindings set. Raises ConfigError.

    Clears what gin held before. A reference without call (`@optax.adamw`) stays bound until the next `load`.
    """
    gin.clear_config()
    reader = _Reader()
    for path in gin_files:
        reader.read_file(path, included_from="")
    reader.read_bindings(tuple(bindings))
    reader.check_macros()
    for text in reader.pieces:
        gin.parse_config(text)
    result = _call(root)
    reader.check_used()
    return result


def full() -> str:
    """Every binding that was read, as a gin file."""
    return gin.config_str(max_line_length=120)


def operative() -> str:
    """Every value that the run uses, defaults included, as a gin file that `load` reads back."""
    return gin.operative_config_str(max_line_length=120)


class _Unresolved(str):
    """A parsed `@name` or `%macro`: it stands for a value that only gin knows."""


class _Delegate(config_parser.ParserDelegate):
    """Collects what a statement refers to."""

    def __init__(self) -> None:
        self.references: list[str] = []
        self.macros: list[str] = []

    def configurable_reference(self, name: str, evaluate: bool) -> _Unresolved:
        self.references.append(name)
        return _Unresolved(f"@{name}")

    def macro(self, name: str) -> _Unresolved:
        self.macros.append(name)
        return _Unresolved(f"%{name}")


class _Reader:
    """Reads files in order, follows includes, checks every name; `pieces` is then what gin has to parse.

    A piece is a run of lines without an include, after the imports of its file. gin itself would look an include up in
    the working directory, not beside the file that names it.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.imports: dict[str, tuple[str, Any]] = {}  # of all files: statement -> bound name, module
        self.bound: list[tuple[str, Any]] = []  # (where, gin's BindingStatement)
        self.macros: dict[str, str] = {}  # macro that a value uses -> where

    def read_file(self, path: str, *, named_at: str = "") -> None:
        """`named_at` is the place of the include, as a prefix of an error."""
        if not os.path.isfile(path):
            near = _nearest(Path(path).name, [p.name for p in Path(path).parent.glob("*.gin")])
            raise ConfigError(f"{named_at}no such gin file: {path}{near}")
        self._read(Path(path).read_text(), path, imports={})

    def read_binding(self, text: str) -> None:
        """One binding of the command line; it may use what any of the files imports."""
        self._read(text, "", imports=dict(self.imports))

    def _read(self, text: str, path: str, *, imports: dict[str, tuple[str, Any]]) -> None:
        lines, start = text.splitlines(), 0
        for where, statement, delegate in _statements(text, path):
            match statement:
                case config_parser.ImportStatement():
                    if not statement.module.startswith("__gin__."):
                        imports[statement.format()] = statement.bound_name(), _import(statement, where)
                case config_parser.IncludeStatement():
                    self._add_piece(lines[start : statement.location.line_num - 1], imports)
                    start = statement.location.line_num
                    self.read_file(os.path.join(os.path.dirname(path), statement.filename), named_at=where)
                case config_parser.BindingStatement():
                    self.bound.append((where, statement))
                    if statement.arg_name:
                        _check_value(_resolve(statement.selector, imports, where), statement, where)
            for reference in delegate.references:
                _resolve(reference.rpartition("/")[2], imports, where)
            self.macros.update(dict.fromkeys(delegate.macros, where))
        self._add_piece(lines[start:], imports)
        self.imports.update(imports)

    def _add_piece(self, lines: Sequence[str], imports: Iterable[str]) -> None:
        body = [line for line in lines if line.split()[:1] not in (["from"], ["import"])]
        self.pieces.append("\n".join([HEADER, *imports, *body, ""]))

    def check_macros(self) -> None:
        """Raises ConfigError for a macro that is used and set nowhere."""
        known = [_scoped(s.scope, s.selector) for _, s in self.bound if not s.arg_name]
        for name, where in self.macros.items():
            if name not in known and name != "gin.REQUIRED":
                raise ConfigError(f"{where}%{name} is set nowhere{_nearest(name, known)}")

    def check_used(self) -> None:
        """Raises ConfigError for the first binding that reached no value of the run."""
        used = _used_bindings()
        calls = [(scope, selector, name) for (scope, selector), v in gin.config._OPERATIVE_CONFIG.items() for name in v]
        names = [_scoped(scope, _short(selector)) + f".{name}" for scope, selector, name in calls if selector != MACRO]
        for (scope, selector), values in gin.config._CONFIG.items():
            for name in values.keys() - {n for s, c, n in used if (s, c) == (scope, selector)}:
                macro = selector == MACRO
                shown = scope if macro else f"{_scoped(scope, _short(selector))}.{name}"
                if macro:
                    why = f"no value uses %{shown}"
                elif any(c == selector and n == name and scope in _enclosing(s) for s, c, n in calls):
                    why = "a binding of an inner scope replaces it wherever it is used"
                else:
                    why = f"nothing builds {_scoped(scope, _short(selector))}"
                near = _nearest(shown, [n for n in names if n != shown])
                raise ConfigError(f"{self._where(scope, selector, name)}{shown} is never used: {why}{near}")

    def _where(self, scope: str, selector: str, name: str) -> str:
        """Where the binding stands, as a prefix of an error; the last one wins in gin too."""
        key = (*scope.rpartition("/")[::2], "") if selector == MACRO else (scope, _short(selector), name)
        found = [where for where, s in self.bound if (s.scope, _short(s.selector), s.arg_name) == key]
        return found[-1] if found else ""


def _statements(text: str, path: str) -> Iterator[tuple[str, Any, _Delegate]]:
    """Each statement with its place (the prefix of an error) and with what its value refers to."""
    delegate = _Delegate()
    try:
        parser = config_parser.ConfigParser(text, delegate)
        for statement in parser:
            where = f"{path}:{statement.location.line_num}: " if path else f"--gin.{text.split(' = ')[0]}: "
            yield where, statement, delegate
            delegate.references.clear()
            delegate.macros.clear()
    except (SyntaxError, tokenize.TokenError) as error:
        if not path:
            name, _, value = text.partition(" = ")
            raise ConfigError(
                f"--gin.{name}={value}: not a gin value; a string needs quotes: \"--gin.{name}='{value}'\""
            ) from error
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        raise ConfigError(f"{path}:{line}: {error.args[0]}") from error


def _import(statement: Any, where: str) -> Any:
    """The module that the statement's first name stands for."""
    try:
        module = importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{statement.module}.".startswith(f"{missing}."):
            raise  # the module is there, and something that it needs is not
        parent, _, name = missing.rpartition(".")
        if parent and not hasattr(importlib.import_module(parent), "__path__"):
            raise ConfigError(f"{where}gin imports modules: import {parent} and write {_short(missing)}") from error
        near = [m.name for m in pkgutil.iter_modules(importlib.import_module(parent).__path__ if parent else None)]
        raise ConfigError(f"{where}no module named {missing}{_nearest(name, near)}") from error
    return module if statement.is_from or statement.alias else sys.modules[statement.module.partition(".")[0]]


def _resolve(selector: str, imports: Mapping[str, tuple[str, Any]], where: str) -> Any:
    """What `selector` names, through the imports."""
    symbols = dict(imports.values())
    head, *rest = selector.split(".")
    if head == "gin":
        return gin.config._GinBuiltins
    if head not in symbols:
        raise ConfigError(f"{where}{head} is not imported in a gin file{_nearest(head, list(symbols))}")
    value = symbols[head]
    for i, name in enumerate(rest):
        public = {n: v for n, v in vars(value).items() if not n.startswith("_")}
        if name not in public:
            near = _nearest(name, [n for n, v in public.items() if callable(v)])
            raise ConfigError(f"{where}{'.'.join([head, *rest[:i]])} has no {name}{near}")
        value = public[name]
    if not callable(value):
        raise ConfigError(f"{where}{selector} is not a class or a function, so it has no settings")
    return value


def _check_value(target: Any, statement: Any, where: str) -> None:
    """Raises ConfigError unless `target` has the field and its declared type takes the value."""
    parameters = inspect.signature(target).parameters
    name, value = statement.arg_name, statement.value
    if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(f"{where}{statement.selector} has no field {name}{_nearest(name, list(parameters))}")
    if dataclasses.is_dataclass(target):
        hint = typing.get_type_hints(target)[name]
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
            raise ConfigError(f"{where}{statement.selector}.{name} = {value!r}, but it must be {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a parsed literal is of the declared type; true for types that a literal cannot tell."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Unresolved) or hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    base = origin or hint
    if not isinstance(base, type) or getattr(base, "_is_protocol", False):
        return True
    if not isinstance(value, (int, float) if base is float else base) or (base in (int, float) and value in BOOLS):
        return False
    if base is tuple and args:
        items = args[:1] * len(value) if args[-1] is ... else args
        return len(items) == len(value) and all(map(_fits, value, items))
    if issubclass(base, Mapping) and args:
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    return True
