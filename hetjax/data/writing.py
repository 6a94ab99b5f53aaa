"""What a template makes of a conversation: a text in the marks of `Script`, of which some pieces are trained on."""

import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from hetjax.data import jinja, problems
from hetjax.data.items import ItemSpec
from hetjax.data.problems import SampleError
from hetjax.data.script import JOIN, Script
from hetjax.data.settings import ChatTemplate, Template

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
Messages = list[dict[str, Any]]
Stretches = Sequence[tuple[int, int]]


class Piece(NamedTuple):
    """A part of the text, in the script's marks."""

    text: str
    trained: bool


class Written(NamedTuple):
    """A conversation, or a prompt if it ends on a question."""

    pieces: Sequence[Piece]
    special: bool = False  # whether the tokenizer adds its own special tokens


class Writer(Protocol):
    """How conversations are written. `split`: a conversation is trained on as one for each of its answers."""

    @property
    def script(self) -> Script: ...

    @property
    def split(self) -> bool: ...

    def write(self, turns: Sequence[str], shown: Sequence[ItemSpec], system: str | None) -> Written:
        """Question, answer, question, ...; the placeholders of `shown` are pictures and clips. Raises SampleError."""
        ...


class PlainWriter:
    """By the few texts of a `Template`. An answer begins a token of its own, as it does when it is generated."""

    split = False

    def __init__(self, template: Template, script: Script) -> None:
        self.template, self.script = template, script
        self._asked = script.meant(template.human_suffix) + joint(template, script)

    def write(self, turns: Sequence[str], shown: Sequence[ItemSpec], system: str | None) -> Written:
        """As `Writer`."""
        return Written(tuple(self._pieces(turns, [item.placeholder for item in shown], system)))

    def _pieces(self, turns: Sequence[str], shown: Sequence[str], system: str | None) -> Iterator[Piece]:
        t, meant, plain = self.template, self.script.meant, self.script.plain
        opening = meant(t.start + t.human_prefix)
        if system is not None:
            opening = meant(t.start + t.system_prefix) + plain(system) + meant(t.system_suffix + t.human_prefix)
        for number, turn in enumerate(turns):
            if number % 2:
                yield Piece(plain(turn) + meant(t.end_token), True)
            else:
                yield Piece(opening + plain(turn, shown) + self._asked, False)
                opening = meant(t.answer_suffix + t.human_prefix)


def joint(template: Template, script: Script) -> str:
    """What parts a prompt from the answer behind it: JOIN if a token could reach over, else nothing."""
    return JOIN if script.merges_behind(script.meant(template.human_suffix)) else ""


class TypedWriter:
    """For a model without a template: the one question as it is typed, special tokens among it."""

    split = False

    def __init__(self, script: Script) -> None:
        self.script = script

    def write(self, turns: Sequence[str], shown: Sequence[ItemSpec], system: str | None) -> Written:
        """As `Writer`."""
        if len(turns) > 1 or system is not None:
            what = "several turns" if system is None else "a system turn"
            raise SampleError("", f"it has {what}, and the model has no chat template")
        return Written((Piece(self.script.meant(turns[0]), False),), True)


