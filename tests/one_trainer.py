"""Fixtures for runs in this process that share one trainer, which is compiled once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import COMPILES, DRAWN, PLAIN, SAVED, STEPS, settings

from hetjax import train
from hetjax.core.trainer import Trainer
from hetjax.run import curves, experiment, named


@pytest.fixture(scope="session")
def gin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write(tmp_path_factory.mktemp("wild"))


@pytest.fixture(scope="session")
def trainer(gin: Path) -> Trainer:
    """That of every run here."""
    built = experiment.build(runs.load(gin, PLAIN))
    built.compile(evaluate=True, others=named.programs(built))
    return built


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run says when it would compile, and draws no curves."""
    monkeypatch.setattr(curves, "draw", lambda path, runs: path.write_text(DRAWN))
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
