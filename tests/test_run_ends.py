"""How runs end in the wild: whatever ends one, its last complete step is saved, or the last complete checkpoint stays
and is named."""

import errno
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
import pytest
import runs
from runs import DRAWN, STEPS

from hetjax.core.packing import Packing
from hetjax.core.step import Gradients
from hetjax.core.trainer import Trainer
from hetjax.core.wiring import Wiring
from hetjax.data import Loader, Pictures
from hetjax.data.settings import DataError
from hetjax.run import checkpoint, curves, evaluate, metrics

pytest_plugins = ["one_trainer"]


class Broken(Exception):
    """What a user's own code raises."""


def at_call(number: int, plain: Callable, fault: Callable[[], Any], *, first: bool = True) -> Callable:
    """`plain`, which meets the fault at its n-th call: before it, or behind it."""
    calls = iter(range(1, 10**6))

    def called(*arguments: Any, **named: Any) -> Any:
        met = next(calls) == number
        if met and first:
            fault()
        found = plain(*arguments, **named)
        if met and not first:
            fault()
        return found

    return called


def fail(error: BaseException) -> Callable[[], NoReturn]:
    def raise_it() -> NoReturn:
        raise error

    return raise_it


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def twice() -> None:
    """Ctrl-C, and again."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def fill_the_disk() -> None:
    """No file grows beyond a few bytes, until `allow`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def allow() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# (class, method, its call that meets the fault, the fault), before it or behind; status or exception; step saved; said
ENDS: dict[str, tuple[tuple[Any, str, int, Callable], bool, Any, int, str]] = {
    "data": ((Loader, "next_step", 4, fail(DataError("d.json: gone"))), True, 2, 3, r"error: d\.json: gone"),
    "a reader": ((Pictures, "read", 40, fail(Broken())), True, Broken, -1, ""),
    "evaluation": ((evaluate, "values", 1, fail(Broken())), True, Broken, 3, ""),
    "the first evaluation, by Ctrl-C": ((evaluate, "values", 1, twice), True, KeyboardInterrupt, 3, ""),
    "a writer": ((metrics.Terminal, "write", 3, fail(Broken())), True, Broken, 3, ""),
    "Ctrl-C twice between steps": ((Loader, "next_step", 4, twice), True, KeyboardInterrupt, 3, ""),
    "Ctrl-C twice in a step": ((Trainer, "update", 4, twice), False, KeyboardInterrupt, 2, ""),
    "exit": ((Loader, "next_step", 4, fail(SystemExit(3))), True, SystemExit, 3, ""),
    "a save": ((ocp.CheckpointManager, "save", 2, fail(full())), True, 2, 4, "No space left on device"),
    "SIGTERM in a save": ((ocp.CheckpointManager, "save", 2, send(signal.SIGTERM)), True, 0, 4, "SIGTERM: saved step"),
    "Ctrl-C twice in a save": ((ocp.CheckpointManager, "save", 2, twice), False, KeyboardInterrupt, 4, ""),
    "SIGTERM in an evaluation": ((evaluate, "values", 1, send(signal.SIGTERM)), True, 0, 3, "SIGTERM: saved step 3"),
    "a step that fails": ((Trainer, "update", 4, fail(Broken())), True, Broken, 3, ""),
}  # fmt: skip


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started the tests in the background, to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("way", ENDS)
def test_whatever_ends_a_run_its_last_step_is_saved_and_the_same_command_continues(
    once: None, call: Callable, gin: Path, tmp_path: Path, undisturbed: dict, capsys: pytest.CaptureFixture, way: str
) -> None:
    (place, name, number, fault), first, status, saved, said = ENDS[way]
    workdir, changes = tmp_path / "run", dict(eval_every=3, keep=1, named=runs.held_out(gin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, at_call(number, getattr(place, name), fault, first=first))
        if isinstance(status, int):
            code, text = call(workdir, **changes)
            assert code == status, text
        else:
            with pytest.raises(status):
                call(workdir, **changes)
            text = capsys.readouterr().out
    picture = workdir / curves.FILE
    assert (picture.read_text() if runs.records(workdir) else not picture.exists()) in (DRAWN, True)
    newest = max(checkpoint.steps_in(workdir / "checkpoints"))
    assert newest == saved or saved < 0, text
    assert re.search(rf"step {newest} .*{workdir}/checkpoints.*the same command continues", text), text
    assert re.search(said.replace("DIR", str(workdir)), text), text
    if name == "values":
        assert not runs.records(workdir, "eval/loss"), "nothing is told of an evaluation that did not end"
    status, text = call(workdir, **changes)
    assert status == 0 and f"at step {newest}\n" in text
    losses = runs.records(workdir)
    assert losses == {n: undisturbed[n] for n in losses} and losses.keys() >= set(range(newest + 1, STEPS + 1))
    assert list(runs.records(workdir, "eval/loss")) == [3, 6, STEPS]
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(STEPS)]


