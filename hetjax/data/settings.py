"""What the data of a run are: settings that check themselves. None of them is a layout, and none is taken from one."""

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path

from hetjax.data.paths import expanded

ON_BAD_ITEM = ("skip", "stop")
ON_LONG = ("truncate", "skip")


class DataError(ValueError):
    """What is wrong with the data themselves; names the file or the sample, and the way out."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation. Trained on: each answer and the `end_token` behind it.

        start, then per exchange: human_prefix question human_suffix answer end_token, with answer_suffix between two

    A conversation with a system turn has system_prefix system system_suffix behind `start`.
    ChatML: human_prefix="<|im_start|>user\\n", human_suffix="<|im_end|>\\n<|im_start|>assistant\\n",
    end_token="<|im_end|>", answer_suffix="\\n", system_prefix="<|im_start|>system\\n", system_suffix="<|im_end|>\\n".
    """

    start: str = ""
    human_prefix: str = ""
    human_suffix: str = "\n"
    end_token: str = "<end>"  # one token of the vocabulary
    answer_suffix: str = ""
    system_prefix: str = ""
    system_suffix: str = "\n"

    def __post_init__(self) -> None:
        if not self.end_token:
            raise ValueError("Template.end_token is empty; name the tokenizer's end-of-answer token, such as '</s>'")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a folder, as `pretrained.template` reads it.

    Trained on: what it marks with {% generation %}; without such marks each answer, up to the `end_token` behind it.
    """

    text: str  # in jinja
    end_token: str  # one token of the vocabulary
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # bos_token and the like -> token
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # type of a part (image) -> its token
    whole: bool = False  # a processor's, which lets the tokenizer add its special tokens unless the first is there
    date: str | None = None  # that the template may write, such as 2026-11-27; None: of the day on which a run starts

    def __post_init__(self) -> None:
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"date={self.date!r}: {error}; write it as 2026-11-27") from error


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations with pictures and clips, and the fixed shape of the microbatches made of them. Epochs never end."""

    path: str  # conversations: .json (a list) or .jsonl (one conversation a line)
    seq_len: int  # positions in a row
    samples_per_group: int  # rows in a group
    groups: int = 1  # equal parts of a microbatch; the language model's dp divides it
    media_root: str | None = None  # what names of pictures and clips are relative to; None: the directory of `path`
    tokenizer: str | None = None  # a Hugging Face tokenizer.json; None: tokenizer.json beside `path`
    template: Template | ChatTemplate = Template()
    seed: int = 0  # of the order
    shuffle: bool = True
    pack: bool = False  # several samples in one row, first fit; False: one sample a row
    lookahead: int = 16  # samples that may wait for the next microbatch while later ones still fit into this one
    on_bad_item: str = "skip"  # a sample that is malformed or has a bad file: skip (named and counted) or stop
    on_long: str = "truncate"  # a sample of more than seq_len positions: truncate or skip; both are counted
    workers: int = 4  # threads that tokenise and read files
    prefetch: int = 2  # microbatches prepared ahead; 0: none, and no background thread

    def __post_init__(self) -> None:
        for name in ("path", "media_root", "tokenizer"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, expanded(getattr(self, name)))
        if Path(self.path).suffix.lower() not in (".json", ".jsonl"):
            raise ValueError(f"DataConfig.path={self.path!r}; it must name a .json or .jsonl file of conversations")
        least = dict(seq_len=2, samples_per_group=1, groups=1, seed=0, lookahead=1, workers=1, prefetch=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)}; it must be at least {low}")
        for name, choices in dict(on_bad_item=ON_BAD_ITEM, on_long=ON_LONG).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    @property
    def samples(self) -> int:
        """Rows of a microbatch."""
        return self.groups * self.samples_per_group

    @property
    def media_path(self) -> Path:
        """The directory that names of pictures and clips are relative to."""
        return Path(self.path).parent if self.media_root is None else Path(self.media_root)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that is read."""
        return Path(self.path).with_name("tokenizer.json") if self.tokenizer is None else Path(self.tokenizer)
