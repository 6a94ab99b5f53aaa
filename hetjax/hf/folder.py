"""A Hugging Face folder as a source: config.json and safetensors, of which only headers are read before they are asked.

Pickle files (pytorch_model.bin) run code when they are loaded; they are refused, whatever is in them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hetjax.hf import keys, prompts, read_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.keys import BUFFERS, Place
from hetjax.hf.pattern import Index
from hetjax.hf.source import Array, Extras, Sliceable, read_json
from hetjax.hf.tensors import CODES, Tensor

# Arrays of which one field of config.json tells the number of rows
ROWS = {"first/embed": "vocab_size", "last/head": "vocab_size"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
)  # fmt: skip
GIVEN_BACK = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "chat_template.json", *TOKENIZER,
)  # fmt: skip


class Tensors:
    """Safetensors files by key. Raises ConvertError for a file that is damaged."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def slice(self, key: str) -> Any:
        """safetensors' own lazy tensor."""
        path = self._files[key]
        return self._handle(path).get_slice(key)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_file(path)
        return self._open[path]


def open_file(path: Path) -> Any:
    """An open safetensors file. Raises ConvertError."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        if _begins_as_pickle(path):
            raise _pickle(path) from error
        raise ConvertError(
            f"{path} cannot be read ({error}): the file is damaged or cut short; download it again"
        ) from error


def stored_tensor(path: Path, key: str, dtype: np.dtype | None = None) -> Tensor:
    """A tensor of a safetensors file, read when it is written again; in `dtype`, None as it is stored."""
    values = open_file(path).get_slice(key)
    kind = dtype or CODES[values.get_dtype()]
    read = lambda: open_file(path).get_tensor(key).astype(kind, copy=False)
    return Tensor(tuple(values.get_shape()), kind, read)


class Folder:
    """The source that reads a Hugging Face folder. Everything that can be wrong is, when it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json(path / "config.json")
        self.parts = read_config.read(config, str(path / "config.json"))
        self.models: Mapping[str, Any] = self.parts.models
        self._tie, _ = registry.tie(config)
        self._fields = {part: f"{field}." if field else "" for part, field in registry.fields(config).items()}
        self._places = keys.places(self.parts)
        files = _files(path)
        spelled: dict[str, str] = {}
        for key in files:
            name = keys.canonical(key, self.parts)
            if name in spelled:
                raise ConvertError(f"{path}: {key} and {spelled[name]} are the same array; remove one of them")
            spelled[name] = key
        self._tensors, self._spelled = Tensors(files), spelled
        for key in spelled:
            if not BUFFERS.fullmatch(key):
                self._dtype(key)
        wanted = {key for place in self._places.values() for key in place.keys}
        idle = [key for key in keys.idle(spelled, self.parts) if key not in wanted]
        self._check_keys(wanted, set(spelled) - set(idle))
        self.arrays = {name: self._check(name, place) for name, place in self._places.items()}
        named = sorted((path / prompts.NAMED).glob("*.jinja"))
        beside = {name: path / name for name in GIVEN_BACK if (path / name).is_file()}
        beside |= {f"{prompts.NAMED}{p.name}": p for p in named}
        mine = {key: files[spelled[key]] for key in idle}
        extras = Extras(config, beside, mine, {key: spelled[key] for key in idle})
        self.extras = dict.fromkeys(self.models, extras)

    def _check_keys(self, wanted: set[str], found: set[str]) -> None:
        llm = self.parts.llm
        if llm is not None and llm.tied:  # some files store the shared leaf twice
            head = keys.prefix(self.parts, "llm") + "lm_head.weight"
            if head in found:
                self._check_tie(head)
                found = found - {head}
        missing, surplus = sorted(wanted - found), sorted(k for k in found - wanted if not BUFFERS.fullmatch(k))
        if missing:
            hint = f"; set {self._tie}=true if the head is the embedding" if "lm_head" in missing[0] else ""
            raise ConvertError(
                f"{self.path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} keys are); the files do not "
                f"hold the model of config.json, get all of them again{hint}"
            )
        if surplus:
            raise ConvertError(
                f"{self.path}: {self._spelled[surplus[0]]} has no place in the model of config.json ({len(surplus)} "
                "such keys); check model_type and num_hidden_layers, and merge adapters into the weights first"
            )

    def _check_tie(self, head: str) -> None:
        embed = head.replace("lm_head.weight", "model.embed_tokens.weight")
        both = [self._tensors.slice(self._spelled[key]) for key in (head, embed)]
        if not np.array_equal(both[0][:], both[1][:]):
            raise ConvertError(
                f"{self.path}: {self._tie}=True, but {self._spelled[head]} differs from the embedding; "
                f"set each {registry.TIE} in config.json to false to take the stored head, or remove the key to tie it"
            )

    def _dtype(self, key: str) -> np.dtype:
        spelled = self._spelled[key]
        name = self._tensors.slice(spelled).get_dtype()
        if name not in CODES:
            raise ConvertError(
                f"{self.path}: {spelled} is stored as {name}; 8-bit and quantised weights are not read, take the "
                f"original model, or convert it to one of {', '.join(CODES)}"
            )
        return CODES[name]

    def _check(self, name: str, place: Place) -> Array:
        for spelled in (self._spelled[key] for key in place.keys):
            shape = tuple(self._tensors.slice(spelled).get_shape())
            if shape != place.torch_shape:
                module, _, rest = name.partition("/")
                field = f" ({self._fields[module]}{ROWS[rest]})" if rest in ROWS else ""
                raise ConvertError(
                    f"{self.path}: {spelled} has shape {list(shape)}, config.json{field} makes it "
                    f"{list(place.torch_shape)}; the two belong to different models"
                )
        dtypes = {self._dtype(key): self._spelled[key] for key in place.keys}
        if len(dtypes) > 1:
            both = " and ".join(f"{key} as {dtype}" for dtype, key in dtypes.items())
            raise ConvertError(f"{self.path} stores {both}, which are rows of one array here; give both one dtype")
        return Array(place.shape, next(iter(dtypes)))

    def fetch(self, names: Sequence[str]) -> dict[str, Sliceable]:
        """The arrays; nothing is read before they are sliced."""
        spelled = lambda place: [self._spelled[key] for key in place.keys]
        return {n: _Lazy(self._tensors, spelled(self._places[n]), self._places[n]) for n in names}


