"""What a run was asked for, as files in its workdir: written once the run is accepted, and kept when others follow."""

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hetjax.core.trainer import Trainer
from hetjax.data import ChatTemplate, DataConfig
from hetjax.run import cluster, lock
from hetjax.run.experiment import Experiment

OPERATIVE, SCHEDULE = "operative_config.gin", "schedule.json"
ARRAYS = re.compile(r"/model/|\.(encoders|model|phases|name|frozen|trainable|momentum)$")  # what decides a run's arrays

DATE = re.compile(r"ChatTemplate\.date = '([0-9-]+)'")


def dated(run: Experiment, workdir: Path) -> Experiment:
    """The run with the date that its chat templates write as today: the one on which it started, so that ids stay as
    they are when it resumes."""
    path = workdir / OPERATIVE
    told = DATE.search(path.read_text()) if path.is_file() else None
    day = told[1] if told else datetime.date.today().isoformat()

    def with_date(data: DataConfig) -> DataConfig:
        if not isinstance(data.template, ChatTemplate) or data.template.date is not None:
            return data
        return dataclasses.replace(data, template=dataclasses.replace(data.template, date=day))

    held_out = None if run.held_out is None else with_date(run.held_out)
    return dataclasses.replace(run, data=with_date(run.data), held_out=held_out)


@contextlib.contextmanager
def made(workdir: Path) -> Iterator[None]:
    """The directory, made if it is not there, for this process alone, or for all that are one run with it, of which
    the first one holds it.

    Raises ValueError if it cannot be made or written, or if another run uses it."""
    with contextlib.ExitStack() as stack:
        if cluster.is_primary():
            with _explained(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.held(workdir))
        cluster.meet("workdir made")
        yield


def write(workdir: Path, files: Mapping[str, str], resumed: int | None, *, trains: bool = True) -> None:
    """Writes `files` by name. Raises ValueError if `workdir` cannot be written.

    Of a run that resumes at step `resumed` with other files, those of before stay as NAME_until_step_N: what was first
    asked for up to there. A run without a checkpoint starts over, and so does its record. Of one that `trains` no more
    the files stay, because exports and answers go by them. Of several processes the first one writes.
    """
    if not cluster.is_primary():
        return
    with _explained(workdir):
        for name, text in files.items():
            path, new = workdir / name, workdir / f"{name}.new"
            if not trains and path.exists():
                if name == OPERATIVE and path.read_text(encoding="utf-8") != text:
                    print(f"no step is left to train: {path} stays as it is, and other settings go by unread")
                continue
            new.write_text(text, encoding="utf-8")
            kept = path.with_stem(f"{path.stem}_until_step_{resumed}")
            if resumed is not None and path.exists() and path.read_text(encoding="utf-8") != text and not kept.exists():
                os.replace(path, kept)
            os.replace(new, path)


def promised(trainers: Sequence[Trainer]) -> str:
    """What the schedules of a run's phases promise, as JSON."""
    phases = enumerate(trainers, 1)
    return json.dumps({f"phase {n}": t.pipeline.schedule.forecast.numbers() for n, t in phases}, indent=1) + "\n"


def changed(workdir: Path, operative: str) -> str:
    """The settings that decide which arrays a run has, where the operative configuration in `workdir` differs."""
    before, now = settings(workdir), _settings(operative)
    found = {name: value for name, value in now.items() if ARRAYS.search(name) and before.get(name, value) != value}
    return ", ".join(f"{name} = {value}, which was {before[name]}" for name, value in found.items())


def settings(workdir: Path) -> dict[str, str]:
    """Those of the operative configuration in `workdir`, by their names; none where there is no such file."""
    path = workdir / OPERATIVE
    return _settings(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _settings(operative: str) -> dict[str, str]:
    pairs = (line.partition(" = ") for line in operative.splitlines())
    return {name: value for name, equals, value in pairs if equals and not name.startswith("#")}


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: {error.strerror}; name a directory that can be written") from error
