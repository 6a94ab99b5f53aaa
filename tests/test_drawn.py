"""Whatever is drawn from the layouts that are allowed trains as the reference on one device does, in float64."""

import itertools

import drawn
import jax.numpy as jnp
import pytest
from test_parity import MOMENTUM, run

COUNT, DEFAULT = 120, 12
CASES = drawn.cases(COUNT)
MARKS = [[] if n < DEFAULT else [pytest.mark.slow] for n in range(COUNT)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", [pytest.param(n, marks=marks) for n, marks in enumerate(MARKS)])
def test_a_drawn_run_is_the_references(number: int) -> None:
    case = CASES[number]
    (report,) = run(case, MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), (case, report)


@pytest.mark.slow
def test_all_kinds_that_can_meet_do() -> None:
    met = {pair for case in CASES for pair in itertools.combinations(sorted(drawn.kinds(case)), 2)}
    assert drawn.possible() <= met
