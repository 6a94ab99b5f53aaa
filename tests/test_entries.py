"""What enters a language model at several layers, under any layout of either side: DeepStack and cross-attention.

The reference gives each layer what it takes, and lets jax add the cotangents.
"""

import jax.numpy as jnp
import pytest
import tiny
from test_parity import FROZEN_LLM, FROZEN_VISION, MOMENTUM, PROJECTOR, Case, run

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat

DEEP = dict(deepstack=(1, 0, -1))  # of the encoder's two layers, behind the first three of the decoder's four
CROSS = dict(cross=(1, 3))
FEW = dict(shape=tiny.Shape(microbatches=2))
KINDS = {
    "deepstack, one device": Case(**DEEP),
    "cross, one device": Case(**CROSS),
    "deepstack, llm pp 4, encoder pp 2, colocated": Case(Layout(pp=4), Layout(pp=2, dp=2), **DEEP),
    "cross, llm pp 4, encoder pp 2, colocated": Case(Layout(pp=4), Layout(pp=2, dp=2), **CROSS),
}
DEFAULT = list(KINDS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_a_run_is_the_references(name: str) -> None:
    (report,) = run(KINDS[name], MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), report
