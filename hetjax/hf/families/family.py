"""What a family of models tells of itself."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hetjax.hf.fields import Config, nonzero
from hetjax.hf.parts import Parts
from hetjax.run.experiment import Encoder

# Our name, without module and the layer's number ("layers/attention/q") -> (key, pattern). In a key N is the layer's
# number, and E that of an expert, each of which is a tensor of its own and one row of our array.
Table = Mapping[str, tuple[str, str]]
VECTOR, LINEAR, HEADS, HEAD_BIAS = "a -> a", "i o -> o i", "d h k -> (h k) d", "h k -> (h k)"
NO_KEY = re.compile(r"(?!)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that a folder holds alone, or a `Whole` inside. Keys are those of the hub."""

    kind: str  # model_type of its config
    part: str  # llm, vision or audio
    classes: tuple[str, ...]  # that hold it alone; the first is written where no source names another
    holds: Callable[[Any], bool]  # whether a model of ours of this part belongs to this family
    keys: Table
    read: Callable[..., Any]  # (config, where, **settings that the config leaves open) -> model; raises ValueError
    write: Callable[[Any], dict[str, Any]]  # model -> config; raises ConvertError for what the family does not compute
    prefix: str = ""  # of its keys, where it is alone
    canonical: Callable[[str], str] = lambda key: key  # another spelling of a key, where it is alone -> the hub's
    idle: re.Pattern[str] = NO_KEY  # keys behind the prefix that no model of ours reads
    beside: re.Pattern[str] = NO_KEY  # keys of other models in a folder where it is alone
    pair: str | None = None  # model_type of folders that hold it and a text tower beside it
    pair_fields: tuple[str, ...] = ("vision_config",)  # there, of which the first that is given counts
    bare: Mapping[str, str] = dataclasses.field(default_factory=dict)  # class -> what its keys lack at the front
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # field of transformers 5 -> of 4
    resized: tuple[str, ...] = ()  # settings, fields of the config too, that a run may have otherwise than its source
    # the fields of a config that transformers applies in training alone, and we do not
    unapplied: Callable[[Config], dict[str, Any]] = lambda config: nonzero(config, "attention_dropout")
    # (model, keys that came behind its prefix) -> (the model without what did not come, constants in its place)
    shortened: Callable[[Any, Collection[str]], tuple[Any, Mapping[str, tuple[tuple[int, ...], float]]]] = (
        lambda model, came: (model, {})
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """A kind of language model with an encoder, each of another family."""

    kind: str  # model_type
    architecture: str  # its class
    encoder: str  # vision or audio
    item: str  # image or audio: so the field of the token that stands for a row begins
    fields: Mapping[str, str]  # module -> field of its config
    defaults: Mapping[str, Config]  # module -> its config where the field is absent
    kinds: tuple[str, ...]  # of its encoder
    holders: Mapping[str, str]  # module -> what stands before its keys
    projector: Table
    ties: bool  # whether its class in transformers 5 ties the head; where not, a tied head needs its own copy
    choices: Callable[[Config, str], dict[str, Any]]  # (config, where) -> settings of the encoder that it holds
    write: Callable[[Parts], dict[str, Any]]  # its own fields
    check: Callable[[Parts], None]  # raises ConvertError unless the class computes what the models do
    chat_template: str | None  # of its processor's class, where a folder has none
    processor: Callable[[Encoder], dict[str, Any]]  # files that process items and prompts as a run's loader does
    serves: Callable[[Encoder, Mapping[str, Path]], bool]  # whether files that came along do so
