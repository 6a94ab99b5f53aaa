"""Layout-free checkpoints: every layer's every leaf is stored alone, under the name that it has in the model.

    params/llm/first/embed    params/llm/layers/0003/attention/q    optimizer/llm/0/mu/layers/0003/attention/q

so that a run saved under one layout and placement restores under any other; what a layout pads is left out. Orbax
writes in the background, to a temporary directory that it renames when complete: a killed run finds the last complete
checkpoint and nothing else.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hetjax.core.trainer import State, Trainer
from hetjax.run import digests
from hetjax.run.named import Names, abstract_names, from_names, to_names
from hetjax.run.names import flat, nested

Tree = Any
READING = "if it is damaged, remove this directory and the run resumes from the one before"
WRITING = "make room if the disk is full, and start the same command again"  # it, or the one that was under way
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that Orbax writes, until it is complete
FIRST_STEP = "first_step"  # of the trainer that saved: where its optimizer's state began
DIGESTS = "digests"  # of the arrays, by name


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

        Raises CheckpointError if it was not, or if the one before it could not be written, and what devices raise."""
        if self.latest == state.step:
            return
        with self._explained(state.step, "written", WRITING):
            names = to_names(trainer, state)
            told = {FIRST_STEP: trainer.spec.first_step, DIGESTS: digests.of(names)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(nested(names)), data=ocp.args.JsonSave(dict(data)))
            saved = self._manager.save(state.step, args=args, custom_metadata=told)
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
            found = dict(flat(self._manager.restore(step, args=args)["state"]))
            self._check_values(step, found)
        return from_names(trainer, found, step), data

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

    def _check_values(self, step: int, names: Names) -> None:
        saved = self._manager.metadata(step).custom_metadata.get(DIGESTS, {})  # taken as they are without them
        for name, digest in digests.of(names if saved else {}).items():
            if saved[name] != digest:
                raise CheckpointError(
                    f"{self.directory / str(step)}: {name} has other values than were saved; {READING}"
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
        except jax.errors.JaxRuntimeError as error:  # of devices or of another process, and of no file
            error.add_note(f"when {self.directory / str(step)} was to be {what}")
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
