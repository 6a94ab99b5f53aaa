"""Offload moves data and changes nothing: the same bits with and without, and what has left is seen to be gone."""

import dataclasses
import functools
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_parity import ADAMW, FROZEN_LLM, FROZEN_VISION, Case

from hetjax.core import memory
from hetjax.core.alive import HOST
from hetjax.core.budget import Budget
from hetjax.core.layout import Layout
from hetjax.core.offload import moments
from hetjax.core.pipeline import Pipeline
from hetjax.core.step import Doing
from hetjax.core.tasks import COMPUTING, OFFLOADS, HostTimes, Kind, Needs, Task, Thing, What
from hetjax.core.trainer import State, Trainer
from hetjax.run import named
from hetjax.run.checkpoint import Checkpoints

ALL = tuple(OFFLOADS)
SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=4)
LOW, HIGH = "0-1", "2-3"
DEFAULT = ("colocated, a window of 2",)
SCALARS = 400  # bytes: losses, flags, sums of squares and what the step tells of them

CASES = {
    "colocated, a window of 2": Case(Layout(dp=2, tp=2), Layout(dp=4), encoder_window=2, tied=True),
    "colocated, pp 2, tied, gpipe": Case(Layout(pp=2, dp=2), Layout(tp=2, dp=2), tied=True, schedule="gpipe"),
    "disjoint, gpipe": Case(Layout(tp=2, devices=LOW), Layout(dp=2, devices=HIGH), schedule="gpipe"),
    "replicas 2 on pp 2": Case(Layout(pp=2, devices="0-1"), Layout(replicas=2, devices="0-1"), tied=True),
    "disjoint, pp 2 of both, zero-bubble": Case(
        Layout(pp=2, devices=LOW), Layout(pp=2, devices=HIGH), schedule="zerobubble"
    ),
    "overlapping, zero 2 and 3": Case(
        Layout(dp=2, zero=3, devices="0-1"), Layout(dp=2, zero=2, devices="1-2"), encoder_window=1
    ),
    "colocated, frozen encoder": Case(Layout(dp=2), Layout(tp=2), changes=FROZEN_VISION),
    "colocated, frozen llm": Case(Layout(pp=2, devices=LOW), Layout(devices="0"), changes=FROZEN_LLM, tied=True),
    "experts, two encoders": Case(
        Layout(dp=2, ep=2), Layout(devices="0"), Layout(devices="0"), experts=tiny.EXPERTS, schedule="gpipe"
    ),
}


def built(case: Case, offload: tuple[str, ...], programs_of: Trainer | None = None) -> Trainer:
    """The case with this offload of all modules; with the programs of another trainer, or ones of its own."""
    layouts = {name: dataclasses.replace(layout, offload=offload) for name, layout in case.encoders.items()}
    llm = dataclasses.replace(case.llm, offload=offload)
    graph = tiny.graph(llm, layouts, jnp.bfloat16, remat=case.remat, tied=case.tied, experts=case.experts)
    config = dataclasses.replace(ADAMW, **dict(case.changes))
    schedule = dict(schedule=case.schedule, encoder_window=case.encoder_window)
    with mock.patch.object(Trainer, "compile"):
        trainer = tiny.trainer(graph, SHAPE, config, **schedule)
    if programs_of is None:
        trainer.compile(evaluate=True, others=named.programs(trainer))
        return trainer
    for key, stage in trainer.pipeline.stages.items():
        theirs = programs_of.pipeline.stages[key]
        stage.programs, stage.kept, stage.memory = theirs.programs, theirs.kept, theirs.memory
    trainer.finish.decide, trainer.finish.add = programs_of.finish.decide, programs_of.finish.add
    return trainer


def data(trainer: Trainer, step: int) -> list:
    return tiny.microbatches(SHAPE, tuple(e.name for e in trainer.graph.encoders), seed=step)


def steps(trainer: Trainer, state: State, numbers: Sequence[int]) -> tuple[State, list[float]]:
    """The state behind these steps, and their losses."""
    losses = []
    for n in numbers:
        state, outcome = trainer.step(state, data(trainer, n))
        losses.append(float(outcome.loss))
    return state, losses


def assert_same(one: Any, two: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@functools.cache
def compiled(name: str) -> Trainer:
    """The case without offload."""
    return built(CASES[name], ())


def memories(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in CASES])
def test_a_run_has_the_same_bits_with_everything_offloaded(name: str, tmp_path: Path) -> None:
    """By the same programs; saved half-way and restored too."""
    plain = compiled(name)
    away = built(CASES[name], ALL, plain)
    expected, losses = steps(plain, plain.init(), range(3))
    state, found = steps(away, away.init(), range(2))
    assert memories(state.optimizer) == {HOST}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(away, state, {})
        checkpoints.wait()
        state, _ = checkpoints.restore(away)
    assert memories(state.optimizer) == {HOST}
    state, last = steps(away, state, [2])
    assert found + last == losses
    assert_same(expected[:3], state[:3])
    one = plain.evaluate(expected, data(plain, 3)[0])
    assert_same(one, away.evaluate(state, data(plain, 3)[0]))


