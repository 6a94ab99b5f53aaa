"""What the data of a run are: settings that check themselves. None of them is a layout, and none is taken from one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

ON_BAD_ITEM = ("skip", "stop")
ON_LONG = ("truncate", "skip")


class DataError(ValueError):
    """What is wrong with the data themselves; names the file or the sample, and the way out."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation. Trained on: each answer and the `end_token` behind it.

        start, then per exchange: human_prefix question human_suffix answer end_token, with answer_suffix between two

    ChatML: human_prefix="<|im_start|>user\\n", human_suffix="<|im_end|>\\n<|im_start|>assistant\\n",
    end_token="<|im_end|>", answer_suffix="\\n".
    """

    start: str = ""
    human_prefix: str = ""
    human_suffix: str = "\n"
    end_token: str = "<end>"  # one token of the vocabulary
    answer_suffix: str = ""

    def __post_init__(self) -> None:
        if not self.end_token:
            raise ValueError("Template.end_token is empty; name the tokenizer's end-of-answer token, such as '</s>'")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations with pictures, and the fixed shape of the microbatches made of them. Epochs never end."""

    path: str  # LLaVA JSON: .json (a list) or .jsonl (one conversation a line)
    seq_len: int  # positions in a row
    samples_per_group: int  # rows in a group
    groups: int = 1  # equal parts of a microbatch; the language model's dp divides it
    image_root: str | None = None  # what picture names are relative to; None: the directory of `path`
    tokenizer: str | None = None  # a Hugging Face tokenizer.json; None: tokenizer.json beside `path`
    template: Template = Template()
    seed: int = 0  # of the order
    shuffle: bool = True
    pack: bool = False  # several samples in one row, first fit; False: one sample a row
    lookahead: int = 16  # samples that may wait for the next microbatch while later ones still fit into this one
    on_bad_item: str = "skip"  # a sample that is malformed or lacks a picture: skip (it is named and counted) or stop
    on_long: str = "truncate"  # a sample of more than seq_len positions: truncate or skip; both are counted
    workers: int = 4  # threads that tokenise and read pictures
    prefetch: int = 2  # microbatches prepared ahead; 0: none, and no background thread

    def __post_init__(self) -> None:
        if Path(self.path).suffix not in (".json", ".jsonl"):
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
    def picture_root(self) -> Path:
        """The directory that picture names are relative to."""
        return Path(self.path).parent if self.image_root is None else Path(self.image_root)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that is read."""
        return Path(self.path).with_name("tokenizer.json") if self.tokenizer is None else Path(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class ItemSpec:
    """What an encoder asks of the data: how pictures are read, and how many there is room for."""

    name: str  # of the encoder; its arrays are f"{name}.index" and f"{name}.pixels"
    rows: int  # positions of the sequence that one picture takes
    height: int  # pixels
    width: int  # pixels
    slots_per_group: int = 1  # pictures that a group has room for
    field: str = "image"  # key of the JSON that names the pictures
    placeholder: str = "<image>"  # stands for one picture in a question
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in 0..1, taken off
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # then divided by

    def __post_init__(self) -> None:
        for name in ("rows", "height", "width", "slots_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)}; it must be at least 1")
        for name in ("field", "placeholder"):
            if not getattr(self, name):
                raise ValueError(f"{self.name}: {name} is empty; give it a name, such as 'image' or '<image>'")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)}; give one number for each of R, G, B")
        if min(self.std) <= 0:
            raise ValueError(f"{self.name}: std={self.std}; pixels are divided by it, so each must be above 0")


def check_items(config: DataConfig, items: Sequence[ItemSpec]) -> None:
    """Raises ValueError unless the items can be told apart and one fits into a row."""
    for what in ("name", "field", "placeholder"):
        values = [getattr(item, what) for item in items]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{what} {value!r} is used by {values.count(value)} encoders; give each its own")
    for item in items:
        for other in items:
            if item is not other and item.placeholder in other.placeholder:
                raise ValueError(
                    f"{item.name}: placeholder {item.placeholder!r} is part of {other.name}'s {other.placeholder!r}; "
                    "choose texts that do not contain each other"
                )
        for name, text in dataclasses.asdict(config.template).items():
            if item.placeholder in text:
                raise ValueError(f"Template.{name}={text!r} contains {item.name}'s placeholder; leave it to questions")
        if item.rows + 2 > config.seq_len:
            raise ValueError(
                f"DataConfig.seq_len={config.seq_len} is too short: one picture of {item.name} takes {item.rows} "
                f"positions, with a question and an answer at least {item.rows + 2}; raise seq_len or shrink pictures"
            )
