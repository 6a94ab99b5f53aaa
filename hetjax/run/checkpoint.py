"""Layout-free checkpoints: every layer's every leaf is stored alone, under the name that it has in the model.

    params/llm/first/embed    params/llm/layers/0003/attention/q    optimizer/llm/0/mu/layers/0003/attention/q

so that a run saved under one layout and placement restores under any other; what a layout pads is left out. Orbax
writes in the background, to a temporary directory that it renames when complete: a killed run finds the last complete
checkpoint and nothing else.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import stacks
from hetjax.core.alive import HOST, on_device
from hetjax.core.parameters import pad
from hetjax.core.stage import Stage
from hetjax.core.tasks import StageKey, Thing, What
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
        (f"{module}/{index} copy", functools.partial(_compile_copy, (module, index), stage))
        for (module, index), stage in trainer.pipeline.stages.items()
    ]


def _compile_copy(key: StageKey, stage: Stage) -> None:
    leaves = tuple(jax.tree.leaves((stage.parameters.params, stage.parameters.state)))
    compiled = _copies.lower(leaves, stored=_stored(key, stage)).compile()
    stage.memory["copy"] = compiled.memory_analysis()
    stage.programs["copy"] = compiled


class Stored(NamedTuple):
    """A leaf as a checkpoint has it: the arrays' names, one for each layer if it is stacked, and what each is like."""

    names: tuple[str, ...]
    array: jax.ShapeDtypeStruct  # without padding
    stacked: bool
    what: What


def to_names(trainer: Trainer, state: State) -> Names:
    """Copies of a state's arrays by name, layers one by one; the step may donate the originals at once."""
    names: Names = {}
    for key, stage in trainer.pipeline.stages.items():
        stored = _stored(key, stage)
        copy = stage.programs.get("copy") or functools.partial(_copies, stored=stored)
        copies = copy(tuple(jax.tree.leaves(on_device((state.params[key], state.optimizer[key])))))
        placed = jax.device_put(copies, _places(trainer, key, stored))
        names |= dict(zip(_all_names(stored), placed, strict=True))
    return names


def abstract_names(trainer: Trainer) -> Names:
    """The abstract arrays, with shardings, that `from_names` takes."""
    names: Names = {}
    for key, stage in trainer.pipeline.stages.items():
        stored = _stored(key, stage)
        arrays = [leaf.array for leaf in stored for _ in leaf.names]
        for name, a, place in zip(_all_names(stored), arrays, _places(trainer, key, stored), strict=True):
            names[name] = jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    return names


def _places(trainer: Trainer, key: StageKey, stored: Sequence[Stored]) -> list[NamedSharding]:
    """Where the arrays of a stage's checkpoint are, name by name: on the host if that is where the state has them."""
    home = {leaf.what: Thing(leaf.what, key) in trainer.pipeline.schedule.home for leaf in stored}
    own = [leaf.array.sharding.with_memory_kind(HOST if home[leaf.what] else "device") for leaf in stored]
    return [place for leaf, place in zip(stored, own, strict=True) for _ in leaf.names]


def from_names(trainer: Trainer, names: Names, step: int) -> State:
    """A state from arrays by name."""
    params, states = {}, {}
    for key, stage in trainer.pipeline.stages.items():
        abstract = (stage.parameters.params, stage.parameters.state)
        leaves, stored = tuple(jax.tree.leaves(abstract)), _stored(key, stage)
        places = [leaf.array.sharding for leaf in stored for _ in leaf.names]
        rows = jax.device_put([names[name] for name in _all_names(stored)], places)
        where = [leaf.sharding for leaf in leaves]
        joined = jax.jit(functools.partial(_join, stored, leaves), out_shardings=where)(rows)
        mine, state = jax.tree.unflatten(jax.tree.structure(abstract), joined)
        params[key] = trainer.pipeline.at_home(What.MASTERS, key, mine)
        states[key] = trainer.pipeline.at_home(What.STATE, key, state)
    return trainer.state(params, states, step)


def _stored(key: StageKey, stage: Stage) -> tuple[Stored, ...]:
    """All that a stage stores, in the order of the leaves of (parameters, state)."""
    mine, found = stage.parameters, []
    for kind, what, tree in (("params", What.MASTERS, mine.params), ("optimizer", What.STATE, mine.state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            parts, stacked = path_parts(path), is_stacked(path)
            names = stacks.names(parts, mine.layers_of) if stacked else ["/".join(parts)]
            shape, spec = mine.true_shape(path, leaf), tuple(leaf.sharding.spec)
            shape, where = (shape[1:], P(*spec[1:])) if stacked else (shape, P(*spec))
            place = NamedSharding(leaf.sharding.mesh, stage.plan.grid.fitting(shape, where))
            array = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
            found.append(Stored(tuple(f"{kind}/{key[0]}/{name}" for name in names), array, stacked, what))
    return tuple(found)


def _all_names(stored: tuple[Stored, ...]) -> list[str]:
    return [name for leaf in stored for name in leaf.names]


@functools.partial(jax.jit, static_argnames="stored")
def _copies(leaves: tuple[jax.Array, ...], stored: tuple[Stored, ...]) -> list[jax.Array]:
    found = []
    for leaf, how in zip(leaves, stored, strict=True):
        rows = [leaf[i] for i in range(len(how.names))] if how.stacked else [jnp.copy(leaf)]
        found += [_without_padding(row, how.array) for row in rows]
    return found


def _without_padding(row: jax.Array, array: jax.ShapeDtypeStruct) -> jax.Array:
    if row.shape == array.shape:
        return row
    uncut = lax.with_sharding_constraint(row, array.sharding)  # first: so that no device has the whole of it
    return lax.with_sharding_constraint(uncut[tuple(map(slice, array.shape))], array.sharding)


def _join(stored: tuple[Stored, ...], leaves: tuple[jax.ShapeDtypeStruct, ...], rows: list[jax.Array]) -> list:
    """The leaves that `_copies` took apart."""
    rest, found = iter(rows), []
    for how, leaf in zip(stored, leaves, strict=True):
        mine = [pad(next(rest), leaf.shape[how.stacked :]) for _ in how.names]
        found.append(jnp.stack(mine) if how.stacked else mine[0])
    return found
