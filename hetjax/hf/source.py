"""What parameters are read from: a Hugging Face folder, a converted checkpoint, or a training run's workdir.

All three tell which models they hold and the shape of every array, and give any range of any array.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hetjax.hf.errors import ConvertError
from hetjax.hf.pattern import Index


class Array(NamedTuple):
    """Shape and dtype of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Sliceable(Protocol):
    """An array of which any range can be had."""

    def __getitem__(self, index: Index) -> np.ndarray: ...


class Extras(NamedTuple):
    """What a folder holds beside parameters of ours, to be given back on export."""

    config: dict[str, Any] | None = None  # the source's config.json
    files: Mapping[str, Path] = {}  # tokenizer, processor and the like, by name
    idle: Mapping[str, Path] = {}  # tensors that no model of ours reads: key in layout A -> safetensors file
    spelled: Mapping[str, str] = {}  # key in layout A -> key in its file, where that differs


class Source(Protocol):
    """`path` is for messages. `models`: module name -> config. `arrays` are named "llm/layers/0003/attention/q"."""

    @property
    def path(self) -> Path: ...

    @property
    def models(self) -> Mapping[str, Any]: ...

    @property
    def arrays(self) -> Mapping[str, Array]: ...

    @property
    def extras(self) -> Mapping[str, Extras]:
        """Module name -> what came with it."""
        ...

    def fetch(self, names: Sequence[str]) -> Mapping[str, Sliceable]:
        """The arrays, read as they are sliced or at once."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConvertError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}; get the file again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds a {type(value).__name__}, not a JSON object; get the file again")
    return value
