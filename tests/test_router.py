"""What a run tells of its routers, and that their loss balances them."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from hetjax.core.finish import Outcome
from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.tasks import HostTimes
from hetjax.run.log import routing
from models.moe import Experts

STEPS = 80


def loads(experts: Experts, steps: int = STEPS) -> list[dict[str, float]]:
    """The metrics of each step of a decoder whose routers begin with a liking for the first expert."""
    decoder = tiny.decoder(experts=experts, num_layers=2)
    graph = vlm((), Module("llm", decoder.module(jnp.float32), Layout(dp=2, tp=2, ep=4)))
    shape = tiny.Shape(samples=32, microbatches=2)
    trainer = tiny.trainer(graph, shape, OptimizerConfig(learning_rate=2e-2, decay_steps=steps, weight_decay=0.0))
    state = trainer.start({key: liking(tree) for key, tree in trainer.initial_params().items()})
    found = []
    for step in range(steps):
        state, outcome = trainer.step(state, tiny.microbatches(shape, (), seed=step % 4))
        found.append(routing({"llm": graph.sink.definition}, outcome))
    return found


def liking(params: Any) -> Any:
    """The tokens have a direction in common, and the first expert answers to it."""
    first, layers = params["first"], params["layers"]
    embed, router = first["embed"] + 0.25, layers["moe"]["router"].at[:, :, 0].add(0.3)
    layers = {**layers, "moe": {**layers["moe"], "router": router}}
    changed = {**params, "first": {**first, "embed": embed}, "layers": layers}
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), changed, params)


@pytest.mark.slow
def test_a_run_with_the_loss_balances_and_one_without_does_not() -> None:
    plain = Experts(count=8, per_token=2, width=12, dense_layers=(0,))  # several layers may balance each other
    with_loss, without = loads(dataclasses.replace(plain, balance_loss=0.5)), loads(plain)
    layer = "expert_load/llm/1"
    assert all(record.keys() == {"auxiliary_loss", layer} for record in with_loss)
    assert all(record.keys() == {layer} for record in without)
    assert min(with_loss[0][layer], without[0][layer]) > 2
    assert max(record[layer] for record in with_loss[-4:]) < 1.5
    assert min(record[layer] for record in without[-4:]) > 2


def test_metrics_tell_the_largest_load_over_the_mean_of_layers_with_experts() -> None:
    scalar = jnp.zeros(())
    host = HostTimes(0, 0.0, 0.0, 0.0)
    loads = {"llm": jnp.array([[6.0, 1, 1], [2, 2, 4]])}
    outcome = Outcome(scalar, scalar, {}, scalar, host, loads, jnp.float32(0.25))
    mixed = tiny.decoder(num_layers=3, experts=Experts(3, 1, 8, dense_layers=(1,))).module(jnp.float32)
    assert routing({"llm": mixed}, outcome) == {
        "auxiliary_loss": 0.25,
        "expert_load/llm/0": pytest.approx(18 / 8),
        "expert_load/llm/2": pytest.approx(12 / 8),
    }
    assert routing({"llm": tiny.decoder().module(jnp.float32)}, Outcome(scalar, scalar, {}, scalar, host, {})) == {}


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["balance_loss", "z_loss"])
def test_weights_of_losses_are_finite_and_not_negative(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Experts.{name}={weight!r}; it must be a finite number")):
        Experts(4, 2, 8, **{name: weight})
