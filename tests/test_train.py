"""`python -m hetjax.train` from end to end: what it writes and saves, and that only time depends on layouts."""

import math
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import Counter

from hetjax import generate, train
from hetjax.core.graph import Graph
from hetjax.core.trainer import State, Trainer
from hetjax.data import ItemSpec, Pictures
from hetjax.generate.prompt import read_items
from hetjax.judge import reference
from hetjax.run import config, evaluate, experiment
from hetjax.run.checkpoint import CheckpointError, Checkpoints
from hetjax.run.experiment import Experiment
from hetjax.run.log import Log
from hetjax.run.metrics import FILE, SAMPLES, read_jsonl
from hetjax.run.named import to_names

STEPS, MODULES = 30, ("vision", "llm")
OTHER = runs.layouts(vision=dict(dp=4, tp=2), llm=dict(dp=4, tp=2))  # both on all eight devices


@pytest.fixture(scope="module")
def gin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(gin: Path) -> tuple[Path, runs.Changes]:
    """The directory of a run with everything switched on, and its settings."""
    changes = runs.settings(steps=STEPS, save_every=10, keep=2, eval_every=15, tensorboard=True) | runs.held_out(gin)
    changes |= runs.settings(eval_samples=runs.HELD_OUT, eval_sample_tokens=4)
    workdir = gin.parent / "whole"
    runs.train(gin, workdir, changes)
    return workdir, changes


def test_every_step_has_its_numbers(whole: tuple[Path, runs.Changes]) -> None:
    records = [r for r in read_jsonl(whole[0] / FILE) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    times = ["tokens_per_second", "images_per_second", "step_seconds", "data_wait_seconds"]
    for record in records:
        norms = [record[f"gradient_norm/{m}"] for m in MODULES]
        assert record["gradient_norm"] == pytest.approx(math.hypot(*norms), rel=1e-5)
        assert all(record[name] >= 0 for name in times) and all(record[f"tflops_per_device/{m}"] > 0 for m in MODULES)
        assert record["learning_rate"] == pytest.approx(1e-2 * min(record["step"] / 3, 1))
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]


