"""Offload moves data and changes nothing: the same bits with and without, and what has left is seen to be gone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_parity import ADAMW, FROZEN_LLM, FROZEN_VISION, Case

from hetjax.core.layout import Layout
from hetjax.core.tasks import OFFLOADS
from hetjax.core.trainer import State, Trainer

ALL = tuple(OFFLOADS)
SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=4)
LOW, HIGH = "0-1", "2-3"

CASES = {
    "colocated, a window of 2": Case(Layout(dp=2, tp=2), Layout(dp=4), encoder_window=2, tied=True),
    "colocated, pp 2, tied, gpipe": Case(Layout(pp=2, dp=2), Layout(tp=2, dp=2), tied=True, schedule="gpipe"),
    "disjoint, gpipe": Case(Layout(tp=2, devices=LOW), Layout(dp=2, devices=HIGH), schedule="gpipe"),
    "disjoint, pp 2 of both": Case(Layout(pp=2, devices=LOW), Layout(pp=2, devices=HIGH)),
    "overlapping, zero 2 and 3": Case(
        Layout(dp=2, zero=3, devices="0-1"), Layout(dp=2, zero=2, devices="1-2"), encoder_window=1
    ),
    "colocated, frozen encoder": Case(Layout(dp=2), Layout(tp=2), changes=FROZEN_VISION),
    "colocated, frozen llm": Case(Layout(pp=2, devices=LOW), Layout(devices="0"), changes=FROZEN_LLM, tied=True),
    "experts, two encoders": Case(
        Layout(dp=2, ep=2), Layout(devices="0"), Layout(devices="0"), experts=tiny.EXPERTS, schedule="gpipe"
    ),
}


def built(case: Case, offload: tuple[str, ...], dtype: Any = jnp.bfloat16) -> Trainer:
    """The case with this offload of all modules."""
    layouts = {name: dataclasses.replace(layout, offload=offload) for name, layout in case.encoders.items()}
    llm = dataclasses.replace(case.llm, offload=offload)
    how = dict(remat=case.remat, tied=case.tied, experts=case.experts)
    config = dataclasses.replace(ADAMW, **dict(case.changes))
    schedule = dict(schedule=case.schedule, encoder_window=case.encoder_window)
    return tiny.trainer(tiny.graph(llm, layouts, dtype, **how), SHAPE, config, **schedule)


def steps(trainer: Trainer, count: int = 2) -> tuple[State, list[float]]:
    """The state behind so many steps, and their losses."""
    state, losses = trainer.init(), []
    for n in range(count):
        batch = tiny.microbatches(SHAPE, tuple(e.name for e in trainer.graph.encoders), seed=n)
        state, outcome = trainer.step(state, batch)
        losses.append(float(outcome.loss))
    return state, losses


def assert_same(one: Any, two: Any) -> None:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_same_bits_with_everything_offloaded(name: str) -> None:
    (state, losses), (other, others) = (steps(built(CASES[name], offload)) for offload in ((), ALL))
    assert losses == others
    assert_same(state[:3], other[:3])
