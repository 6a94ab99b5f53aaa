"""Layout-free checkpoints: every layer's every leaf is stored alone, under the name that it has in the model.

    params/llm/first/embed    params/llm/layers/0003/attention/q    optimizer/llm/0/mu/layers/0003/attention/q

so that a run saved under one layout and placement restores under any other. Orbax writes in the background, to a
temporary directory that it renames when complete: a killed run finds the last complete checkpoint and nothing else.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import stacks
from hetjax.core.stage import Stage
from hetjax.core.tasks import StageKey
from hetjax.core.trainer import State, Thunks, Trainer, is_stacked, path_parts
from hetjax.run.names import flat, nested

Tree = Any
Names = dict[str, Any]  # name -> array, abstract or not
READING = "if it is damaged, remove this directory and the run resumes from the one before"
WRITING = "make room if the disk is full, and start the same command again"  # it, or the one that was under way
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that Orbax writes, until it is complete
FIRST_STEP = "first_step"  # of the trainer that saved: where its optimizer's state began


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; names the file and the way out."""


class OtherArraysError(CheckpointError):
    """A checkpoint of another model or optimizer."""


class Checkpoints:
    """The checkpoints of one run: DIR/<step>, the last `keep` of them."""

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Removes what a call left unfinished. Raises CheckpointError if `directory` is a file."""
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is no directory; move it away, or use another workdir")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits, and ends the writer's threads. Raises as `wait`, unless an error is under way: that one is told."""
        try:
            self.wait()
            self._manager.close()
        except Exception:
            if kind is None:
                raise

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, trainer: Trainer, state: State, data: Mapping[str, Any]) -> None:
        """Starts to write `state` and the data's position; returns once the values are copied.

        Raises CheckpointError if it was not, or if the one before it could not be written."""
        if self.latest == state.step:
            return
        with self._explained(state.step, "written", WRITING):
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(nested(to_names(trainer, state))), data=ocp.args.JsonSave(dict(data))
            )
            saved = self._manager.save(state.step, args=args, custom_metadata={FIRST_STEP: trainer.spec.first_step})
        if not saved:
            raise CheckpointError(
                f"{self.directory}: step {state.step} was not saved, a checkpoint of step {self.latest} is there; "
                "use another workdir, or remove the newer checkpoints"
            )

    def restore(self, trainer: Trainer, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """(state under the trainer's layouts, position of the data) of `step`, or of the newest.

        Raises CheckpointError if there is none, it is damaged, or it is of another model or optimizer."""
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory}: no complete checkpoint; train first, or check the path")
        data = self.check(trainer, step)
        with self._explained(step, "read", READING):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(nested(abstract_names(trainer))))
            found = self._manager.restore(step, args=args)
        return from_names(trainer, dict(flat(found["state"])), step), data

    def check(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """The position of the data at `step`. Reads no array.

        Raises CheckpointError if the checkpoint is damaged, of another phase, or of another model or optimizer."""
        with self._explained(step, "read", READING):
            self._check_phase(step, trainer.spec.first_step)
            self._check_names(step, abstract_names(trainer))
            return self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def _check_phase(self, step: int, first_step: int) -> None:
        saved = self._manager.metadata(step).custom_metadata.get(FIRST_STEP, first_step)  # taken as it is without one
        if saved != first_step:
            raise CheckpointError(
                f"{self.directory / str(step)}: its phase began behind step {saved}, but this run's phase of step "
                f"{step} begins behind step {first_step}; set Experiment.phases, and the Phase.steps of those that are "
                "over, back to what they were, or use another workdir"
            )

    def _check_names(self, step: int, wanted: Names) -> None:
        stored = {name: tuple(leaf.shape) for name, leaf in flat(self._manager.item_metadata(step)["state"])}
        for name in sorted(stored.keys() | wanted.keys()):
            if name not in stored or name not in wanted:
                side = "the checkpoint lacks it" if name in wanted else "this run has no such array"
                raise OtherArraysError(
                    f"{self.directory / str(step)}: {name}: {side}; restore with the model and optimizer settings "
                    "(frozen, trainable) that it was saved with, or use another workdir"
                )
            if stored[name] != wanted[name].shape:
                raise OtherArraysError(
                    f"{self.directory / str(step)}: {name} has shape {list(stored[name])}, this run's is "
                    f"{list(wanted[name].shape)}; restore with the model's own sizes, or use another workdir"
                )

    @contextlib.contextmanager
    def _explained(self, step: int, what: str, way_out: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: the checkpoint cannot be {what} ({type(error).__name__}: {error}); "
                f"{way_out}"
            ) from error

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError if something could not be written."""
        with self._explained(self.latest or 0, "written", WRITING):
            self._manager.wait_until_finished()


def steps_in(directory: Path) -> list[int]:
    """The steps whose complete checkpoints lie in `directory`. Makes nothing, as `Checkpoints` does."""
    return [int(path.name) for path in directory.glob("*") if path.name.isdigit()]


def unfinished_in(directory: Path) -> list[Path]:
    """What calls that were killed, or met a full disk, left of checkpoints that they wrote."""
    return sorted(directory.glob(f"*{UNFINISHED}*"))


def programs(trainer: Trainer) -> Thunks:
    """What a save runs, to be compiled with the rest; without it the first save compiles."""
    return [
        (f"{module}/{index} copy", functools.partial(_compile_copy, stage))
        for (module, index), stage in trainer.pipeline.stages.items()
    ]


def _compile_copy(stage: Stage) -> None:
    leaves = tuple(jax.tree.leaves((stage.parameters.params, stage.parameters.state)))
    compiled = _copies.lower(leaves, cuts=_cuts(stage)).compile()
    stage.memory["copy"] = compiled.memory_analysis()
    stage.programs["copy"] = compiled


def to_names(trainer: Trainer, state: State) -> Names:
    """Copies of a state's arrays by name, layers one by one; the step may donate the originals at once."""
    names: Names = {}
    for key, stage in trainer.pipeline.stages.items():
        trees = (state.params[key], state.optimizer[key])
        copy = stage.programs.get("copy") or functools.partial(_copies, cuts=_cuts(stage))
        copies = copy(tuple(jax.tree.leaves(trees)))
        names |= dict(zip(_names_of(key, stage), copies, strict=True))
    return names


def abstract_names(trainer: Trainer) -> Names:
    """The abstract arrays, with shardings, that `from_names` takes."""
    names: Names = {}
    for key, stage in trainer.pipeline.stages.items():
        for name, leaf, cut in _entries(key, stage):
            names.setdefault(name, _one_layer(leaf) if cut is not None else leaf)
    return names


def from_names(trainer: Trainer, names: Names, step: int) -> State:
    """A state from arrays by name."""
    params, states = {}, {}
    for key, stage in trainer.pipeline.stages.items():
        mine = stage.parameters
        abstract = (mine.params, mine.state)
        entries = _entries(key, stage)
        rows = jax.device_put(
            [names[name] for name, _, _ in entries],
            [leaf.sharding if layer is None else _one_layer(leaf).sharding for _, leaf, layer in entries],
        )
        where = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
        leaves = jax.jit(functools.partial(_join, _cuts(stage)), out_shardings=where)(rows)
        params[key], states[key] = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return State(params, trainer.pipeline.weights(params), states, trainer.pipeline.zeros(), step)


def _entries(key: StageKey, stage: Stage) -> list[tuple[str, jax.ShapeDtypeStruct, int | None]]:
    """(name, abstract leaf, layer within the stage or None) of all that a stage stores, in the order of its leaves."""
    mine = stage.parameters
    found: list[tuple[str, jax.ShapeDtypeStruct, int | None]] = []
    for kind, tree in (("params", mine.params), ("optimizer", mine.state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            parts, place = path_parts(path), f"{kind}/{key[0]}"
            if is_stacked(path):
                rows = enumerate(stacks.names(parts, mine.layers_of))
                found += [(f"{place}/{name}", leaf, row) for row, name in rows]
            else:
                found.append(("/".join([place, *parts]), leaf, None))
    return found


def _names_of(key: StageKey, stage: Stage) -> list[str]:
    return [name for name, _, _ in _entries(key, stage)]


def _cuts(stage: Stage) -> tuple[int, ...]:
    """For each leaf of (parameters, state): how many layers it holds, 0 for one that is not stacked."""
    mine = stage.parameters
    leaves = jax.tree_util.tree_leaves_with_path((mine.params, mine.state))
    return tuple(leaf.shape[0] if is_stacked(path) else 0 for path, leaf in leaves)


def _one_layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    where = NamedSharding(leaf.sharding.mesh, P(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)


@functools.partial(jax.jit, static_argnames="cuts")
def _copies(leaves: tuple[jax.Array, ...], cuts: tuple[int, ...]) -> list[jax.Array]:
    found = []
    for leaf, count in zip(leaves, cuts, strict=True):
        found += [leaf[i] for i in range(count)] or [jnp.copy(leaf)]
    return found


def _join(cuts: tuple[int, ...], rows: list[jax.Array]) -> list[jax.Array]:
    """The leaves that `_copies` took apart."""
    rest = iter(rows)
    return [jnp.stack([next(rest) for _ in range(count)]) if count else next(rest) for count in cuts]
