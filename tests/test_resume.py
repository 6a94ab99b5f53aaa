"""A run that is killed at any moment, also while it saves, and started again ends as one that was left alone."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from hetjax import experiment, train
from hetjax.metrics import FILE

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


def run_killed(gin: Path, changes: Sequence[runs.Changes], *, kills: int, seed: int) -> tuple[Path, int]:
    """The directory of a run that came to its end after `kills` kills, and how many of them met it saving.

    The calls take the settings in `changes` in turn.
    """
    workdir = gin.parent / "killed"
    rng = np.random.default_rng(seed)
    turns = itertools.cycle(changes)
    saving = 0
    for _ in range(kills):
        process = runs.start(gin, workdir, next(turns))
        assert process.stdout is not None
        with process.stdout as output:
            steps = rng.integers(0, 4)  # none: it dies while it starts
            steps_seen = (line for line in output if line.startswith("step "))
            said = list(itertools.islice(steps_seen, int(steps)))
            time.sleep(rng.uniform(0, 0.3) if steps else rng.uniform(0, 5))
            saving += any((workdir / "checkpoints").glob("*tmp*"))
            assert process.poll() is None, f"it ended before it could be killed: {said}{output.read()}"
            process.kill()
            process.wait()
    runs.train(gin, workdir, next(turns))
    return workdir, saving


def curves(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    records = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    kept = ("loss", "learning_rate", "gradient_norm", "eval/")
    return [{k: v for k, v in record.items() if k == "step" or k.startswith(kept)} for record in records]


def undisturbed(gin: Path, changes: runs.Changes) -> list[dict[str, Any]]:
    workdir = gin.parent / "undisturbed"
    train.train(runs.load(gin, changes), workdir)
    return curves(workdir)


def test_a_run_killed_twice_ends_as_if_it_was_not(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = SAVES | runs.settings(steps=16)
    expected = undisturbed(gin, changes)
    assert [r["step"] for r in expected] == list(range(1, 17))
    workdir, _ = run_killed(gin, [changes], kills=2, seed=1)
    assert curves(workdir) == expected


@pytest.mark.slow
def test_a_run_killed_20_times_ends_bit_for_bit_as_if_it_was_not(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = SAVES | runs.settings(steps=120, eval_every=30) | runs.held_out(gin)
    expected = undisturbed(gin, changes)
    workdir, saving = run_killed(gin, [changes], kills=20, seed=2)
    assert saving > 0, "no kill met a save"
    assert curves(workdir) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_run_killed_20_times_may_change_its_layouts_each_time(tmp_path: Path) -> None:
    """In float64: twenty layouts' rounding in float32 grows to more than 1e-6 in a hundred steps."""
    gin = runs.write(tmp_path)
    changes = [SAVES | FLOAT64 | runs.settings(steps=120) | layout for layout in LAYOUTS]
    for other in changes[1:]:  # the compilation cache gets their programs; killed runs only read it
        experiment.build(runs.load(gin, other)).compile()
    expected = undisturbed(gin, changes[0])
    workdir, saving = run_killed(gin, changes, kills=20, seed=3)
    assert saving > 0, "no kill met a save"
    got = curves(workdir)
    assert [r["step"] for r in got] == [r["step"] for r in expected] == list(range(1, 121))
    for name in ("loss", "learning_rate", "gradient_norm", "gradient_norm/vision", "gradient_norm/llm"):
        np.testing.assert_allclose([r[name] for r in got], [r[name] for r in expected], rtol=1e-6, err_msg=name)
