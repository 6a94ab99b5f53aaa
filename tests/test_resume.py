"""A run that is killed at any moment, also while it saves, and started again ends as one that was left alone."""

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import runs

from hetjax import train
from hetjax.core.trainer import State, Trainer
from hetjax.run import experiment
from hetjax.run.checkpoint import Checkpoints
from hetjax.run.metrics import FILE

STEPS = 200  # more than twenty calls can make before they are killed
SAVES = runs.settings(save_every=2)
FLOAT64 = runs.settings(param_dtype="float64") | {
    "llm/experiment.LanguageModel.compute_dtype": "float64",
    "vision/experiment.Encoder.compute_dtype": "float64",
}
LAYOUTS = [  # that of the gin file, colocated, the encoder in stages, the llm elsewhere
    {},
    runs.layouts(vision=dict(dp=4, tp=2), llm=dict(dp=2, pp=2, tp=2)),
    runs.layouts(vision=dict(pp=2, devices="2-3"), llm=dict(dp=4, devices="4-7")),
    runs.layouts(vision=dict(dp=4, devices="4-7"), llm=dict(pp=2, cp=2, devices="0-3")),
]


class Moment(NamedTuple):
    """When a call is killed: so many seconds after it wrote its n-th step (its 0th is its start)."""

    steps: int
    seconds: float


class Killed(NamedTuple):
    """What became of a run."""

    workdir: Path
    resumed: set[int]  # steps that a call went on from
    saving: int  # kills that met it while it saved


def at_random(seed: int, kills: int = 20) -> list[Moment]:
    """Some while a call starts, most while it trains and saves; a save takes some four steps' time."""
    rng = np.random.default_rng(seed)
    steps = [int(n) for n in rng.integers(0, 9, kills)]
    return [Moment(n, rng.uniform(0, 0.2) if n else rng.uniform(0, 5)) for n in steps]


def run_killed(gin: Path, changes: Sequence[runs.Changes], moments: Sequence[Moment]) -> Killed:
    """A run that came to its end after a kill at each moment. Its calls take the settings in `changes` in turn."""
    workdir = gin.parent / "killed"
    turns = itertools.cycle(changes)
    said, saving = "", 0
    for moment in moments:
        process = runs.start(gin, workdir, next(turns))
        assert process.stdout is not None
        with process.stdout as output:
            seen = 0
            while seen < moment.steps and (line := output.readline()):
                said, seen = said + line, seen + line.startswith("step ")
            time.sleep(moment.seconds)
            saving += any((workdir / "checkpoints").glob("*tmp*"))
            assert process.poll() is None, f"it ended before it could be killed: {said}{output.read()}"
            process.kill()
            process.wait()
    said += runs.train(gin, workdir, next(turns))
    return Killed(workdir, {int(n) for n in re.findall(r"resumed from \S+ at step (\d+)", said)}, saving)


def curves(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    records = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    kept = ("loss", "learning_rate", "gradient_norm", "eval/")
    return [{k: v for k, v in record.items() if k == "step" or k.startswith(kept)} for record in records]


def undisturbed(gin: Path, changes: runs.Changes) -> list[dict[str, Any]]:
    workdir = gin.parent / "undisturbed"
    train.train(runs.load(gin, changes), workdir)
    return curves(workdir)


def test_a_run_killed_twice_ends_as_if_it_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gin = runs.write(tmp_path)
    changes = SAVES | runs.settings(steps=14)
    plain = Checkpoints.save

    def save(self: Checkpoints, trainer: Trainer, state: State, data: Mapping[str, Any]) -> None:
        assert curves(self.directory.parent)[-1]["step"] == state.step, "a kill after the save would lose the line"
        plain(self, trainer, state, data)

    monkeypatch.setattr(Checkpoints, "save", save)
    expected = undisturbed(gin, changes)
    assert [r["step"] for r in expected] == list(range(1, 15))
    killed = run_killed(gin, [changes], [Moment(6, 0.1), Moment(1, 0.0)])
    assert killed.resumed and curves(killed.workdir) == expected


@pytest.mark.slow
def test_a_run_killed_20_times_ends_bit_for_bit_as_if_it_was_not(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = SAVES | runs.settings(steps=STEPS, eval_every=30) | runs.held_out(gin)
    expected = undisturbed(gin, changes)
    killed = run_killed(gin, [changes], at_random(seed=2))
    assert killed.saving > 0 and len(killed.resumed) >= 5, killed
    assert curves(killed.workdir) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_run_killed_20_times_may_change_its_layouts_each_time(tmp_path: Path) -> None:
    """In float64: in float32 the layouts' rounding grows to more than 1e-6 within a hundred steps."""
    gin = runs.write(tmp_path)
    changes = [SAVES | FLOAT64 | runs.settings(steps=STEPS) | layout for layout in LAYOUTS]
    for other in changes[1:]:  # the compilation cache gets their programs; killed runs only read it
        experiment.build(runs.load(gin, other)).compile()
    expected = undisturbed(gin, changes[0])
    killed = run_killed(gin, changes, at_random(seed=3))
    assert killed.saving > 0 and len(killed.resumed) >= 5, killed
    got = curves(killed.workdir)
    assert [r["step"] for r in got] == [r["step"] for r in expected] == list(range(1, STEPS + 1))
    for name in ("loss", "learning_rate", "gradient_norm", "gradient_norm/vision", "gradient_norm/llm"):
        np.testing.assert_allclose([r[name] for r in got], [r[name] for r in expected], rtol=1e-6, err_msg=name)
