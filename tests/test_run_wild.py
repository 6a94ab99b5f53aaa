"""How runs begin in the wild: what cannot go well is said before anything compiles."""

import contextlib
import errno
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import corpus
import hf_folders
import pytest
import runs
from runs import COMPILES, PLAIN, SAVED, STEPS, Reference, settings

from hetjax import convert, train
from hetjax.core.trainer import Trainer
from hetjax.run.metrics import FILE, SAMPLES

pytest_plugins = ["one_trainer"]


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
    workdir: Path, call: Callable, trainer: Trainer, undisturbed: dict, change: Callable, said: str, step: int | None
) -> None:
    change(workdir=workdir)
    status, text = call(workdir)
    before, _, after = text.partition(COMPILES)
    assert status == 0 and re.search(said.replace("DIR", str(workdir)), before), text
    assert (f"at step {step}\n" in after) == (step is not None)
    losses = runs.records(workdir)
    assert losses == {n: undisturbed[n] for n in losses} and losses.keys() >= set(range((step or 0) + 1, STEPS + 1))
    assert {"config.gin", "operative_config.gin"} <= {p.name for p in workdir.iterdir()}
    promised = json.loads((workdir / "schedule.json").read_text())
    assert promised == {"phase 1": trainer.pipeline.schedule.forecast.numbers()}


def test_a_run_measures_its_stages_once(workdir: Path, call: Callable, undisturbed: dict) -> None:
    for steps, said in {6: "measured: vision/0 ", STEPS: f"as {workdir}/costs.json has them: vision/0 "}.items():
        status, text = call(workdir, steps=steps, schedule_costs="measured")
        assert status == 0 and f"costs of stages, forward/backward, {said}" in text.partition(COMPILES)[2], text
        losses = runs.records(workdir)
        assert losses == {n: undisturbed[n] for n in losses} and max(losses) == steps


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
