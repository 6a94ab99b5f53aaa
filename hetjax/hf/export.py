"""Writes a Hugging Face folder that transformers 4.57 and 5 both open, from a checkpoint or a training run.

Tensors that our models lack come from the folder that the run started with. A tower trained here gets its last norm as
the identity (no vision-language model reads it), its layers behind `feature_layer` are left out, and features are taken
from the last layer that is there, which is the same layer. So does a tower that came alone, of which a run leaves
layers out.
"""

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hetjax.hf import keys, processor, tensors, vocabulary, write_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.folder import INDEX, SINGLE, stored_tensor
from hetjax.hf.output import write_json, written
from hetjax.hf.parts import PART_OF, Parts
from hetjax.hf.source import Extras, Sliceable, Source
from hetjax.hf.stored import Workdir
from hetjax.hf.tensors import Tensor
from hetjax.run.experiment import Experiment

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of "5GB"."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise ConvertError(f"--max_shard_size={text}; write a whole number, at least 1, and KB, MB or GB: 5GB, 500MB")
    return int(match[1]) * SIZES[match[2]]


def to_hf(
    source: Source,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    modules: Collection[str] | None = None,
) -> None:
    """Writes the folder `out`. `dtype` None keeps that of the source, `modules` None takes all. Raises ConvertError."""
    plan = _plan(source, dtype, modules)
    found = find_tensors(source, dtype, plan.parts, plan.named) | plan.kept
    models, found = vocabulary.grown(plan.parts, found, plan.beside.item_token)
    precision = next(name for name, d in DTYPES.items() if d == next(iter(found.values())).dtype)
    config = plan.config(models, precision)
    (architecture, *_), (model, *_) = config.get("architectures") or [""], models.models.values()
    lacking = registry.family_of(model).bare.get(architecture, "")
    with written(out) as new:
        new.mkdir()
        _write_shards({key.removeprefix(lacking): t for key, t in found.items()}, new, max_shard_bytes)
        write_json(new / "config.json", config)
        for name, path in plan.beside.copied.items():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / name)
        for name, value in plan.beside.made.items():
            if isinstance(value, str):
                (new / name).write_text(value, "utf-8")
            else:
                write_json(new / name, value)


class _Plan(NamedTuple):
    """An export before the values of its tensors."""

    parts: Parts
    named: dict[str, str]  # module of the folder -> of the source
    kept: dict[str, Tensor]  # what no model of ours holds
    beside: processor.Beside
    sources: dict[str, dict[str, Any]]  # part -> the config.json that it came with

    def config(self, models: Parts, precision: str) -> dict[str, Any]:
        """config.json of `models`, the parts as they are written."""
        return write_config.write(models, dtype=precision, item_token=self.beside.item_token, sources=self.sources)


def _plan(source: Source, dtype: str | None, modules: Collection[str] | None) -> _Plan:
    parts, named = parts_of(source, modules)
    parts, extras, kept = _with_idle(parts, named, source, dtype)
    sources = {part: found.config for part, found in extras.items() if found.config is not None}
    return _Plan(parts, named, kept, processor.find(source, parts, named, extras), sources)


def refusal(run: Experiment, workdir: Path) -> str:
    """Why `to_hf` would refuse what `run` leaves in `workdir`; "" if it would not."""
    try:
        plan = _plan(Workdir(workdir, run), None, None)
        plan.config(vocabulary.wider(plan.parts, plan.beside.item_token), run.param_dtype)
    except ConvertError as error:
        return str(error)
    return ""


def to_torch(
    source: Source, out: str | Path, *, dtype: str | None = None, modules: Collection[str] | None = None
) -> None:
    """Writes one file, .safetensors or .pt, of the tensors by their keys in the hub's layout. Raises ConvertError."""
    if Path(out).suffix not in (".safetensors", ".pt"):
        raise ConvertError(f"--out={out}: a state dict is a .safetensors or a .pt file")
    parts, named = parts_of(source, modules)
    found = find_tensors(source, dtype, parts, named)
    if Path(out).suffix == ".safetensors":
        with written(out) as new:
            tensors.write(new, found)
        return
    try:
        import torch  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConvertError(
            f"--out={out} needs torch: pip install torch==2.13.0, or write .safetensors, which needs none"
        ) from error

    def as_torch(values: np.ndarray) -> Any:  # shares the memory; numpy's bfloat16 is none of torch's
        values = np.require(values, requirements="W")
        bits = values.dtype == DTYPES["bfloat16"]
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(values)

    with written(out) as new:
        torch.save({key: as_torch(tensor.read()) for key, tensor in found.items()}, new)


