"""From a prompt to token ids, exactly as the model's training or its processor made them.

`RunChat` is a run's own template. `FolderChat` is that of a Hugging Face folder: its chat_template, rendered as
transformers does, in which each placeholder becomes as many tokens as its picture or clip takes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer

from hetjax.data import ItemSpec, Template
from hetjax.data.items import Item
from hetjax.data.problems import SampleError
from hetjax.data.tokens import Speller
from hetjax.generate import jinja
from hetjax.generate.prompt import Prompt, missing_placeholders

Found = Mapping[str, Sequence[Item]]
HF_ROLES = ("user", "assistant")


class Ids(NamedTuple):
    """A prompt as positions, and for each item's name the first position of each of its items."""

    tokens: list[int]
    starts: Mapping[str, Sequence[int]]


class Chat(Protocol):
    """How prompts become positions."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def items(self) -> tuple[ItemSpec, ...]: ...

    def encode(self, prompt: Prompt, found: Found) -> Ids:
        """The prompt's positions, `found` in the places of its files. Raises ValueError."""
        ...


class RunChat:
    """The template and tokenizer that a run was trained with."""

    def __init__(self, tokenizer: Tokenizer, template: Template, items: Sequence[ItemSpec]) -> None:
        self.tokenizer, self.template, self.items = tokenizer, template, tuple(items)
        self._speller = Speller(tokenizer, items, template)

    def encode(self, prompt: Prompt, found: Found) -> Ids:
        """As `Chat`."""
        turns = _in_front(prompt, self.items)
        rows = {name: [item.rows for item in some] for name, some in found.items()}
        try:
            tokens, _, starts = self._speller.spell(turns, rows, system=prompt.system)
        except SampleError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
        return Ids(tokens, starts)


class FolderChat:
    """The tokenizer of a folder and its template (None: a question is taken as it is).

    `specials`: the names that templates use ("bos_token") -> text. `processor`: whether transformers would make the
    prompt with a processor, which lets the tokenizer add its special tokens unless the template wrote the first one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        items: Sequence[ItemSpec],
        *,
        specials: Mapping[str, str],
        processor: bool,
    ) -> None:
        self.tokenizer, self.template, self.items = tokenizer, template, tuple(items)
        self.specials, self.processor = specials, processor

    def encode(self, prompt: Prompt, found: Found) -> Ids:
        """As `Chat`."""
        if self.template is None:
            if len(prompt.turns) > 1 or prompt.system is not None:
                what = "several turns" if prompt.system is None else "a system turn"
                raise ValueError(f"prompt {prompt.id!r} has {what}, and the model has no chat template")
            text, special = _in_front(prompt, self.items)[0], True
        else:
            text = self._render(prompt)
            bos = self.specials.get("bos_token")
            special = self.processor and not (bos is not None and text.startswith(bos))
        for item in self.items:
            before, *behind = text.split(item.placeholder)
            if len(behind) != len(found[item.name]):
                raise ValueError(
                    f"the chat template made {len(behind)} {item.placeholder} of {len(found[item.name])} "
                    f"{item.field} file(s); write each {item.placeholder} into the prompt"
                )
            rows = [f.rows for f in found[item.name]]
            text = before + "".join(item.placeholder * n + rest for n, rest in zip(rows, behind, strict=True))
        tokens = self.tokenizer.encode(text, add_special_tokens=special).ids
        return Ids(tokens, {item.name: self._starts(tokens, item, found[item.name]) for item in self.items})

    def _starts(self, tokens: Sequence[int], item: ItemSpec, found: Sequence[Item]) -> list[int]:
        token = self.tokenizer.token_to_id(item.placeholder)
        places = [place for place, t in enumerate(tokens) if t == token]
        wanted = sum(f.rows for f in found)
        if len(places) != wanted:
            raise ValueError(
                f"the model's tokenizer makes {len(places)} {item.placeholder} of {wanted}; another spelling in the "
                "prompt gives the same token, or a longer token holds some: change the text beside the placeholders"
            )
        starts, taken = [], 0
        for one in found:
            starts.append(places[taken])
            taken += one.rows
        return starts

    def _render(self, prompt: Prompt) -> str:
        assert self.template is not None
        turns: list[Any] = list(prompt.turns)
        lacking = missing_placeholders(prompt, self.items)
        if self._takes_parts:
            parts = [{"type": item.field, f"{item.field}_url": ""} for item in lacking]
            turns = [[{"type": "text", "text": turn}] for turn in turns]
            turns[0] = parts + turns[0]
        else:
            turns = list(_in_front(prompt, self.items))
        messages = [{"role": HF_ROLES[n % 2], "content": turn} for n, turn in enumerate(turns)]
        if prompt.system is not None:
            content = [{"type": "text", "text": prompt.system}] if self._takes_parts else prompt.system
            messages.insert(0, {"role": "system", "content": content})
        try:
            return jinja.render(self.template, messages, self.specials)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses the prompt: {error}") from error

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template takes a message's content as a list of parts, and not only as a text."""
        assert self.template is not None
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            text = jinja.render(self.template, probe, self.specials)
        except TemplateError:
            return False
        return "probe" in text and "'text'" not in text  # a list that is printed shows its keys


def _in_front(prompt: Prompt, items: Sequence[ItemSpec]) -> tuple[str, ...]:
    """The turns, with each missing placeholder on a line of its own before the first question."""
    front = "".join(f"{item.placeholder}\n" for item in missing_placeholders(prompt, items))
    return (front + prompt.turns[0], *prompt.turns[1:])