class ChatWriter:
    """By a chat template, rendered as transformers does."""

    def __init__(self, template: ChatTemplate, script: Script) -> None:
        self.template, self.script = template, script
        self._date = datetime.date.fromisoformat(template.date) if template.date else datetime.date.today()
        self._takes_parts = functools.cache(self._probe)

    def write(self, turns: Sequence[str], shown: Sequence[ItemSpec], system: str | None) -> Written:
        """As `Writer`."""
        messages: Messages = [] if system is None else [self._message(SYSTEM, system, ())]
        messages += [
            self._message((USER, ASSISTANT)[n % 2], turn, shown if n % 2 == 0 else ()) for n, turn in enumerate(turns)
        ]
        text, marked = self._render(messages, asks=len(turns) % 2 == 1)
        answers: Stretches = marked
        if len(turns) % 2 == 0 and not jinja.GENERATION.search(self.template.text):
            answers = self._differences(messages, text)
        if len(turns) % 2 == 0 and not answers:
            raise SampleError("", "the chat template marks nothing in it with {% generation %}")
        first = self.template.names.get("bos_token")
        special = self.template.whole and not (first is not None and text.startswith(first))
        return Written(
            tuple(Piece(self.script.meant(piece), trained) for piece, trained in _cut(text, answers)), special
        )

    @functools.cached_property
    def split(self) -> bool:
        """Whether the template writes an answer otherwise once another turn follows: Qwen3 leaves its thinking out."""
        if jinja.GENERATION.search(self.template.text):
            return False
        talk = [self._message(role, text, ()) for role, text in zip([USER, ASSISTANT] * 2, PROBES, strict=True)]
        return not self._render(talk, asks=False).text.startswith(self._render(talk[:2], asks=False).text)

    def closing(self) -> str:
        """What the template puts behind an answer."""
        talk = [self._message(USER, "question", ()), self._message(ASSISTANT, "probe", ())]
        return self._render(talk, asks=False).text.rpartition("probe")[2]

    def _differences(self, messages: Messages, text: str) -> Stretches:
        """Where the answers lie, each up to its end token: behind what the template makes of all before it.

        Of a template that is `split` the last one alone."""
        found = []
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            if message["role"] != ASSISTANT or (self.split and not last):
                continue
            before = self._render(messages[:number], asks=True).text
            behind = text if last else self._render(messages[: number + 1], asks=False).text
            if not behind.startswith(before):
                self._check_opening(messages[:number], before, behind)
            if not (text.startswith(behind) and behind.startswith(before)):
                raise SampleError(
                    "",
                    "the chat template writes answers otherwise in longer conversations; mark them in it with "
                    "{% generation %}",
                )
            end = behind.find(self.template.end_token, len(before))
            found.append((len(before), len(behind) if end < 0 else end + len(self.template.end_token)))
        return found

    def _check_opening(self, asked: Messages, before: str, behind: str) -> None:
        """Raises SampleError if a prompt (`before`) opens its answer with what the conversation (`behind`) lacks."""
        talk = self._render(asked, asks=False).text
        if before.startswith(talk) and behind.startswith(talk):
            opening = problems.shown(before[len(talk) :])
            raise SampleError(
                "", f"the chat template opens answers with {opening}, but not this one; type a settings.Template"
            )

    def _render(self, messages: Messages, *, asks: bool) -> jinja.Rendered:
        try:
            return jinja.render(self.template.text, messages, self.template.names, date=self._date, asks=asks)
        except TemplateError as error:
            raise SampleError("", f"the chat template refuses it: {error}") from error

    def _message(self, role: str, text: str, shown: Sequence[ItemSpec]) -> dict[str, Any]:
        placed = {item.placeholder: item for item in shown}
        pieces = re.split(f"((?:{'|'.join(map(re.escape, placed))})\n?)", text) if placed else [text]
        if self._takes_parts(role):
            return {"role": role, "content": self._parts(pieces, placed)}
        return {"role": role, "content": "".join(map(functools.partial(self._literal, placed), pieces))}

    def _literal(self, placed: Mapping[str, ItemSpec], piece: str) -> str:
        """A piece of a text as it stands in a message; of a placeholder the model's token."""
        item = placed.get(piece.removesuffix("\n"))
        if item is None:
            return self.script.guarded(piece)
        token = self._token(item)
        return self.script.plain(piece.replace(item.placeholder, token), (token,))

    def _parts(self, pieces: Sequence[str], placed: Mapping[str, ItemSpec]) -> list[dict[str, str]]:
        """The parts of a message. Placeholders on lines of their own at its front are parts, and so are all that are no
        token of the model, with the line's end behind them; others stand in the text as they were typed."""
        parts: list[dict[str, str]] = []
        for piece in filter(None, pieces):
            item = placed.get(piece.removesuffix("\n"))
            leads = piece.endswith("\n") and all(part["type"] != "text" for part in parts)
            if item is not None and item.field in self.template.parts and (leads or self._token(item) not in piece):
                parts.append({"type": item.field, f"{item.field}_url": ""})
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += self._literal(placed, piece)
            else:
                parts.append({"type": "text", "text": self._literal(placed, piece)})
        return parts or [{"type": "text", "text": ""}]

    def _token(self, item: ItemSpec) -> str:
        return self.template.parts.get(item.field, item.placeholder)

    def _probe(self, role: str) -> bool:
        """Whether the template takes the content of a role as a list of parts, and not only as a text."""
        probe = {"role": role, "content": [{"type": "text", "text": "probe"}]}
        talk: Messages = [probe]
        if role != USER:
            asked = self._message(USER, "question", ())
            talk = [probe, asked] if role == SYSTEM else [asked, probe]
        try:
            text = self._render(talk, asks=role != ASSISTANT).text
        except SampleError:
            return False
        return "probe" in text and "'text'" not in text  # a list that is printed shows its keys


PROBES = ("one", "<think>\ntwo\n</think>\n\nthree", "four", "five")


def _cut(text: str, answers: Stretches) -> Iterator[tuple[str, bool]]:
    place = 0
    for start, end in answers:
        yield text[place:start], False
        yield text[start:end], True
        place = end
    yield text[place:], False


def make(template: Template | ChatTemplate | None, script: Script) -> Writer:
    """The writer of a template; None: of a model without one."""
    if template is None:
        return TypedWriter(script)
    return ChatWriter(template, script) if isinstance(template, ChatTemplate) else PlainWriter(template, script)
