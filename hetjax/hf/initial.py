"""Step 0 of a run whose modules start from stored parameters.

Every device's shard is read by itself, from the range of the file that holds it, layer by layer and piece by piece, and
the fresh values of a leaf are freed before its own are read: beside the parameters a process holds a piece of a tensor.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hetjax.core import stacks
from hetjax.core.graph import Graph
from hetjax.core.parameters import Parameters
from hetjax.core.stage import Stage
from hetjax.core.trainer import Path, State, Trainer, is_stacked, path_parts
from hetjax.data import Pictures
from hetjax.data.items import Reader
from hetjax.hf import pictures, pieces, read_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.parts import OF_DATA, OF_PROJECTOR, PART_OF
from hetjax.hf.positions import Resized
from hetjax.hf.source import Source
from hetjax.hf.stored import module_of, open_source
from models.vit import ViT
from models.whisper import Whisper

LOG = logging.getLogger(__name__)
PROJECTOR = "last/projector/"
FRESH = (PROJECTOR, "last/deep")  # what of an encoder a tower that is stored alone lacks


class Start(NamedTuple):
    """Where a module's parameters come from."""

    source: Source
    module: str  # the name that the module has there


def open_starts(
    graph: Graph,
    init_from: Mapping[str, str],
    readers: Mapping[str, Reader] | None = None,
    *,
    resized: Collection[str] = (),
) -> dict[str, Start]:
    """The sources of the modules in `init_from`, position tables of those in `resized` in their own picture size.

    Reads no values.

    Raises ConvertError if one is of another model, or came with a processor that sees pictures in another way than the
    module's reader in `readers`.
    """
    starts = {}
    for name, path in init_from.items():
        names = [m.name for m in graph.modules]
        if name not in names:
            raise ConvertError(f"Experiment.init_from names {name!r}; the modules are {', '.join(names)}")
        model = graph.module(name).definition.config
        try:
            source = open_source(path)
            theirs = module_of(source, model)
            source = Resized(source, theirs, model.image_size) if name in resized else source
            starts[name] = start = Start(source, theirs)
        except ConvertError as error:
            raise ConvertError(f"Experiment.init_from: {name}: {error}") from error
        _check_same(name, model, start)
        _name_unapplied(name, model, start)
        reader = (readers or {}).get(name)
        if isinstance(reader, Pictures):
            pictures.check(name, reader, source.extras[theirs].files, resized=name in resized)
    return starts


def _name_unapplied(name: str, model: Any, start: Start) -> None:
    config = start.source.extras[start.module].config
    found = "" if config is None else read_config.unapplied(config, PART_OF[type(model)])
    if found:
        LOG.warning("%s: not applied in training: %s (%s); exports keep it", name, found, start.source.path)


def has_projector(source: Source, module: str) -> bool:
    """Whether the encoder comes with a projector; a tower alone does not."""
    return any(name.startswith(f"{module}/{PROJECTOR}") for name in source.arrays)


def _check_same(name: str, model: Any, start: Start) -> None:
    theirs = start.source.models[start.module]
    whole = has_projector(start.source, start.module)
    for field in dataclasses.fields(model):
        alone = isinstance(model, ViT | Whisper) and not whole
        if field.name in OF_DATA or (alone and field.name in OF_PROJECTOR):
            continue
        ours, their = (_value(m, field.name) for m in (model, theirs))
        if ours != their:
            kind = type(model).__name__
            also = ", or resize_positions=True of the encoder to resize its positions" * (field.name == "image_size")
            raise ConvertError(
                f"{name}: {kind}.{field.name}={ours!r}, but {start.source.path}, which Experiment.init_from names, was "
                f"made with {their!r}; set {kind}.{field.name} to that{also}"
            )


def _value(model: Any, field: str) -> Any:
    if field == "experts" and model.experts is not None:
        return model.experts.untrained
    if field == "feature_layer":  # -1 and the number of layers name the same
        return model.depths
    return model.hidden if field == "projector_width" else getattr(model, field)


def state(trainer: Trainer, starts: Mapping[str, Start]) -> State:
    """The trainer's step 0, with the parameters of `starts` in place of fresh ones."""
    params = trainer.initial_params()
    for (name, index), stage in trainer.pipeline.stages_here.items():
        if name in starts:
            params[name, index] = _filled(stage, params[name, index], starts[name])
    return trainer.start(params)


def _filled(stage: Stage, params: Any, start: Start) -> Any:
    def fill(path: Path, abstract: jax.ShapeDtypeStruct, old: jax.Array) -> jax.Array:
        names = [f"{start.module}/{name}" for name in _names(stage.parameters, path)]
        if start.source.arrays.keys().isdisjoint(names) and any(part in names[0] for part in FRESH):
            return old
        old.delete()
        return _read(
            names, abstract, start.source, stage.parameters.true_shape(path, abstract), stacked=is_stacked(path)
        )

    return jax.tree_util.tree_map_with_path(fill, stage.parameters.params, params)


def read(parameters: Parameters, start: Start) -> Any:
    """The parameters of a stage, every one of which the source holds. Raises ConvertError."""

    def fill(path: Path, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        names = [f"{start.module}/{name}" for name in _names(parameters, path)]
        return _read(names, abstract, start.source, parameters.true_shape(path, abstract), stacked=is_stacked(path))

    return jax.tree_util.tree_map_with_path(fill, parameters.params)


def _names(parameters: Parameters, path: Path) -> list[str]:
    """What the layers of a leaf, or the leaf, are called in a source."""
    parts = path_parts(path)
    return stacks.names(parts, parameters.layers_of) if is_stacked(path) else ["/".join(parts)]


def _read(
    names: list[str], abstract: jax.ShapeDtypeStruct, source: Source, true_shape: tuple[int, ...], *, stacked: bool
) -> jax.Array:
    wanted = true_shape[1:] if stacked else true_shape
    for name in names:
        found = source.arrays.get(name)
        if found is None or found.shape != wanted:
            has = "lacks it" if found is None else f"has shape {list(found.shape)}"
            raise ConvertError(
                f"{source.path}: {name} {has}, the run's is {list(wanted)}; use the model's own settings"
            )
    leaf = jnp.zeros(abstract.shape, abstract.dtype, device=abstract.sharding)
    for row, name in enumerate(names):
        leaf = pieces.put(pieces.Padded(source.fetch([name])[name], wanted), leaf, *((row,) if stacked else ()))
    return leaf
