"""Chat templates of Hugging Face folders, in a sandbox: they are code that came with a download.

They run as in transformers: with its filters, globals, tags and names, and everything that a message holds.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hetjax.data.script import CLOSE, OPEN

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


class Rendered(NamedTuple):
    """A text, and the stretches of it (start, end) that {% generation %} marks."""

    text: str
    answers: tuple[tuple[int, int], ...]


class _Generation(Extension):
    """{% generation %} marks what is trained on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside, between two marks."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (OPEN, CLOSE))
        return [next(marks), nodes.Scope(inside).set_lineno(line), next(marks)]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    specials: Mapping[str, str],
    *,
    date: datetime.date | None = None,
    asks: bool = True,
) -> Rendered:
    """The text of the messages; `asks`: with an answer's opening behind it. `date`: of strftime_now, None: today.

    Raises jinja2.TemplateError.
    """
    now = datetime.datetime.now() if date is None else datetime.datetime.combine(date, datetime.time())
    names = dict(messages=messages, tools=None, documents=None, add_generation_prompt=asks, strftime_now=now.strftime)
    try:
        marked = _compiled(template).render(**names, **specials)
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template is a program, and fails as programs do
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
    return _without_marks(marked)


def date_formats(template: str) -> list[str]:
    """The formats in which the template writes the date of today."""
    calls = _environment().parse(template).find_all(nodes.Call)
    asked = [call.args for call in calls if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now"]
    return list(dict.fromkeys(args[0].value for args in asked if args and isinstance(args[0], nodes.Const)))


def _without_marks(marked: str) -> Rendered:
    text, answers, start = "", [], 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            start = len(text)
        elif piece == CLOSE:
            answers.append((start, len(text)))
        else:
            text += piece
    return Rendered(text, tuple(answers))


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    return env


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
