"""How runs begin and end in the wild: what cannot go well is said before anything compiles, and whatever ends a run,
its last complete step is saved, or the last complete checkpoint stays and is named. In this process, with one trainer
that is compiled once."""

import contextlib
import errno
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import corpus
import hf_folders
import orbax.checkpoint as ocp
import pytest
import runs
from runs import Reference, settings

from hetjax import convert, train
from hetjax.core.trainer import Trainer
from hetjax.data import Loader, Pictures
from hetjax.data.settings import DataError
from hetjax.run import checkpoint, evaluate, experiment, metrics
from hetjax.run.metrics import FILE, SAMPLES

SAVED, STEPS, COMPILES = 4, 8, "<compiles>"
PLAIN = runs.layouts(vision=dict(), llm=dict()) | settings(num_microbatches=1, save_every=2, emulated_devices=0)


@pytest.fixture(scope="module")
def gin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write(tmp_path_factory.mktemp("wild"))


@pytest.fixture(scope="module")
def trainer(gin: Path) -> Trainer:
    """That of every run here."""
    built = experiment.build(runs.load(gin, PLAIN))
    built.compile(evaluate=True, others=checkpoint.programs(built))
    return built


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run says when it would compile."""
    monkeypatch.setattr(Trainer, "compile", lambda *_, **__: print(COMPILES))


@pytest.fixture
def once(prepared: None, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take the one trainer."""
    monkeypatch.setattr(experiment, "build", lambda run, phase=0: trainer)


