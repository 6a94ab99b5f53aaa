"""Orbax checkpoints as sources: what `from_hf` writes, and what a training run leaves in its workdir.

CKPT/params/            Orbax, names as in hetjax/run/checkpoint.py: params/llm/layers/0003/attention/q
CKPT/model.gin          the models
CKPT/files/             config.json, tokenizer and processor of the folder it came from, for the export
CKPT/unused.safetensors tensors of that folder that no model of ours reads (CLIP's last norm, layers behind the
                        one that features are taken from), so that the export gives them back
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hetjax.data.paths import expanded
from hetjax.hf import keys
from hetjax.hf.errors import ConvertError
from hetjax.hf.folder import Folder, open_file
from hetjax.hf.parts import PART_OF, Parts
from hetjax.hf.source import Array, Extras, Sliceable, Source, read_json
from hetjax.run import checkpoint, config
from hetjax.run.experiment import Experiment
from hetjax.run.names import flat, nested
from hetjax.run.record import OPERATIVE

PARAMS, MODEL, FILES, UNUSED = "params", "model.gin", "files", "unused.safetensors"
Tree = Any


class Orbax:
    """The parameters in one Orbax checkpoint. Raises ConvertError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with _quietly(), ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(path).item_metadata["params"]
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._damaged(error) from error
        self.arrays = {name: Array(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _leaves(tree)}

    def fetch(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays, on the host."""
        item = {"params": nested(dict.fromkeys(names, 0))}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        try:
            with _quietly(), ocp.PyTreeCheckpointer() as reader:
                found = dict(flat(reader.restore(self.path, args=args)["params"]))
        except Exception as error:
            raise self._damaged(error) from error
        return {name: np.asarray(found[name]) for name in names}

    def _damaged(self, error: Exception) -> ConvertError:
        return ConvertError(
            f"{self.path}: the checkpoint cannot be read ({type(error).__name__}: {error}); make it again"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Orbax's warning that a checkpoint made of several items has no metadata for one alone."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _leaves(tree: Tree, prefix: str = "") -> list[tuple[str, Any]]:
    if hasattr(tree, "shape"):
        return [(prefix[:-1], tree)]
    return [leaf for name, value in tree.items() for leaf in _leaves(value, f"{prefix}{name}/")]


class Converted:
    """The source that reads what `from_hf` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: Mapping[str, Any] = config.load([str(path / MODEL)], [], Parts).models
        self._params = Orbax(path / PARAMS)
        self.arrays = self._params.arrays
        files = (p for p in sorted((path / FILES).rglob("*")) if p.is_file() and p.name != "config.json")
        beside = {p.relative_to(path / FILES).as_posix(): p for p in files}
        unused = path / UNUSED
        idle = dict.fromkeys(open_file(unused).keys(), unused) if unused.is_file() else {}
        extras = Extras(read_json(path / FILES / "config.json"), beside, idle)
        self.extras = dict.fromkeys(self.models, extras)

    def fetch(self, names: Sequence[str]) -> Mapping[str, Sliceable]:
        """The arrays, on the host."""
        return self._params.fetch(names)


class Workdir:
    """The source that reads the newest checkpoint of a training run; of `run`, which tells of one that is about to
    begin, there are shapes alone."""

    def __init__(self, path: Path, run: Experiment | None = None) -> None:
        self.path = path
        self.run = config.load([str(path / OPERATIVE)], [], Experiment) if run is None else run
        encoders = {e.name: e.model for e in self.run.encoders}
        self.models: Mapping[str, Any] = {self.run.llm.name: self.run.llm.model, **encoders}
        self._params = self._newest() if run is None else None
        self.arrays = self._params.arrays if self._params else self._to_come()
        self.extras = {name: self._extras(name) for name in self.models}

    def _newest(self) -> Orbax:
        steps = checkpoint.steps_in(self.path / "checkpoints")
        if not steps:
            raise ConvertError(f"{self.path}: no checkpoint in checkpoints/; train first, or check the path")
        return Orbax(self.path / "checkpoints" / str(max(steps)) / "state")

    def _to_come(self) -> dict[str, Array]:
        known = {name: model for name, model in self.models.items() if type(model) in PART_OF}
        dtype = np.dtype(self.run.param_dtype)
        return {f"{m}/{name}": Array(s, dtype) for m, model in known.items() for name, s in keys.shapes(model).items()}

    def _extras(self, name: str) -> Extras:
        """Those of the source that the module started from."""
        start = self.run.init_from.get(name)
        if start is None:
            return Extras()
        try:
            source = open_source(start)
        except ConvertError as error:
            raise ConvertError(
                f"{name} started from {start} (Experiment.init_from), whose tokenizer and settings are needed with it: "
                f"{error}; a relative path counts from where this command runs, so run it where the training ran"
            ) from error
        return source.extras[module_of(source, self.models[name])]

    def fetch(self, names: Sequence[str]) -> Mapping[str, Sliceable]:
        """The arrays, on the host."""
        assert self._params is not None
        return self._params.fetch(names)


def open_source(path: str | Path) -> Source:
    """The source at `path`, whatever it is. Raises ConvertError."""
    where = Path(expanded(path)).absolute()
    if not where.is_dir():
        raise ConvertError(f"{path}: no such directory; name a Hugging Face folder, a checkpoint or a workdir")
    if (where / MODEL).is_file():
        return Converted(where)
    if (where / OPERATIVE).is_file():
        return Workdir(where)
    if (where / "config.json").is_file():
        return Folder(where)
    raise ConvertError(
        f"{path}: neither a Hugging Face folder (config.json), nor a converted checkpoint ({MODEL}), nor a training "
        f"run's workdir ({OPERATIVE})"
    )


def module_of(source: Source, model: Any) -> str:
    """The module of `source` that is of the same kind as `model`. Raises ConvertError if there is none, or several."""
    names = [name for name, other in source.models.items() if type(other) is type(model)]
    if len(names) != 1:
        kind = type(model).__name__
        held = ", ".join(type(other).__name__ for other in source.models.values())
        raise ConvertError(
            f"{source.path} holds {len(names)} models of kind {kind} (of {held}); name a source with exactly one"
        )
    return names[0]