def parts_of(source: Source, modules: Collection[str] | None = None) -> tuple[Parts, dict[str, str]]:
    """The models as a Hugging Face class holds them, and its module -> the source's: of `modules`, None of all.

    Raises ConvertError if there is no such class."""
    for name in modules or ():
        if name not in source.models:
            raise ConvertError(f"--modules names {name!r}; {source.path} holds {', '.join(source.models)}")
    chosen = {name: model for name, model in source.models.items() if modules is None or name in modules}
    named: dict[str, str] = {}
    for name, model in chosen.items():
        part = PART_OF.get(type(model))
        if part is None or part in named or {part, *named} >= {"vision", "audio"}:
            raise ConvertError(
                f"{source.path}: {name}: no Hugging Face class holds a {type(model).__name__} beside "
                f"{', '.join(named.values()) or 'nothing'}; a decoder, an encoder, or one of each can be exported: "
                f"choose them with --modules (of {', '.join(source.models)})"
            )
        named[part] = name
    parts = Parts(**{part: source.models[name] for part, name in named.items()})
    if parts.llm is not None and parts.llm.cross_attention is not None:
        raise ConvertError(
            f"{source.path}: {named['llm']}: no family that is written has layers that attend to an encoder "
            "(Decoder.cross_attention); keep the checkpoint, or train without"
        )
    whole = registry.whole_of(parts)
    if whole is not None:
        whole.check(parts)
    return parts, named


def find_tensors(source: Source, dtype: str | None, parts: Parts, named: Mapping[str, str]) -> dict[str, Tensor]:
    """Key in the hub's layout -> tensor, for all that the models hold."""
    found = {}
    fetch_once = lambda name: source.fetch([name])[name]
    fetch_rows = functools.lru_cache(maxsize=1)(fetch_once)  # the rows of an array come in turn
    for name, place in keys.places(parts).items():
        part, _, rest = name.partition("/")
        theirs = f"{named[part]}/{rest}"
        stored = source.arrays.get(theirs)
        if stored is None or stored.shape != place.shape:
            what = "is missing" if stored is None else f"has shape {list(stored.shape)}, not {list(place.shape)}"
            raise ConvertError(f"{source.path}: {theirs} {what}; the checkpoint and its configuration do not agree")
        kind = DTYPES[dtype] if dtype else stored.dtype
        if name.endswith("/moe/bias"):  # by which routers choose: transformers keeps it in float32
            kind = np.promote_types(kind, np.float32) if dtype else kind
        fetch = fetch_rows if len(place.keys) > 1 else fetch_once
        for row, key in enumerate(place.keys):
            read = functools.partial(_values, fetch, theirs, place, row, kind, key)
            found[key] = Tensor(place.torch_shape, kind, read)
    whole = registry.whole_of(parts)
    if whole is not None and not whole.ties and parts.llm is not None and parts.llm.tied:
        before = keys.prefix(parts, "llm")
        found[f"{before}lm_head.weight"] = found[f"{before}model.embed_tokens.weight"]
    return found


def _values(
    fetch: Callable[[str], Sliceable], name: str, place: keys.Place, row: int, dtype: np.dtype, key: str
) -> np.ndarray:
    values = place.to_torch(fetch(name), row)
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if cast is not values and not np.array_equal(np.isfinite(cast), np.isfinite(values)):
        raise ConvertError(
            f"--dtype={dtype.name}: {key} holds {np.abs(values[np.isfinite(values)]).max():.3g}, beyond that type's "
            "range; take bfloat16 or float32"
        )
    return cast


def _with_idle(
    parts: Parts, named: Mapping[str, str], source: Source, dtype: str | None
) -> tuple[Parts, dict[str, Extras], dict[str, Tensor]]:
    """(the parts as they are written, what came with each, tensors that no model of ours holds)."""
    extras = {part: source.extras.get(name, Extras()) for part, name in named.items()}
    part = parts.encoder
    if part is None:
        return parts, extras, {}
    model, before, spelled = parts.models[part], keys.prefix(parts, part), extras[part].spelled
    stored = next(a.dtype for n, a in source.arrays.items() if n.startswith(f"{named[part]}/"))
    kind = DTYPES[dtype] if dtype else stored
    cast = kind if dtype or isinstance(source, Workdir) else None  # a run has its own precision for all
    came = {}
    for key, path in extras[part].idle.items():  # an encoder that came with another model leaves that behind
        here = _moved(key, parts)
        if keys.is_idle(here, parts):
            came[here] = stored_tensor(path, spelled.get(key, key), cast)
    inside = [key.removeprefix(before) for key in came if key.startswith(before)]
    shorter, constants = registry.family_of(model).shortened(model, inside)
    if not constants:
        return parts, extras, came
    made = {before + key: _constant(np.full(shape, value, kind)) for key, (shape, value) in constants.items()}
    return dataclasses.replace(parts, **{part: shorter}), extras, made


def _moved(key: str, parts: Parts) -> str:
    """A key of what came with the encoder as a folder of `parts` has it."""
    assert parts.encoder is not None
    family = registry.family_of(parts.models[parts.encoder])
    if family.beside.fullmatch(key):
        return key
    for whole in registry.WHOLES:
        key = key.removeprefix(whole.holders.get(parts.encoder, ""))
    return keys.prefix(parts, parts.encoder) + key.removeprefix(family.prefix)


def _constant(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def _write_shards(found: Mapping[str, Tensor], directory: Path, max_bytes: int) -> None:
    """One file, or several with an index."""
    shards = list(_shards(found, max_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(directory / name, {key: found[key] for key in names})
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total = sum(t.num_bytes for t in found.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(found: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for key, tensor in found.items():
        if names and size + tensor.num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(key)
        size += tensor.num_bytes
    yield names