class _Lazy:
    """One array of ours inside safetensors files."""

    def __init__(self, tensors: Tensors, keys: Sequence[str], place: Place) -> None:
        self._tensors, self._keys, self._place = tensors, keys, place

    def __getitem__(self, index: Index) -> np.ndarray:
        if not self._place.by_row:
            return self._read(self._keys[0], index)
        return np.stack([self._read(key, index[1:]) for key in self._keys[index[0]]])

    def _read(self, key: str, index: Index) -> np.ndarray:
        pattern = self._place.pattern
        theirs, shape, kept = pattern.box(index, self._place.inner)
        tensor = self._tensors.slice(key)[theirs]
        assert tensor.size == math.prod(shape)
        return pattern.from_torch(tensor, shape)[kept]


def _files(path: Path) -> dict[str, Path]:
    """Key, as the files spell it -> its file."""
    if (path / SINGLE).is_file():
        return dict.fromkeys(open_file(path / SINGLE).keys(), path / SINGLE)
    if not (path / INDEX).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise _pickle(path / pickles[0])
        raise ConvertError(f"{path}: neither {SINGLE} nor {INDEX}; name a folder that holds the weights")
    mapping = read_json(path / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise ConvertError(f"{path / INDEX} has no weight_map of keys and file names; get the file again")
    found: dict[str, Path] = {}
    for name in sorted(set(mapping.values())):
        if Path(name).name != name or not (path / name).is_file():
            raise ConvertError(f"{path / INDEX} names {name}, which is not there; get all shards of the model")
        keys_there = open_file(path / name).keys()
        for key in keys_there:
            if key in found:
                raise ConvertError(f"{path}: {key} is in {found[key].name} and in {name}; the shards are of two models")
            found[key] = path / name
    for key in sorted(mapping.keys() | found.keys()):
        if key not in mapping or key not in found or found[key].name != mapping[key]:
            side = f"is not in {mapping[key]}" if key in mapping else f"is in {found[key].name} alone"
            raise ConvertError(f"{path / INDEX}: {key} {side}; index and shards belong to different models")
    return found


def _begins_as_pickle(path: Path) -> bool:
    """Whether the file is one of pickle or torch.save, whatever its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _pickle(path: Path) -> ConvertError:
    return ConvertError(
        f"{path} is a pickle, which runs code when it is loaded, and is never read here; load it with transformers "
        "where you trust it, and save_pretrained(..., safe_serialization=True)"
    )
