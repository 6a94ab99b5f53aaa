"""A vision encoder with experts: its routers' losses, its loads, slots without a picture, under any layout."""

import dataclasses

import jax.numpy as jnp
import pytest
from test_balance import BIASED, SHAPE
from test_parity import HIGH, LOW, PROJECTOR, SGD, Case, run

from hetjax.core.layout import Layout
from models.moe import Experts

LOSSES = Experts(count=4, per_token=2, width=12, balance_loss=0.5, z_loss=0.1)
MOVING = dataclasses.replace(BIASED, dense_layers=(0,))
CASES = {
    "dp 2 pp 2": Case(Layout(dp=2, devices=HIGH[:1] + "-5"), Layout(dp=2, pp=2, devices=LOW), seeing=LOSSES),
    "ep 4 of tp and dp": Case(Layout(dp=2), Layout(dp=2, tp=2, ep=4), seeing=LOSSES),
    "ep 2 of tp 4, sp, zero 2": Case(Layout(tp=2), Layout(dp=2, tp=4, ep=2, sp=True, zero=2), seeing=LOSSES),
    "cp 2 tp 2 sp, copies": Case(Layout(dp=2, tp=2), Layout(cp=2, tp=2, sp=True, copies=2), seeing=LOSSES),
    "biases, ep 2 of cp, pp 2, features of two layers, experts in both": Case(
        Layout(dp=2, pp=2, ep=2, devices=LOW),
        Layout(cp=2, pp=2, ep=2, devices=HIGH),
        seeing=MOVING,
        experts=BIASED,
        feature_layer=(-1, 0),
    ),
    "biases, losses of both, the projector alone trains": Case(
        Layout(dp=2, ep=2, devices=LOW[:1] + "-1"),
        Layout(pp=2, tp=2, devices=LOW),
        seeing=dataclasses.replace(LOSSES, selection_bias=True, bias_rate=0.05),
        experts=LOSSES,
        changes=PROJECTOR,
    ),
    "frozen, its losses count": Case(
        Layout(dp=2), Layout(dp=2), seeing=LOSSES, changes=(("frozen", ("vision/*",)),), schedule="gpipe"
    ),
    "biases in a frozen encoder": Case(
        Layout(dp=2),
        Layout(dp=2, pp=2),
        seeing=MOVING,
        changes=(("frozen", ("vision/*",)), ("trainable", ("vision/layers/moe/bias",))),
    ),
}
DEFAULT = {"biases, ep 2 of cp, pp 2, features of two layers, experts in both"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_steps_are_the_references(name: str) -> None:
    case = dataclasses.replace(CASES[name], shape=SHAPE)
    for report in run(case, SGD, jnp.float64, 4):
        assert report.within(loss=1e-11, leaves=1e-10, params=1e-11), report
