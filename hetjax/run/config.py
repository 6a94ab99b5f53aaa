"""gin files and `--gin.NAME=VALUE` become one frozen dataclass; nothing else in the project knows of them.

A file imports the modules that it names and binds fields of the dataclasses in them; a scope tells two instances apart:

    from hetjax.core import layout
    from hetjax.run import experiment
    experiment.Experiment.steps = 100
    experiment.Experiment.llm = @llm/experiment.LanguageModel()
    llm/experiment.LanguageModel.layout = @llm/layout.Layout()
    llm/layout.Layout.tp = 2

Only gin's parser is used. Bindings are looked up here, and as gin does: `@scope/name()` enters that scope, `@name()`
stays in the scope it is used in, an inner scope wins over an outer one. But every name, field and type is checked, a
binding that reaches no value is an error (gin takes a misspelt scope in silence), and there is no global state. The
command line may stand before a file's binding, and all that hangs on it, and its text needs no quotes. Errors name the
file, the line and the nearest valid name.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from hetjax.run.ginfile import Binding, Key, Reader, nearest, read_text, resolve, scoped
from hetjax.run.values import ConfigError, Name, fit, leaves, map_leaves, wanted

T = TypeVar("T")


def load(gin_files: Iterable[str], bindings: Iterable[str], root: Callable[..., T]) -> T:
    """`root()` with every field that the files and then the bindings (`NAME = VALUE`) set. Raises ConfigError."""
    builder = _Builder(_read(gin_files, bindings))
    try:
        result = builder.build(root, "", "", f"{root.__module__.rpartition('.')[2]}.{root.__qualname__}")
    except RecursionError as error:
        raise ConfigError("a reference or macro leads back to itself") from error
    builder.check_used()
    return result


def asked(gin_files: Sequence[str], bindings: Iterable[str]) -> str:
    """The files and the bindings as one gin file: a record of what was asked for. Raises ConfigError."""
    files = [f"# {path}\n{read_text(path)}" for path in gin_files]
    return "\n".join([*files, "# command line", *_read(gin_files, bindings).typed, ""])


def _read(gin_files: Iterable[str], bindings: Iterable[str]) -> Reader:
    reader = Reader()
    for path in gin_files:
        reader.read_file(path)
    reader.read_command_line(bindings)
    return reader


class _Builder:
    """Calls what the bindings bind, and remembers which of them it used."""

    def __init__(self, reader: Reader) -> None:
        self.bindings, self.macros = reader.bindings, reader.macros
        self.used: set[Any] = set()
        self.excused: set[Any] = set()  # (what, scope)
        self.calls: list[tuple[Any, str]] = []  # (target, scope)
        for binding, instead in reader.replaced:
            self._excuse(binding, binding.name.rpartition("/")[0], self._made(instead))

    def build(self, target: Callable[..., T], scope: str, where: str, name: str) -> T:
        """`target(**fields)` with the fields that are bound in `scope` or around it."""
        self.calls.append((target, scope))
        keys = self._bound(target, scope, self.bindings)
        in_files = self._bound(target, scope, (k for k, binding in self.bindings.items() if binding.in_file))
        parameters = inspect.signature(target).parameters
        required = (p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
        for field in required:
            if field not in keys:
                raise ConfigError(f"{where}{name} needs a value for {field}: bind {scoped(scope, name)}.{field}")
        hints = typing.get_type_hints(target)
        self.used |= set(keys.values())
        for field, key in in_files.items():  # what the command line alone stands before was not written in vain
            self.used.add(key)
            if keys[field] != key:
                self._excuse(self.bindings[key], scope, self._made(self.bindings[keys[field]]))
        fields = {f: self._value(self.bindings[key], scope, hints.get(f, Any)) for f, key in keys.items()}
        try:
            return target(**fields)
        except ValueError as error:
            raise ConfigError(f"{self._places(keys, str(error)) or where}{error}") from error

    def _places(self, keys: Mapping[str, Key], said: str) -> str:
        """The lines of the settings that an error names with their values or their class, else of the first whose word
        is in it; as a prefix of the error."""
        named = [key for field, key in keys.items() if re.search(rf"\.{field}\b|\b{field}=", said)]
        named = named or [key for field, key in keys.items() if re.search(rf"\b{field}\b", said)][:1]
        places = dict.fromkeys(self.bindings[key].where for key in named)
        return "".join(places) if len(places) < 2 else ", ".join(p.removesuffix(": ") for p in places) + ": "

    def _bound(self, target: Any, scope: str, keys: Iterable[Key]) -> dict[str, Key]:
        """Field -> which of `keys` sets it for `target` in `scope`."""
        mine = [key for key in keys if key.target is target]
        return {key.field: key for outer in _around(scope) for key in mine if key.scope == outer}

    def _excuse(self, binding: Binding, scope: str, made: Collection[Any]) -> None:
        """Takes as used what files set for this value in `scope`, in place of which the command line has another: but
        not for what that makes too (`made`), in a scope that may be misspelt."""

        def use(leaf: Any) -> None:
            if not isinstance(leaf, Name):
                return
            found: dict[Any, Binding] = {}
            inside, target = _called(leaf, binding)
            inner, macro = inside or scope, self.macros.get(leaf.text[1:])
            if leaf.text.startswith("%") and macro is not None:
                found = {leaf.text[1:]: macro}
            elif target is not None and target not in made:
                in_files = [key for key, other in self.bindings.items() if other.in_file]
                found = {key: self.bindings[key] for key in self._bound(target, inner, in_files).values()}
            for key, other in found.items():
                self.used.add(key)
                if (key, inner) not in self.excused:
                    self.excused.add((key, inner))
                    self._excuse(other, inner, made)

        map_leaves(use, binding.value)

    def _made(self, binding: Binding) -> set[Any]:
        """The classes that its value makes at once."""
        return {_called(leaf, binding)[1] for leaf in leaves(binding.value) if isinstance(leaf, Name)}

    def _value(self, binding: Binding, scope: str, hint: Any) -> Any:
        value = map_leaves(lambda leaf: self._evaluate(leaf, scope, binding.where), binding.value)
        try:
            return fit(value, hint)
        except TypeError as error:
            must = f"it must be {wanted(binding.value, hint)}"
            raise ConfigError(f"{binding.where}{binding.name} = {binding.value!r}, but {must}") from error

    def _evaluate(self, leaf: Any, scope: str, where: str) -> Any:
        if not isinstance(leaf, Name):
            return leaf
        if leaf.text.startswith("@"):
            inner, name, target = _reference(leaf, where)
            return self.build(target, inner or scope, where, name) if leaf.text.endswith("()") else target
        macro = self.macros.get(leaf.text[1:])
        if macro is None:
            raise ConfigError(f"{where}{leaf} is set nowhere{nearest(leaf.text[1:], self.macros)}")
        self.used.add(leaf.text[1:])
        return map_leaves(lambda part: self._evaluate(part, scope, macro.where), macro.value)

    def check_used(self) -> None:
        """Raises ConfigError for the first binding that reached no value."""
        for name, macro in self.macros.items():
            if name not in self.used:
                raise ConfigError(f"{macro.where}{name} is never used: no value is %{name}")
        for key, binding in self.bindings.items():
            if key in self.used:
                continue
            scopes = {outer for target, scope in self.calls if target is key.target for outer in _around(scope)}
            why = "nothing builds it"
            if key.scope in scopes:
                why = "an inner scope sets it wherever it is built"
            elif scopes:
                setting = binding.name.rpartition("/")[2]
                why += f" in that scope{nearest(binding.name, [scoped(s, setting) for s in sorted(scopes)])}"
            raise ConfigError(f"{binding.where}{binding.name} is never used: {why}")


def _called(leaf: Name, binding: Binding) -> tuple[str, Any]:
    """Scope and target of `@scope/name()` in a binding; of anything else no target."""
    if not (leaf.text.startswith("@") and leaf.text.endswith("()")):
        return "", None
    scope, _, target = _reference(leaf, binding.where)
    return scope, target


def _reference(leaf: Name, where: str) -> tuple[str, str, Any]:
    """Scope, name and target of `@scope/name` or `@scope/name()`."""
    scope, _, name = leaf.text[1:].removesuffix("()").rpartition("/")
    return scope, name, resolve(name, leaf.symbols, where)


def operative(value: Any) -> str:
    """A dataclass with all that it holds as a gin file, defaults included; `load` makes an equal one of it.

    A field whose value has no name in a module (what `@optax.scale_by_lion()` returns) is a comment.
    """
    imports: dict[str, str] = {}
    lines: list[str] = []
    _write_fields(value, "", imports, lines)
    return "\n".join([*imports.values(), "", *lines, ""])


def _write_fields(value: Any, scope: str, imports: dict[str, str], lines: list[str]) -> None:
    name = scoped(scope, _write_name(type(value), imports))
    fields = [field for field in dataclasses.fields(value) if field.init]
    inner: list[str] = []
    for field in fields:
        path = scoped(scope, field.name)
        try:
            lines.append(f"{name}.{field.name} = {_write(getattr(value, field.name), path, imports, inner)}")
        except ConfigError as error:
            lines.append(f"# {name}.{field.name}: {error}")
    lines += inner


def _write(value: Any, scope: str, imports: dict[str, str], lines: list[str]) -> str:
    """`value` in gin's syntax; what a reference in it stands for goes to `lines`, each in a scope of its own."""
    if isinstance(value, (list, tuple)):
        items = [_write(item, f"{scope}_{i}", imports, lines) for i, item in enumerate(value)]
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({''.join(f'{item}, ' for item in items)})"
    if isinstance(value, dict):
        pairs = (f"{key!r}: {_write(v, f'{scope}_{i}', imports, lines)}" for i, (key, v) in enumerate(value.items()))
        return f"{{{', '.join(pairs)}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        _write_fields(value, scope, imports, lines)
        return f"@{scope}/{_write_name(type(value), imports)}()"
    if callable(value) and "<" not in value.__qualname__:  # not made inside of a function
        return f"@{_write_name(value, imports)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ConfigError(f"a {type(value).__name__} made at run time has no name that a gin file could write")


def _write_name(target: Any, imports: dict[str, str]) -> str:
    """What a gin file calls a class or function; adds the import."""
    parent, _, module = target.__module__.rpartition(".")
    statement = f"from {parent} import {module}" if parent else f"import {module}"
    if imports.setdefault(module, statement) != statement:
        module = target.__module__.replace(".", "_")
        imports[module] = f"import {target.__module__} as {module}"
    return f"{module}.{target.__qualname__}"


def _around(scope: str) -> list[str]:
    """The scopes that `scope` lies in, from the outermost ("") to itself."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:i]) for i in range(len(parts) + 1)]