@pytest.fixture
def call(gin: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """A function: workdir and settings -> the exit status of `hetjax.train` and all that it said."""

    def call(workdir: Path, **changes: Any) -> tuple[int, str]:
        more = changes.pop("named", {})
        capsys.readouterr()
        status = train.main(runs.arguments(gin, workdir, PLAIN | settings(**{"steps": STEPS} | changes) | more))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture
def workdir(once: None, call: Callable, tmp_path: Path, gin: Path) -> Path:
    """A copy of that of a run of 4 steps, saved behind the second and the fourth."""
    first = gin.parent / "saved"
    if not first.exists():
        assert call(first, steps=SAVED)[0] == 0
    return Path(shutil.copytree(first, tmp_path / "run"))


@pytest.fixture
def undisturbed(once: None, call: Callable, gin: Path) -> dict[int, float]:
    """The losses of a run that nothing ended."""
    whole = gin.parent / "whole"
    if not whole.exists():
        assert call(whole)[0] == 0
    return runs.records(whole)


# -- before the first step -------------------------------------------------------------------------------------------


def cut_last_line(workdir: Path) -> None:
    path = workdir / FILE
    path.write_text(path.read_text()[:-20])


def break_a_line(name: str, workdir: Path) -> None:
    path = workdir / name
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')


def remove(*names: str, workdir: Path) -> None:
    for name in names:
        (workdir / name).unlink()


def empty_checkpoints(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()


def empty_the_newest(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "checkpoints" / "4").mkdir()


def kill_in_the_save(workdir: Path) -> None:
    (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "4.orbax-checkpoint-tmp")


def checkpoints_are_a_file(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")


CONTINUED = [  # what happened to the workdir, what is said before anything compiles, the step that the run goes on from
    (cut_last_line, "", SAVED),
    (functools.partial(remove, FILE), "", SAVED),
    (functools.partial(remove, "config.gin", "operative_config.gin"), "", SAVED),
    (
        empty_checkpoints,
        r"DIR/checkpoints holds no checkpoint: starts over, and so does metrics\.jsonl, .*step 4",
        None,
    ),
    (kill_in_the_save, r"DIR/checkpoints/4\S+ was left unfinished; .*step 2", 2),
]
REFUSED = [
    (functools.partial(break_a_line, FILE), r"error: DIR/metrics\.jsonl:2 is no record: .*remove the line"),
    (functools.partial(break_a_line, SAMPLES), r"error: DIR/samples\.jsonl:2 is no record: .*remove the line"),
    (empty_the_newest, r"error: DIR/checkpoints/4: .*remove this directory and the run resumes from the one before"),
    (checkpoints_are_a_file, r"error: DIR/checkpoints is no directory; .*"),
]


def named(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{value.func.__name__} {' '.join(value.args)}"
    return value.__name__ if callable(value) else ""


@pytest.mark.parametrize(("change", "said", "step"), CONTINUED, ids=named)
def test_a_workdir_that_something_happened_to_goes_on(
    workdir: Path, call: Callable, undisturbed: dict, change: Callable, said: str, step: int | None
) -> None:
    change(workdir=workdir)
    status, text = call(workdir)
    before, _, after = text.partition(COMPILES)
    assert status == 0 and re.search(said.replace("DIR", str(workdir)), before), text
    assert (f"at step {step}\n" in after) == (step is not None)
    losses = runs.records(workdir)
    assert losses == {n: undisturbed[n] for n in losses} and losses.keys() >= set(range((step or 0) + 1, STEPS + 1))
    assert {"config.gin", "operative_config.gin"} <= {p.name for p in workdir.iterdir()}


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=named)
def test_a_workdir_that_cannot_go_on_is_refused_before_it_compiles(
    workdir: Path, call: Callable, change: Callable, said: str
) -> None:
    change(workdir=workdir)
    status, text = call(workdir)
    assert (status, COMPILES in text) == (2, False), text
    assert re.search(said.replace("DIR", str(workdir)), text), text
    if change is empty_the_newest:
        (workdir / "checkpoints" / "4").rmdir()
        assert "at step 2\n" in call(workdir)[1]


def lost_pictures(directory: Path) -> runs.Changes:
    entries = json.loads((directory / "held_out" / "data.json").read_text())
    kept = [entry | {"image": "gone/1.png"} for entry in entries if isinstance(entry.get("image"), str)]
    (directory / "held_out" / "lost.json").write_text(json.dumps(kept))
    return {"held_out/settings.DataConfig.path": str(directory / "held_out" / "lost.json")}


def no_answers(directory: Path) -> runs.Changes:
    (directory / "held_out" / "bad.json").write_text('[{"id": 1}, {"id": 2, "conversations": []}]')
    return {"held_out/settings.DataConfig.path": str(directory / "held_out" / "bad.json")}


def nothing_in_it(directory: Path) -> runs.Changes:
    (directory / "held_out" / "empty.json").write_text("[]")
    return {"held_out/settings.DataConfig.path": str(directory / "held_out" / "empty.json")}


def other_words(directory: Path) -> runs.Changes:
    (directory / "other").mkdir(exist_ok=True)
    tokenizer = corpus.write_tokenizer(directory / "other", 1)
    tokenizer.add_tokens(["q1"])
    tokenizer.save(str(directory / "other" / "tokenizer.json"))
    return {"held_out/settings.DataConfig.tokenizer": str(directory / "other" / "tokenizer.json")}


def too_long(directory: Path) -> runs.Changes:
    (directory / "held_out" / "long.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "so " * 40}, {"from": "gpt", "value": "a0"}]}])
    )
    return {"held_out/settings.DataConfig.path": str(directory / "held_out" / "long.json")}


HELD_OUT = [
    (lost_pictures, r"held_out/lost\.json: every one of its \d samples is left out, \d as bad"),
    (no_answers, r"held_out/bad\.json: every one of its 2 samples is left out, 2 as bad"),
    (nothing_in_it, r"held_out/empty\.json holds no conversation"),
    (too_long, r"held_out/long\.json: every one of its 1 samples is left out, 0 as bad and 1 as longer"),
    (other_words, r"other/tokenizer\.json .*train/tokenizer\.json.* set .*held_out.*tokenizer"),
]


@pytest.mark.parametrize(("make", "said"), HELD_OUT, ids=named)
def test_what_cannot_be_evaluated_is_refused_before_it_compiles(
    once: None, call: Callable, gin: Path, tmp_path: Path, make: Callable, said: str
) -> None:
    status, text = call(tmp_path / "run", eval_every=3, named=runs.held_out(gin) | make(gin.parent))
    assert (status, COMPILES in text) == (2, False) and re.search(said, text), text
    assert not (tmp_path / "run").exists()


def test_training_pictures_that_are_all_lost_are_known_before_it_compiles(
    once: None, call: Callable, gin: Path, tmp_path: Path
) -> None:
    path = lost_pictures(gin.parent)["held_out/settings.DataConfig.path"]
    status, text = call(tmp_path / "run", named={"train/settings.DataConfig.path": path})
    assert (status, COMPILES in text) == (2, False) and "every one of its" in text


CHART = """
chart/experiment.Encoder.model = @vit.ViT()
chart/experiment.Encoder.name = "chart"
chart/experiment.Encoder.field = "plots"
chart/experiment.Encoder.placeholder = "<plot>"
chart/experiment.Encoder.slots_per_group = 2
"""


def two_encoders(gin: Path) -> tuple[Path, runs.Changes]:
    (gin.parent / "two.gin").write_text(gin.read_text() + CHART)
    both = Reference("[@vision/experiment.Encoder(), @chart/experiment.Encoder()]")
    return gin.parent / "two.gin", settings(encoders=both)


def a_wide_projector(gin: Path) -> tuple[Path, runs.Changes]:
    return gin, {"vit.ViT.projector_width": 24}


UNEXPORTABLE = [
    (two_encoders, r"to_hf will refuse it whole: .*choose them with --modules \(of llm, vision, chart\)"),
    (a_wide_projector, r"to_hf will refuse it whole: ViT\.projector_width=24: .*only projector_width=16"),
]


@pytest.mark.parametrize(("make", "said"), UNEXPORTABLE, ids=named)
def test_a_run_that_no_class_of_transformers_holds_says_so_and_goes_on(
    prepared: None, gin: Path, tmp_path: Path, capsys: pytest.CaptureFixture, make: Callable, said: str
) -> None:
    file, changes = make(gin)
    with contextlib.suppress(StopIteration, AttributeError, KeyError, AssertionError):  # it is not compiled
        train.main(runs.arguments(file, tmp_path / "run", PLAIN | settings(steps=1) | changes))
    text = capsys.readouterr().out
    before, marker, _ = text.partition(COMPILES)
    assert marker and re.search(said, before), text


def test_a_folder_that_is_gone_when_a_run_resumes_is_named_and_the_run_goes_on(
    once: None, call: Callable, gin: Path, tmp_path: Path
) -> None:
    config = hf_folders.text(
        "llama", vocab_size=32, hidden_size=16, intermediate_size=32, head_dim=4, rms_norm_eps=1e-6
    )
    folder = hf_folders.write(tmp_path / "llama", config)
    assert call(tmp_path / "run", steps=2, init_from={"llm": str(folder)})[0] == 0
    folder.rename(tmp_path / "elsewhere")
    status, text = call(tmp_path / "run", init_from={"llm": str(folder)})
    assert status == 0 and "at step 2\n" in text, text
    assert f"{folder}: no such directory" in text.partition(COMPILES)[0], text


# -- one run in a workdir --------------------------------------------------------------------------------------------

HOLDER = "import sys, time; from pathlib import Path; from hetjax.run import lock\n"
HOLDER += "with lock.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"


@contextlib.contextmanager
def held_by_another(workdir: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)],
        stdout=subprocess.PIPE, cwd=runs.ROOT, env=runs.environment(),
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_second_run_is_refused_by_name_until_the_first_is_killed(workdir: Path, call: Callable) -> None:
    with held_by_another(workdir) as process:
        before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
        status, text = call(workdir)
        assert (status, COMPILES in text) == (2, False), text
        assert re.search(rf"error: --workdir={workdir} is in use by process {process.pid} on \S+ since 20\d\d-", text)
        assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
        assert convert.main(["to_hf", str(workdir), f"--out={workdir.parent / 'out'}"]) == 0, "reading is free"
    assert process.returncode == -signal.SIGKILL
    status, text = call(workdir)
    assert status == 0 and f"at step {SAVED}\n" in text
    assert "lock" not in {p.name for p in workdir.iterdir()}


def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(
    workdir: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    status, text = call(workdir)
    assert status == 0 and f"{workdir} cannot be locked (Operation not supported)" in text.partition(COMPILES)[0]


def test_a_workdir_without_permission_is_refused(
    once: None, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.open

    def opened(self: Path, *arguments: Any, **named: Any) -> Any:  # the superuser may write everywhere
        if self.parent == tmp_path / "run":
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
    status, text = call(tmp_path / "run")
    assert (status, COMPILES in text) == (2, False)
    assert f"error: --workdir={tmp_path / 'run'}: Permission denied; name a directory that can be written" in text


# -- whatever ends it ------------------------------------------------------------------------------------------------


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
    newest = max(checkpoint.steps_in(workdir / "checkpoints"))
    assert newest == saved or saved < 0, text
    assert re.search(rf"step {newest} .*{workdir}/checkpoints.*the same command continues", text), text
    assert re.search(said.replace("DIR", str(workdir)), text), text
    status, text = call(workdir, **changes)
    assert status == 0 and f"at step {newest}\n" in text
    losses = runs.records(workdir)
    assert losses == {n: undisturbed[n] for n in losses} and losses.keys() >= set(range(newest + 1, STEPS + 1))
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(STEPS)]


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
