"""The host loop walks the schedule's list, and waits for the task so many before the next of its stage."""

import collections

import jax
import jax.numpy as jnp
import pytest
import tiny

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.pipeline import IN_FLIGHT, Pipeline
from hetjax.core.tasks import Kind, StageKey, Task
from hetjax.core.train_spec import TrainSpec

SHAPE = tiny.Shape(samples=2, groups=2, slots=4, microbatches=12)


def built(schedule: str) -> Pipeline:
    """Nothing is compiled."""
    graph = tiny.graph(Layout(pp=2, devices="0-1"), {"vision": Layout(devices="2")}, jnp.float32, tied=True)
    batch = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in tiny.microbatches(SHAPE)[0].items()}
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    sgd = OptimizerConfig(name="sgd")
    return Pipeline(
        TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=sgd, schedule=schedule, **sizes)
    )


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_every_task_goes_out_in_order_with_at_most_so_many_of_a_stage_in_flight(schedule: str) -> None:
    pipeline = built(schedule)
    issued: list[Task] = []
    running: dict[StageKey, collections.deque[Task]] = collections.defaultdict(collections.deque)
    most: collections.Counter[StageKey] = collections.Counter()

    class Handle:
        def __init__(self, task: Task) -> None:
            self.task = task

        def block_until_ready(self) -> None:
            assert running[self.task.stage].popleft() == self.task, "the oldest, and no other"

        def is_ready(self) -> bool:
            assert len(issued) == 2 * len(pipeline.schedule.order), "what is ready differs from process to process"
            return self.task.kind is not Kind.BACKWARD

    def do(task: Task) -> Handle | None:
        issued.append(task)
        if task.kind not in (Kind.FORWARD, Kind.BACKWARD):
            return None
        running[task.stage].append(task)
        most[task.stage] = max(most[task.stage], len(running[task.stage]))
        return Handle(task)

    steps = 2  # nor does a step's end let the next one's tasks through
    for _ in range(steps):
        host = pipeline._walk(pipeline.schedule.order, dict.fromkeys(Kind, do))
    assert tuple(issued) == pipeline.schedule.order * steps and host.tasks == len(pipeline.schedule.order)
    assert most == dict.fromkeys(pipeline.stages, IN_FLIGHT)
    host, *stages = pipeline.progress.lines()  # for whoever asks why it does not go on
    assert host == f"the host's thread is behind all {len(pipeline.schedule.order)} tasks"
    assert [line.partition(" (")[0] for line in stages] == [f"{name}/{index}" for name, index in pipeline.stages]
    assert all(" waits for backward of " in line and "gives" in line for line in stages if not line.startswith("llm/1"))


def test_the_list_is_the_same_wherever_it_is_built() -> None:
    assert built("1f1b").schedule == built("1f1b").schedule
    kinds = {task.kind for task in built("1f1b").schedule.order}
    unused = {Kind.REDUCE, Kind.WEIGHTS, Kind.LEAVE, Kind.GONE, Kind.RETURN}
    assert kinds == set(Kind) - unused, "every stage is one replica, no backward is split, and nothing is offloaded"
