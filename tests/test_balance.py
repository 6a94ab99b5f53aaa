"""Routers of sigmoids with a bias that loads move, and an expert to which all tokens go.

Under any layout, in steps that are skipped, in runs that resume, frozen or not."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_parity import HIGH, LOW, SGD, Case, run
from test_router import loads

from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.trainer import State, Trainer
from hetjax.run.checkpoint import Checkpoints, to_names
from models.moe import Experts, route

RATE = 0.05  # so large that the bias decides from the second step on
BIASED = Experts(
    count=8,
    per_token=2,
    width=12,
    dense_layers=(1,),
    scores="sigmoid",
    selection_bias=True,
    bias_rate=RATE,
    groups=4,
    chosen_groups=2,
    scale=1.5,
    shared_width=8,
    shared_gate=True,
)
SHAPE = tiny.Shape(microbatches=2)
BIASES_ALONE = (("frozen", ("llm/*",)), ("trainable", ("llm/first/*", "llm/layers/moe/bias")))
CASES = {
    "dp 2 tp 2 pp 2": Case(Layout(dp=2, tp=2, pp=2), Layout(dp=4)),
    "ep 4 of tp and dp": Case(Layout(dp=2, tp=2, ep=4, devices=LOW), Layout(tp=2, devices=HIGH[:1] + "-5")),
    "tp 4 sp, ep 2": Case(Layout(tp=4, sp=True, ep=2), Layout(dp=4)),
    "tp 4, ep 2": Case(Layout(tp=4, ep=2), Layout(dp=4)),
    "cp 2 tp 2 sp": Case(Layout(cp=2, tp=2, sp=True), Layout(dp=2)),
    "cp 2 pp 2, ep 2": Case(Layout(cp=2, pp=2, ep=2), Layout(dp=2)),
    "dp 2 pp 2, ep 2, zero 3": Case(Layout(dp=2, pp=2, ep=2, zero=3), Layout(dp=4)),
    "frozen but for biases, pp 4": Case(Layout(dp=2, pp=4), Layout(dp=4), changes=BIASES_ALONE),
    "frozen": Case(Layout(dp=2, pp=2), Layout(dp=4), changes=(("frozen", ("llm/layers/moe/*",)),)),
}
DEFAULT = {"frozen but for biases, pp 4"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_steps_are_the_references(name: str) -> None:
    case = dataclasses.replace(CASES[name], experts=BIASED, shape=SHAPE)
    for report in run(case, SGD, jnp.float64, 4):
        assert report.within(loss=1e-11, leaves=1e-10, params=1e-11), report


def build(llm: Layout = Layout(pp=2, dp=2), experts: Experts = BIASED, **settings: Any) -> Trainer:
    graph = vlm((), Module("llm", tiny.decoder(experts=experts).module(jnp.float32), llm))
    return tiny.trainer(graph, SHAPE, OptimizerConfig(weight_decay=0.1, **settings))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return build()


def biases(trainer: Trainer, state: State) -> np.ndarray:
    """[layers with experts, experts]."""
    return trainer.whole(state.params)["llm"]["layers"]["moe"]["bias"]


def step(trainer: Trainer, state: State, seed: int, **changes: float) -> tuple[State, Any]:
    made = tiny.microbatches(SHAPE, (), seed=seed)
    return trainer.step(state, [m | {k: np.full_like(m[k], v) for k, v in changes.items()} for m in made])


def test_a_bias_rises_where_fewer_tokens_than_the_mean_went_and_falls_where_more_did(trainer: Trainer) -> None:
    state, outcome = step(trainer, trainer.init(), 0)
    routed = np.asarray(outcome.routed["llm"])
    np.testing.assert_array_equal(biases(trainer, state), np.float32(RATE) * np.sign(routed.mean(1)[:, None] - routed))
    real = sum(int((m["segment_ids"] > 0).sum()) for m in tiny.microbatches(SHAPE, (), seed=0))
    assert routed.sum(1).tolist() == [2 * real] * 3 and len({*biases(trainer, state).reshape(-1).tolist()}) > 1


def test_a_step_that_does_not_count_moves_no_bias(trainer: Trainer) -> None:
    state, _ = step(trainer, trainer.init(), 0)
    before = biases(trainer, state)
    state, outcome = step(trainer, state, 1, weights=np.nan)
    assert not outcome.ok
    np.testing.assert_array_equal(biases(trainer, state), before)
    state, outcome = step(trainer, state, 1)
    assert outcome.ok and (biases(trainer, state) != before).any()


def test_a_bias_has_no_optimizer_state_and_a_run_resumes_with_it_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    state = trainer.init()
    for seed in range(2):
        state, _ = step(trainer, state, seed)
    names = to_names(trainer, state)
    assert [n for n in names if n.endswith("/bias")] == [f"params/llm/layers/{i:04d}/moe/bias" for i in (0, 2, 3)]
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(trainer, state, {})
        checkpoints.wait()
        after, outcome = step(trainer, state, 2)
        again, repeated = step(trainer, checkpoints.restore(trainer)[0], 2)
    assert float(outcome.loss) == float(repeated.loss)
    jax.tree.map(np.testing.assert_array_equal, trainer.whole(after.params), trainer.whole(again.params))


@pytest.mark.parametrize(
    ("rate", "frozen"),
    [
        pytest.param(0.0, (), id="no rate"),
        pytest.param(RATE, ("llm/layers/moe/bias",), id="its path is frozen", marks=pytest.mark.slow),
    ],
)
def test_a_bias_that_stays_still_chooses(rate: float, frozen: tuple[str, ...]) -> None:
    trainer = build(Layout(), dataclasses.replace(BIASED, groups=1, chosen_groups=1, bias_rate=rate), frozen=frozen)
    params = trainer.initial_params()
    bias = np.zeros((3, 8), np.float32)
    bias[:, [2, 5]] = 9
    layers = params["llm", 0]["layers"]
    layers["moe"]["bias"] = jax.device_put(bias, layers["moe"]["bias"].sharding)
    state, outcome = step(trainer, trainer.start(params), 0)
    np.testing.assert_array_equal(biases(trainer, state), bias)
    assert np.asarray(outcome.routed["llm"]).argsort(1)[:, -2:].tolist() == [[2, 5]] * 3
    assert (np.asarray(outcome.routed["llm"]) > 0).sum() == 6


def test_weights_are_of_the_scores_without_the_bias() -> None:
    rng = np.random.default_rng(0)
    tokens, router = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 16), (16, 8)))
    liking = jnp.zeros(8).at[jnp.array([2, 3, 6])].set(9.0)
    routed = route(tokens, router, liking, dataclasses.replace(BIASED, groups=1, chosen_groups=1, per_token=3))
    assert all(set(chosen) == {2, 3, 6} for chosen in routed.chosen.tolist())
    scores = np.take_along_axis(1 / (1 + np.exp(-np.asarray(tokens @ router))), np.asarray(routed.chosen), 1)
    np.testing.assert_allclose(routed.weights, 1.5 * scores / scores.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_the_bias_alone_balances_and_one_with_a_bias_that_stays_does_not() -> None:
    biased = Experts(8, 2, 12, dense_layers=(0,), scores="sigmoid", selection_bias=True, bias_rate=0.01)
    moving, still = loads(biased), loads(dataclasses.replace(biased, bias_rate=0.0))
    layer = "expert_load/llm/1"
    assert all(record.keys() == {layer} for record in moving)
    assert min(moving[0][layer], still[0][layer]) > 2
    assert max(record[layer] for record in moving[-4:]) < 1.5
    assert min(record[layer] for record in still[-4:]) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scores="tanh"), "Experts.scores='tanh'; it must be one of softmax, sigmoid"),
        (dict(scores="sigmoid", balance_loss=0.1), "Experts.balance_loss=0.1 is a loss of softmax scores"),
        (dict(scores="sigmoid", z_loss=0.1), "Experts.z_loss=0.1 is a loss of softmax scores"),
        (dict(bias_rate=0.1), "Experts.bias_rate=0.1 moves no bias; set selection_bias=True"),
        (dict(selection_bias=True, bias_rate=-1.0), "Experts.bias_rate=-1.0; it must be a finite number"),
        (dict(scale=0.0), "Experts.scale=0.0; it must be a finite number above 0"),
        (dict(groups=3), "Experts.groups=3 does not cut count=8 into equal groups of two or more"),
        (dict(groups=8, chosen_groups=8), "Experts.groups=8 does not cut count=8 into equal groups of two or more"),
        (dict(groups=4, chosen_groups=5), "Experts.chosen_groups=5 of groups=4 must hold the per_token=3 experts"),
        (
            dict(groups=4),
            "Experts.chosen_groups=1 of groups=4 must hold the per_token=3 experts of a token, of count=8",
        ),
        (dict(shared_gate=True), "Experts.shared_gate is set, and shared_width=0: there is no shared expert"),
        (dict(shared_width=-1), "Experts.shared_width=-1; it must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Experts(count=8, per_token=3, width=8, **settings)


def test_a_run_in_which_biases_alone_would_train_is_refused() -> None:
    with pytest.raises(ValueError, match="freezes every parameter"):
        build(Layout(), frozen=("*",), trainable=("llm/layers/moe/bias",))