def test_a_line_counts_no_save_before_its_steps(
    once: None, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *given: (save(*given), time.sleep(2)))
    call(tmp_path / "run", log_every=1, save_every=2)
    seconds = runs.records(tmp_path / "run", "step_seconds")
    assert len(seconds) == STEPS and max(seconds.values()) < 2


FAILS = {  # what fails, at which call -> what is said of it
    (Gradients, "_backward", 3): ["in the backward of llm/0, microbatch 0", "in step 2"],
    (Wiring, "place", 7): ["in the evaluation of vision/0", "in the evaluation behind step 3"],
}


@pytest.mark.parametrize("way", FAILS, ids=lambda way: way[1])
def test_what_the_devices_refuse_is_told_with_task_and_step(
    once: None, call: Callable, gin: Path, tmp_path: Path, way: tuple[Any, str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, number = way
    refused = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.")
    monkeypatch.setattr(place, name, at_call(number, getattr(place, name), fail(refused)))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        call(tmp_path / "run", eval_every=3, named=runs.held_out(gin))
    task, at = FAILS[way]
    assert raised.value.__notes__ == [task, at]


FULL = {  # how often metrics are written, and so what meets the full disk first; what is said
    100: r"error: DIR/checkpoints/\d: the checkpoint cannot be written .*File too large\); make room if",
    1: r"error: DIR/metrics\.jsonl: File too large; make room there",
}


@pytest.mark.parametrize("log_every", FULL)
def test_on_a_disk_that_is_full_the_last_complete_checkpoint_stays_and_is_named(
    once: None, call: Callable, tmp_path: Path, undisturbed: dict, log_every: int
) -> None:
    workdir, waits = tmp_path / "run", ocp.CheckpointManager.wait_until_finished
    with pytest.MonkeyPatch.context() as patch:  # full once the first checkpoint is complete
        name = waits.__name__
        patch.setattr(ocp.CheckpointManager, name, at_call(2, waits, fill_the_disk, first=False))
        try:
            status, text = call(workdir, keep=1, log_every=log_every)
        finally:
            allow()
    assert status == 2 and re.search(FULL[log_every].replace("DIR", str(workdir)), text), text
    assert re.search(r"step 2 in \S+checkpoints is the last complete one; the same command continues", text), text
    assert checkpoint.steps_in(workdir / "checkpoints") == [2]
    status, text = call(workdir, keep=1)
    losses = runs.records(workdir)
    assert status == 0 and "at step 2\n" in text and losses == {n: undisturbed[n] for n in losses}
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(STEPS)]


def test_a_run_packs_its_microbatches_in_the_data_thread(
    once: None, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those of an evaluation."""
    names, plain = set(), Packing.pack

    def pack(*arguments: Any) -> Any:
        names.add(threading.current_thread().name)
        return plain(*arguments)

    monkeypatch.setattr(Packing, "pack", pack)
    assert call(tmp_path / "run", held_out=None)[0] == 0
    assert names == {"hetjax-data"}
