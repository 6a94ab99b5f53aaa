"""How a run ends before its last step: on a signal between two steps, or on whatever its code, data or disk raise.

Its last complete step is saved if its arrays are alive and the disk takes them; else the last checkpoint stays.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from hetjax.core.trainer import State, Trainer
from hetjax.run import cluster, signals
from hetjax.run.checkpoint import Checkpoints, steps_in
from hetjax.run.watchdog import Watch


@contextlib.contextmanager
def signalled() -> Iterator[Sequence[signal.Signals]]:
    """A list that SIGTERM and the first Ctrl-C make true; the loop looks at it between steps."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        said = f"{received[-1].name}: stops once what is under way (a step, the compilation) is done\n"
        os.write(2, said.encode())  # not by `print`, which may be amid a line
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])  # a second one does what it always did

    with signals.heard(receive) as before:
        yield received


class Last:
    """The last complete step: its trainer, its state and the position of the data behind it."""

    def __init__(self) -> None:
        self.complete: tuple[Trainer, State, Mapping[str, Any]] | None = None

    def keep(self, trainer: Trainer, state: State, data: Mapping[str, Any]) -> None:
        """Takes note of a step; what `state` holds may be consumed later."""
        self.complete = (trainer, state, data)


@contextlib.contextmanager
def saved(checkpoints: Checkpoints, watch: Watch) -> Iterator[Last]:
    """Saves the last complete step if an error or an interrupt comes through, and says which step lies where."""
    last = Last()
    try:
        yield last
    except BaseException:  # a user's code may raise any
        if last.complete is not None and not cluster.is_one_of_several():  # the others are not here to save with
            at = watch.at
            watch.pauses(f"{at}, and the save behind its error")
            print(_save(checkpoints, last), flush=True)
            watch.pauses(at)  # where the error came from
        raise


def _save(checkpoints: Checkpoints, last: Last) -> str:
    """What is on disk."""
    assert last.complete is not None
    _, state, _ = last.complete
    with contextlib.suppress(Exception):  # the save under way; whether it was complete shows below
        checkpoints.wait()
    if not any(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer))):
        with contextlib.suppress(Exception):  # a disk that is full, a device that is lost
            checkpoints.save(*last.complete)
            checkpoints.wait()
    steps = steps_in(checkpoints.directory)
    if state.step in steps:
        return f"saved step {state.step} in {checkpoints.directory}; the same command continues"
    if steps:
        return f"step {max(steps)} in {checkpoints.directory} is the last complete one; the same command continues"
    return f"{checkpoints.directory} holds no complete step; the same command starts over"
