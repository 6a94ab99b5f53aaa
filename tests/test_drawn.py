"""Whatever is drawn from the layouts that are allowed trains as the reference on one device does, in float64."""

import functools
import itertools

import at_once
import drawn
import jax.numpy as jnp
import pytest
from test_parity import MOMENTUM, Case, build, judged

COUNT, DEFAULT = 120, 6
MARKS = [[] if n < DEFAULT else [pytest.mark.slow] for n in range(COUNT)]


@functools.cache
def cases() -> list[Case]:
    """All of them; drawn where one is needed, not in each process that collects tests."""
    return drawn.cases(COUNT)


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
    met = {pair for case in cases() for pair in itertools.combinations(sorted(drawn.kinds(case)), 2)}
    assert drawn.possible() <= met
