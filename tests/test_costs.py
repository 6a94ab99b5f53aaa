"""A stage's cost is its share of the FLOPs of a step; the whole is what `flops.py` says, however modules are cut."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from hetjax.core import flops
from hetjax.core.costs import costs, forwards
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.pipeline import Pipeline
from hetjax.core.remat import Remat
from hetjax.core.tasks import Cost
from hetjax.core.train_spec import TrainSpec

SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
APART = Layout(pp=2, devices="0-1"), Layout(devices="2")


def built(llm: Layout, vision: Layout, remat: Remat = Remat.NONE, **settings: Any) -> Pipeline:
    """Nothing is compiled."""
    graph = tiny.graph(llm, {"vision": vision}, jnp.float32, remat=remat)
    batch = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in tiny.microbatches(SHAPE)[0].items()}
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    sgd = OptimizerConfig(name="sgd", **settings)
    return Pipeline(TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=sgd, **sizes))


def found(pipeline: Pipeline) -> dict[tuple[str, int], Cost]:
    return costs(pipeline.graph, pipeline.stages, pipeline.spec.batch)


def whole(pipeline: Pipeline, module: str) -> float:
    """FLOPs of a microbatch on all devices of a module."""
    mine = {key: cost for key, cost in found(pipeline).items() if key[0] == module}
    return sum(sum(cost) * len(pipeline.stages[key].plan.device_ids) for key, cost in mine.items())


@pytest.mark.parametrize(
    "layouts",
    [APART, (Layout(pp=4, layers=(1, 1, 1, 1), devices="0-3"), Layout(dp=2)), (Layout(dp=2, cp=2, tp=2), Layout(dp=8))],
)
def test_costs_add_up_to_the_flops_of_training(layouts: tuple[Layout, Layout]) -> None:
    pipeline = built(*layouts)
    for module, parts in forwards(pipeline.graph, pipeline.spec.batch).items():
        trained = flops.module_training(parts, trainable=list(parts), upstream=module == "llm").total
        assert whole(pipeline, module) == pytest.approx(trained, rel=1e-4)


def test_copies_are_no_help() -> None:
    alone, repeated = (built(APART[0], vision) for vision in (Layout(devices="2"), Layout(copies=2, devices="2-3")))
    assert found(alone) == found(repeated)


def test_remat_costs_a_forward_but_for_the_loss() -> None:
    plain, again = found(built(*APART)), found(built(*APART, remat=Remat.FULL))
    for key, cost in plain.items():
        assert again[key] == Cost(cost.forward, cost.backward + cost.forward)
    inside = found(built(*APART, remat=Remat.DOTS))
    assert all(plain[key].backward < inside[key].backward < again[key].backward for key in plain)


def test_what_is_frozen_costs_no_gradient_of_its_own_and_below_all_nothing() -> None:
    whole, frozen = found(built(*APART)), found(built(*APART, frozen=("vision/*",)))
    assert frozen["vision", 0] == Cost(whole["vision", 0].forward, 1), "no such task"
    assert frozen["llm", 1] == whole["llm", 1] and frozen["llm", 0] == whole["llm", 0]
    llm = found(built(*APART, frozen=("llm/*",)))
    assert llm["vision", 0] == whole["vision", 0]
    assert llm["llm", 0].forward < llm["llm", 0].backward < whole["llm", 0].backward, "attention's is twice a forward"


def test_the_schedule_is_simulated_with_these_costs() -> None:
    pipeline = built(*APART)
    spans = pipeline.schedule.forecast.spans
    assert {task.stage: span.end - span.begin for task, span in spans.items() if task.kind.value == "F"} == {
        key: cost.forward for key, cost in found(pipeline).items()
    }