def needs_of(pipeline: Pipeline) -> Needs:
    ties = list(dict.fromkeys((tie.copy, tie.owner) for tie in pipeline.ties if tie.gradients is not None))
    return Needs(pipeline.nodes, pipeline.spec.num_microbatches, ties)


def on_first(arrays: Sequence[jax.Array], memory_kind: str) -> int:
    """Bytes of arrays on the first device, in its memory or in that of the host; those of one buffer once."""
    found = {}
    for array in arrays:
        if array.sharding.memory_kind == memory_kind:
            mine = [s.data for s in array.addressable_shards if s.device == jax.devices()[0]]
            found |= {data.unsafe_buffer_pointer(): data.nbytes for data in mine}
    return sum(found.values())


def live(memory_kind: str) -> int:
    """That of all arrays."""
    return on_first(jax.live_arrays(), memory_kind)


Seen = list[tuple[Task, int, int]]  # before each task that computes: bytes on the device, on the host


def watched_step(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> Seen:
    """What a step that is not the first finds, beside what all other arrays take."""
    state, _ = steps(trainer, trainer.init(), [0])
    walk, seen = Pipeline._walk, []

    def watched(self: Pipeline, tasks: Sequence[Task], doing: Doing) -> HostTimes:
        def watch(task: Task) -> jax.Array | None:
            jax.block_until_ready(list(self._leaving.values()))
            seen.append((task, live("device") - others, live(HOST) - others_on_host))
            return doing[task.kind](task)

        return walk(self, tasks, {kind: watch if kind in COMPUTING else do for kind, do in doing.items()})

    gc.collect()
    mine = list({id(leaf): leaf for leaf in jax.tree.leaves(state[:3])}.values())
    others, others_on_host = (live(kind) - on_first(mine, kind) for kind in ("device", HOST))
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "_walk", watched)
        steps(trainer, state, [1])
    return seen


@pytest.mark.parametrize("kinds", [(), ALL])
@pytest.mark.parametrize("name", [DEFAULT[0], pytest.param("replicas 2 on pp 2", marks=pytest.mark.slow)])
def test_what_is_offloaded_has_left_the_device_while_the_other_module_works(
    name: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each task both memories hold what the memory table says, to the byte but for a few scalars."""
    trainer = built(CASES[name], kinds, compiled(name))
    pipeline, sizes = trainer.pipeline, {}
    kept = {key: memory.local_bytes(stage.kept) for key, stage in pipeline.stages.items()}
    on_first = [key for key, stage in pipeline.stages.items() if 0 in stage.plan.device_ids]
    for key in pipeline.stages:
        sizes |= {thing: size * (key in on_first) for thing, size in memory.things(pipeline, key, kept[key]).items()}
    total = lambda held: sum(count * sizes[thing] for thing, count in held)
    seen = iter(watched_step(monkeypatch, trainer))
    told = moments(pipeline.schedule.order, needs_of(pipeline), pipeline.schedule.home)
    leaving: set[Thing] = set()
    most, most_on_host = 0, 0
    for task in pipeline.schedule.order:
        if task.thing is not None:
            leaving = leaving | {task.thing} if task.kind is Kind.LEAVE else leaving - {task.thing}
        if task.kind in COMPUTING:
            moment, (_, device, host) = next(told), next(seen)
            if task.stage not in on_first:
                continue
            made = {Kind.FORWARD: What.RESIDUALS, Kind.REDUCE: What.SUMS}.get(task.kind)
            expected = total(moment.device) - (sizes[Thing(made, task.stage)] if made else 0)
            gone = sum(sizes[thing._replace(microbatch=-1)] for thing in leaving)
            assert abs(device - expected + gone) < SCALARS, task
            assert task.kind is Kind.UPDATE or abs(host - total(moment.host)) < SCALARS, task
            most, most_on_host = max(most, total(moment.device)), max(most_on_host, total(moment.host))
            others = {thing.what for thing, _ in moment.device if thing.stage[0] != task.stage[0]}
            if name in DEFAULT and kinds and task.kind in (Kind.FORWARD, Kind.BACKWARD):
                assert others <= {What.SUMS, What.INPUTS} - ({What.INPUTS} if task.kind is Kind.BACKWARD else set())
    table = memory.of_step(pipeline, kept, {})[0]
    accumulators = sum(memory.local_bytes(pipeline.stages[key].parameters.acc) for key in on_first)
    assert (table.total, table.host) == (most + accumulators, most_on_host)


def test_the_budget_of_remat_counts_what_is_away_as_gone() -> None:
    name = "colocated, a window of 2"
    budgets = [Budget(built(CASES[name], kinds, compiled(name))) for kinds in ((), ("residuals",))]
    there, away = (budget.estimate(budget.whole)[0] for budget in budgets)
    assert away.total < there.total and away.host > 0 == there.host
    assert budgets[0].basis != budgets[1].basis
