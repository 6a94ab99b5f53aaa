"""Whatever is drawn from the layouts that are allowed trains as the reference on one device does, in float64; and so do
pipelines under every schedule.

Schedules give the same bits on the same stages: test_accumulators.py, test_interleaved.py, test_stage_costs.py and
test_replicas.py.
"""

import functools

import at_once
import drawn
import jax.numpy as jnp
import pytest
import scheduled
from test_parity import MOMENTUM, Case, build, judged

COUNT, DEFAULT = 120, 6
MARKS = [[] if n < DEFAULT else [pytest.mark.slow] for n in range(COUNT)]
QUICK = {16, 17, 18, 19, 38, 39}  # of two sets of stages, each of few programs
OF_SCHEDULES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(scheduled.CASES)]


@functools.cache
def cases() -> list[Case]:
    """All of them; drawn where one is needed, not in each process that collects tests."""
    return drawn.cases(COUNT, drawn.draw, drawn.kinds)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", [pytest.param(n, marks=marks) for n, marks in enumerate(MARKS)])
def test_a_drawn_run_is_the_references(number: int) -> None:
    case = cases()[number]
    trainer = build(case, MOMENTUM, jnp.float64)
    assert not at_once.in_trainer(trainer), case
    (report,) = judged(trainer, case, MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), (case, report)


@pytest.mark.slow
def test_all_kinds_that_can_meet_do() -> None:
    assert not drawn.missed(cases(), drawn.draw, drawn.kinds)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", OF_SCHEDULES)
def test_a_drawn_pipeline_is_the_references_under_its_schedule(number: int) -> None:
    case = scheduled.cases()[number]
    (report,) = judged(build(case, MOMENTUM, jnp.float64), case, MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), (case, report)


def test_all_kinds_of_schedules_meet() -> None:
    met = set().union(*(drawn.meetings(case, scheduled.kinds) for case in scheduled.cases()))
    assert met == scheduled.pairs()
