"""From a prompt to token ids, exactly as the model's training or its processor made them.

`RunChat` has the template of a run. `FolderChat` has that of a Hugging Face folder: its chat template, rendered as
transformers does, in which each placeholder becomes as many tokens as its picture or clip takes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from hetjax.data import ChatTemplate, ItemSpec, Template
from hetjax.data.items import Item
from hetjax.data.problems import SampleError
from hetjax.data.tokens import Speller
from hetjax.generate.prompt import Prompt, placed

Found = Mapping[str, Sequence[Item]]


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

    def __init__(self, tokenizer: Tokenizer, template: Template | ChatTemplate, items: Sequence[ItemSpec]) -> None:
        self.tokenizer, self.items = tokenizer, tuple(items)
        self._speller = Speller(tokenizer, items, template)

    def encode(self, prompt: Prompt, found: Found) -> Ids:
        """As `Chat`."""
        return _spelled(self._speller, prompt, self.items, found)


class FolderChat:
    """The tokenizer of a folder and its template (None: a question is taken as it is). Placeholders are its tokens.

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
        date: str | None = None,
    ) -> None:
        self.tokenizer, self.items = tokenizer, tuple(items)
        parts = {item.field: item.placeholder for item in items}
        chat = None if template is None else ChatTemplate(template, "", specials, parts, whole=processor, date=date)
        self._speller = Speller(tokenizer, items, chat)

    def encode(self, prompt: Prompt, found: Found) -> Ids:
        """As `Chat`; the token of an item stands at its positions."""
        ids = _spelled(self._speller, prompt, self.items, found)
        for item in self.items:
            token = self.tokenizer.token_to_id(item.placeholder)
            assert token is not None  # the folder's config names it
            for start, one in zip(ids.starts[item.name], found[item.name], strict=True):
                ids.tokens[start : start + one.rows] = [token] * one.rows
        return ids


def _spelled(speller: Speller, prompt: Prompt, items: Sequence[ItemSpec], found: Found) -> Ids:
    rows = {name: [item.rows for item in some] for name, some in found.items()}
    try:
        tokens, _, starts = speller.spell(placed(prompt, items), rows, system=prompt.system)
    except SampleError as error:
        raise ValueError(f"prompt {prompt.id or prompt.turns[-1]!r}: {error}") from error
    return Ids(tokens, starts)