def test_rates_are_what_the_data_hold_over_the_time(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    records = [r for r in read_jsonl(whole[0] / FILE) if "loss" in r]
    with experiment.train_loader(runs.load(gin, {})) as loader:
        for record in records:
            step = loader.next_step(2)
            tokens = sum(np.count_nonzero(m["segment_ids"]) for m in step)
            pictures = sum(m["vision.pixels"].any((1, 2, 3)).sum() for m in step)
            assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(tokens)
            assert record["images_per_second"] * record["step_seconds"] == pytest.approx(pictures)


def test_the_last_checkpoints_the_configuration_and_tensorboard_are_there(whole: tuple[Path, runs.Changes]) -> None:
    workdir, changes = whole
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["20", "30"]
    assert [p.stat().st_size > 0 for p in (workdir / "tensorboard").iterdir()] == [True]
    gin = workdir.parent / "run.gin"
    asked = (workdir / "config.gin").read_text()
    assert gin.read_text() in asked and all(f"{name} = {value!r}" in asked for name, value in changes.items())
    assert config.load([str(workdir / "operative_config.gin")], [], Experiment) == runs.load(gin, changes)


def test_the_loss_curve_is_the_same_under_other_layouts(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    workdir = gin.parent / "other"
    output = runs.train(gin, workdir, OTHER | runs.settings(steps=6))
    assert "7       layers 0-1 dp3 tp1  layers 0-1 dp3 tp1" in output
    assert not (workdir / "tensorboard").exists()
    for name in ("loss", "gradient_norm", "gradient_norm/vision"):
        other, expected = runs.records(workdir, name), runs.records(whole[0], name)
        np.testing.assert_allclose([other[i] for i in range(1, 7)], [expected[i] for i in range(1, 7)], rtol=1e-5)


def test_ctrl_c_saves_and_the_same_command_continues(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    workdir = gin.parent / "stopped"
    process = runs.start(gin, workdir, runs.settings(steps=STEPS))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=100)
    saved = re.search(r"SIGINT: saved step (\d+) in \S+checkpoints; the same command continues", rest)
    assert process.returncode == 0 and saved, rest
    step = int(saved[1])
    assert list(runs.records(workdir)) == list(range(1, step + 1)) and 3 <= step < STEPS
    output = runs.train(gin, workdir, runs.settings(steps=STEPS))
    assert re.search(rf"resumed from \S+checkpoints at step {step}\n", output)
    assert runs.records(workdir) == runs.records(whole[0]), "bit for bit"


def test_the_evaluation_is_that_of_full_logits_on_one_device(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    """The run's llm has cp=2; the judge runs the saved parameters without a layout, and counts rows, not samples."""
    workdir, changes = whole
    run = runs.load(gin, changes)
    trainer = experiment.build(run)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        params = jax.tree.map(jnp.asarray, trainer.whole(checkpoints.restore(trainer)[0].params))
    evaluated = jax.jit(lambda batch: loss_and_hits(trainer.graph, params, batch))
    total = tokens = rows = right = blind = found = 0.0
    held_out = experiment.held_out_loader(run)
    assert held_out is not None
    for batch, _ in held_out.one_pass():
        loss, hits = evaluated(batch)
        _, hits_blind = evaluated(batch | {"vision.pixels": np.zeros_like(batch["vision.pixels"])})
        asked = batch["weights"] > 0
        total, tokens = total + float(loss) * asked.sum(), tokens + asked.sum()
        found += (hits & asked).sum()
        rows += asked.any(1).sum()
        right += (np.where(asked, hits, True).all(1) & asked.any(1)).sum()
        blind += (np.where(asked, hits_blind, True).all(1) & asked.any(1)).sum()
    assert rows == runs.HELD_OUT and 0 < blind < right < rows, "the pictures matter"
    names = ("loss", "accuracy", "accuracy_blank", "loss_blank")
    last = {name: runs.records(workdir, f"eval/{name}") for name in names}
    assert [list(v) for v in last.values()] == [[15, STEPS], [15, STEPS], [STEPS], [STEPS]]
    assert last["loss_blank"][STEPS] > last["loss"][STEPS]
    assert last["loss"][STEPS] == pytest.approx(total / tokens, rel=1e-5)
    assert runs.records(workdir, "eval/token_accuracy")[STEPS] == found / tokens
    assert last["accuracy"][STEPS] == right / rows and last["accuracy_blank"][STEPS] == blind / rows
    shown = [r for r in read_jsonl(workdir / SAMPLES) if r["step"] == STEPS]
    assert sum(r["answer"] == r["expected"] for r in shown) >= right, "greedy decoding, of the last turn alone"
    known = 4  # the first asker of each kind of question; of two equally common answers the first counts
    assert runs.records(workdir, "eval/accuracy_prior") == {STEPS: known / runs.HELD_OUT}


def test_the_samples_of_an_evaluation_are_what_generate_answers(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    """The run's own programs, under cp=2 and tp=2 beside another mesh, against a cache on one device."""
    workdir, changes = whole
    shown = [r for r in read_jsonl(workdir / SAMPLES) if r["step"] == STEPS]
    held_out = experiment.held_out_loader(runs.load(gin, changes))
    assert held_out is not None
    samples = held_out.samples
    assert [(r["id"], r["question"], r["expected"]) for r in shown] == [
        (s.id, s.turns[-2], s.turns[-1]) for s in samples.values()
    ]
    root = held_out.config.media_path
    files = lambda sample: {"image": tuple(str(root / name) for name in sample.files["vision"])}
    model = generate.load(workdir)
    prompts = [generate.Prompt(s.turns[:-1], files(s)) for s in samples.values()]
    assert [r["answer"] for r in shown] == [a.text for a in model(prompts, max_new_tokens=4)]
    spelled = {tuple(model.chat.encode(p, read_items(p, model.chat.items)).tokens) for p in prompts}
    batches = [batch for batch, _ in held_out.one_pass()]
    rows = [row for b in batches for row in zip(b["tokens"], b["weights"] > 0, strict=True) if row[1].any()]
    assert spelled == {tuple(before_the_last_answer(*row)) for row in rows}, "the ids of the training"


def before_the_last_answer(tokens: np.ndarray, trained: np.ndarray) -> list[int]:
    """The tokens of a row up to the one whose target is the first of its last answer."""
    starts = np.flatnonzero(trained & ~np.roll(trained, 1))
    return tokens[: starts[-1] + 1].tolist()


def test_with_several_encoders_each_is_blank_alone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [ItemSpec("vision", 4, Pictures(8, 8)), ItemSpec("chart", 4, Pictures(8, 8), field="chart")]
    batch = {f"{item.name}.pixels": np.ones((1, 8, 8, 3), np.float32) for item in items}

    class HeldOut:
        samples: ClassVar = {}

        def __init__(self) -> None:
            self.items = items

        def one_pass(self) -> list:
            return [(batch, np.full((1, 4), -1))]

    def score(trainer: Any, state: Any, batches: Any) -> evaluate.Score:
        ((arrays, _),) = batches
        seen = sum(10**n * float(arrays[f"{item.name}.pixels"].any()) for n, item in enumerate(items))
        return evaluate.Score(seen, 0.0, 0.0, frozenset())

    monkeypatch.setattr(evaluate, "score", score)
    values = evaluate.last_values(None, None, HeldOut(), HeldOut(), 0)
    losses = {name: value for name, value in values.items() if "loss" in name}
    chart_alone, vision_alone = "eval/loss_blank_vision", "eval/loss_blank_chart"
    assert losses == {"eval/loss": 11, "eval/loss_blank": 0, chart_alone: 10, vision_alone: 1}


def loss_and_hits(graph: Graph, params: Any, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Mean loss over the targets, and where the most likely token is the target."""
    rows = reference.apply_module(graph.module("vision").definition, params["vision"], {}, batch)["x"]
    y = reference.apply_module(graph.sink.definition, params["llm"], {"vision": rows}, batch)
    return reference.mean_loss(graph, params, batch), jnp.argmax(y["x"] @ y["head"], -1) == batch["targets"]


def test_a_finished_run_called_again_repeats_nothing(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    workdir, changes = whole
    before = (workdir / FILE).read_text()
    train.train(runs.load(gin, changes), workdir)
    assert (workdir / FILE).read_text() == before


def test_a_run_that_ends_before_its_checkpoint_is_refused(whole: tuple[Path, runs.Changes], gin: Path) -> None:
    workdir, changes = whole
    before = (workdir / "config.gin").read_text()
    shorter = runs.load(gin, changes | runs.settings(steps=STEPS - 1))
    with pytest.raises(CheckpointError, match=f"the newest is of step {STEPS}; this run ends at step {STEPS - 1}: set"):
        train.train(shorter, workdir, {"config.gin": "of the shorter run"})
    assert (workdir / "config.gin").read_text() == before


# -- one step after another, in this process -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(gin: Path) -> tuple[Experiment, Trainer, list]:
    """The run, its compiled trainer and the microbatches of three steps."""
    run = runs.load(gin, runs.settings(steps=3))
    trainer = experiment.build(run)
    trainer.compile()
    with experiment.train_loader(run) as loader:
        return run, trainer, [loader.next_step(run.num_microbatches) for _ in range(3)]


def values(trainer: Trainer, state: State) -> dict[str, np.ndarray]:
    """Parameters and optimizer state by name."""
    return {name: np.asarray(a) for name, a in to_names(trainer, state).items()}


def equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_step_that_is_not_finite_is_skipped_in_every_module(running: tuple, capsys: pytest.CaptureFixture) -> None:
    run, trainer, (first, second, _) = running
    state, _ = trainer.step(trainer.init(), first)
    before = values(trainer, state)
    pixels = second[1]["vision.pixels"].copy()
    pixels[second[1]["vision.index"].max() // runs.ITEM.rows] = np.inf
    bad = [second[0], second[1] | {"vision.pixels": pixels}]
    lines = Lines()
    with experiment.train_loader(run) as loader:
        log = Log(run, trainer, loader, lines)
        state, outcome = trainer.step(state, bad)
        log.step(2, bad, outcome)
        log.settle()
    assert not bool(outcome.ok) and equal(values(trainer, state), before)
    said = re.search(r"step 2 was skipped in every module: not finite: (.*)", capsys.readouterr().out)
    assert said and set(said[1].split(", ")) <= {f"vision/{name}" for name in _leaves(trainer, "vision")}
    assert list(lines.values) == [2] and not math.isfinite(lines.values[2]["loss"])
    state, _ = trainer.step(state._replace(step=1), second)
    other, _ = trainer.step(trainer.init(), first)
    other, _ = trainer.step(other, second)
    assert equal(values(trainer, state), values(trainer, other)), "no accumulator kept the infinity"


def _leaves(trainer: Trainer, module: str) -> set[str]:
    return {n.removeprefix(f"params/{module}/") for n in values(trainer, trainer.init()) if n.startswith("params")}


class Lines:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.values: dict[int, Mapping[str, Any]] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.values[step] = values

    def close(self) -> None: ...


@pytest.mark.parametrize("key", [("vision", 0), ("llm", 0)])
def test_one_bad_gradient_stops_every_module_and_is_named(
    running: tuple, key: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer, (first, second, _) = running
    state, _ = trainer.step(trainer.init(), first)
    before = values(trainer, state)
    programs = trainer.pipeline.stages[key].programs
    name = "reduce" if "reduce" in programs else "measure"
    complete = programs[name]

    def broken(acc: dict) -> Any:
        leaf = acc["layers"]["attention"]["q"]
        acc["layers"]["attention"]["q"] = leaf.at[(0,) * leaf.ndim].set(jnp.nan)
        return complete(acc)

    monkeypatch.setitem(programs, name, broken)
    state, outcome = trainer.step(state, second)
    assert trainer.finish.not_finite(outcome) == [f"{key[0]}/layers/attention/q"]
    assert not bool(outcome.ok) and math.isfinite(float(outcome.loss))
    assert equal(values(trainer, state), before)


def test_steps_after_the_first_compile_nothing_and_fetch_nothing(
    running: tuple, compilations: Counter, host_fetches: Counter
) -> None:
    _, trainer, (first, *more) = running
    state, outcome = trainer.step(trainer.init(), first)
    jax.block_until_ready(outcome.loss)
    compilations.reset()
    host_fetches.reset()
    for microbatches in more:
        state, outcome = trainer.step(state, microbatches)
    assert (compilations.count, host_fetches.count) == (0, 0)
    assert float(outcome.loss) > 0 and host_fetches.count == 1, "the counter counts"
