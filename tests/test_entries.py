"""What enters a language model at several layers, under any layout of either side: DeepStack and cross-attention.

The reference gives each layer what it takes, and lets jax add the cotangents. (`drawn.py` draws more such runs.)
"""

import jax.numpy as jnp
import pytest
import tiny
from test_parity import FROZEN_LLM, FROZEN_VISION, MOMENTUM, Case, run

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat

DEEP = dict(deepstack=(1, 0, -1))  # of the encoder's two layers, behind the first three of the decoder's four
CROSS = dict(cross=(1, 3))
PROJECTORS = (("frozen", ("llm/*", "vision/first/*", "vision/layers/*")),)
KINDS = {
    "both, llm pp 4, encoders pp 2": Case(
        Layout(pp=4), Layout(pp=2, dp=2, devices="0-3"), Layout(pp=2, devices="6-7"), **DEEP, cross=(0, 2, 3)
    ),
    "deepstack, one device, unrolled": Case(**DEEP, unroll=True),
    "deepstack, llm pp 2 tp 2, encoder pp 2 tp 2": Case(
        Layout(pp=2, tp=2, devices="0-3"), Layout(pp=2, tp=2, devices="4-7"), **DEEP, remat=Remat.NONE
    ),
    "deepstack, llm cp 2 tp 2 sp pp 2, colocated, encoder cp 2": Case(
        Layout(cp=2, tp=2, pp=2, sp=True), Layout(cp=2, dp=2, devices="0-3"), **DEEP, encoder_window=2
    ),
    "deepstack, llm ring pp 4, overlapping, gpipe": Case(
        Layout(cp=2, pp=2, context="ring", devices="0-3"), Layout(dp=4, devices="2-5"), **DEEP, schedule="gpipe"
    ),
    "deepstack, experts, ep 2 zero 3; encoder zero 3": Case(
        Layout(dp=2, tp=2, pp=2, ep=2, zero=3), Layout(dp=4, zero=3, devices="4-7"), **DEEP, experts=tiny.EXPERTS
    ),
    "deepstack, projectors alone": Case(
        Layout(pp=2, dp=2, devices="0-3"), Layout(dp=2, devices="4-5"), **DEEP, changes=PROJECTORS
    ),
    "deepstack, frozen encoder": Case(
        Layout(pp=2, dp=2, devices="0-3"), Layout(dp=2, devices="4-5"), **DEEP, changes=FROZEN_VISION
    ),
    "cross, one device": Case(**CROSS),
    "cross, llm pp 4, colocated": Case(Layout(pp=4, dp=2), Layout(dp=8), **CROSS, encoder_window=2),
    "cross, llm cp 2 tp 2 sp": Case(Layout(cp=2, tp=2, sp=True, devices="0-3"), Layout(dp=2, devices="4-5"), **CROSS),
    "cross, llm by heads pp 2, encoder cp 2, products kept": Case(
        Layout(cp=2, pp=2, context="heads", devices="0-3"), Layout(cp=2, devices="4-5"), **CROSS, remat=Remat.DOTS
    ),
    "cross in turn, ring, encoder pp 2, blocks": Case(
        Layout(cp=2, dp=2, context="ring", devices="0-3"), Layout(pp=2, devices="4-5"), cross=(0, 2), blocks=(3, 1)
    ),
    "cross, experts, ep 2 zero 3, nothing again": Case(
        Layout(dp=2, tp=2, pp=2, ep=2, zero=3, zero_size=1),
        Layout(dp=2, tp=2, devices="0-3"),
        **CROSS,
        experts=tiny.EXPERTS,
        remat=Remat.NONE,
    ),
    "cross, frozen llm, pp 4": Case(
        Layout(pp=4, devices="0-3"), Layout(dp=2, devices="4-5"), cross=(2,), changes=FROZEN_LLM
    ),
    "cross, one trained layer, zero 2": Case(
        Layout(pp=2, dp=2, zero=2, devices="0-3"),
        Layout(dp=2, zero=2, devices="4-5"),
        **CROSS,
        changes=(("frozen", ("*",)), ("trainable", ("llm/layers/cross/*",))),
    ),
    "cross, text alone in some microbatches, audio merged": Case(
        Layout(pp=2, devices="0-1"), Layout(dp=2, devices="2-3"), Layout(devices="4"), **CROSS, text_only=(0, 2)
    ),
}
DEFAULT = ["both, llm pp 4, encoders pp 2"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_a_run_is_the_references(name: str) -> None:
    (report,) = run(KINDS[name], MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), report
