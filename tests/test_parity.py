"""Whatever the layouts: gradients, optimizer state and losses are those of the reference on one device.

Float64 at step one is the sharp test: 1e-11 leaves no room for a wrong scale, and the state (a momentum) is the clipped
gradient. The long runs of SGD and AdamW in float32 and float64 are marked slow.
"""

import dataclasses
import functools
import random
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core import loss
from hetjax.core.layout import Layout, like
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.tasks import Cost
from hetjax.core.trainer import Trainer
from hetjax.judge import compare
from hetjax.judge.reference import Reference
from models import attention
from models.moe import Experts

MOMENTUM = OptimizerConfig(name="sgd", momentum=0.9, learning_rate=0.1, clip_norm=None)
SGD = OptimizerConfig(name="sgd", learning_rate=0.3, warmup_steps=3, decay_steps=20, clip_norm=None)
ADAMW = OptimizerConfig(learning_rate=3e-3, warmup_steps=3, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: layouts by module, and what else differs from the plain tiny model."""

    llm: Layout = Layout()
    vision: Layout = Layout()
    audio: Layout | None = None
    shape: tiny.Shape = tiny.Shape()
    tied: bool = False
    kv_heads: int = 4
    vocab: int = tiny.VOCAB
    feature_layer: int | tuple[int, ...] = -1
    deepstack: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()  # layers that attend to an encoder, that of clips beside `deepstack`
    blocks: tuple[int, int] = attention.BLOCKS["cpu"]  # of the trainer's attention
    experts: Experts | None = None
    seeing: Experts | None = None  # of the vision encoder
    remat: Remat = Remat.FULL
    unroll: bool = False
    changes: tuple[tuple[str, Any], ...] = ()  # of the optimizer's settings
    text_only: tuple[int, ...] = ()  # microbatches without a picture
    unweighted: bool = False  # a microbatch has no targets, another none in half of its rows
    schedule: str = "1f1b"
    encoder_window: int | None = None
    costs: int | None = None  # seed of the stages' costs, as if they had been measured

    @property
    def encoders(self) -> dict[str, Layout]:
        return {"vision": self.vision} | ({"audio": self.audio} if self.audio else {})


PAPER = [
    "4/1/1|4/1/1",
    "2/1/2|2/1/2",
    "2/2/1|4/1/1",
    "1/1/4|1/1/4",
    "1/4/1|4/1/1",
    "1/4/1|1/1/4",
    "1/2/2|2/1/2",
    "4/1/1|1/1/4",
    "2/2/1|2/1/2",
    "2/1/2|1/1/4",
]
FROZEN_LLM = (("frozen", ("llm/*",)),)
FROZEN_VISION = (("frozen", ("vision/*",)),)
PROJECTOR = (("frozen", ("*",)), ("trainable", ("vision/last/projector/*",)))
ROUTERS = (
    ("frozen", ("llm/*",)),
    ("trainable", ("llm/layers/moe/router", "llm/layers/mlp/up")),
    # faster ones meet a token between two experts, which float32 sends to the one or the other by its rounding
    ("learning_rate_multipliers", {"*": 0.3}),
)
CLIP = (("clip_norm", 0.05),)
LOW, HIGH = "0-3", "4-7"
MANY = tiny.Shape(microbatches=6)


def paper_case(text: str, *, colocated: bool) -> Case:
    """LLM tp/pp/dp | encoder tp/pp/dp: on four devices each, or both on all eight with twice the dp."""
    (tp, pp, dp), (e_tp, e_pp, e_dp) = (map(int, side.split("/")) for side in text.split("|"))
    if colocated:
        return Case(Layout(tp=tp, pp=pp, dp=2 * dp), Layout(tp=e_tp, pp=e_pp, dp=2 * e_dp))
    return Case(Layout(tp=tp, pp=pp, dp=dp, devices=LOW), Layout(tp=e_tp, pp=e_pp, dp=e_dp, devices=HIGH))


KINDS = {
    "one device": Case(),
    "encoder pp 2": Case(Layout(tp=2, devices="2-3"), Layout(pp=2, devices="0-1")),
    "encoder pp 2, features of three layers, unrolled": Case(
        Layout(tp=2, devices="4-5"), Layout(pp=2, tp=2, devices=LOW), feature_layer=(-1, 0, -2), unroll=True
    ),
    "encoder pp 2 cp 2, features of two layers, no remat": Case(
        Layout(tp=2, devices="4-5"), Layout(pp=2, cp=2, devices=LOW), feature_layer=(-2, -1), remat=Remat.NONE
    ),
    "encoder dp 2, features of two layers, remat of all but products": Case(
        Layout(tp=2, devices="4-5"), Layout(dp=2, devices=LOW[:1] + "-1"), feature_layer=(0, -1), remat=Remat.DOTS
    ),
    "encoder cp 2": Case(Layout(tp=2, devices=LOW[:1] + "-1"), Layout(cp=2, tp=2, devices=HIGH)),
    "llm cp 2": Case(Layout(cp=2, tp=2, devices=LOW), Layout(dp=4, devices=HIGH)),
    "llm cp 4 pp 2 tied": Case(Layout(cp=4, pp=2), Layout(dp=8), tied=True, encoder_window=2),
    "copies 2": Case(Layout(dp=2, cp=2, tp=2), like(Layout(dp=2, cp=2, tp=2))),
    "fan-out 1 to 4": Case(Layout(dp=4, devices=LOW), Layout(devices="7")),
    "ratio 3 to 2": Case(
        Layout(dp=2, devices="3-4"), Layout(dp=3, devices="0-2"), shape=tiny.Shape(samples=6, groups=6, slots=12)
    ),
    "overlapping": Case(Layout(dp=2, tp=2, devices=LOW), Layout(dp=4, devices="2-5"), encoder_window=1),
    "two encoders": Case(Layout(tp=2, pp=2, devices=LOW), Layout(dp=2, devices="4-5"), Layout(tp=2, devices="6-7")),
    "audio pp 2 tp 2": Case(Layout(dp=2, devices="4-5"), Layout(devices="6"), Layout(pp=2, tp=2, devices=LOW)),
    "audio cp 2 dp 2 on the llm's devices": Case(
        Layout(tp=2, pp=2, devices=LOW), Layout(dp=2, devices="4-5"), Layout(cp=2, dp=2, devices=LOW), encoder_window=2
    ),
    "clip active": Case(Layout(tp=2, devices="0-1"), Layout(dp=2, devices="2-3"), changes=CLIP),
    "frozen encoder": Case(Layout(dp=2, devices="0-1"), Layout(dp=2, tp=2, devices=HIGH), changes=FROZEN_VISION),
    "frozen llm": Case(Layout(tp=2, pp=2, devices=LOW), Layout(dp=2, devices="4-5"), changes=FROZEN_LLM),
    "projector only": Case(Layout(dp=2, pp=2, devices=LOW), Layout(dp=2, pp=2, devices=HIGH), changes=PROJECTOR),
    "text-only microbatches, and some without targets": Case(
        Layout(dp=2, tp=2, devices=LOW), Layout(dp=2, devices="4-5"), text_only=(0, 2), unweighted=True
    ),
    "experts, llm tp 2 cp 2 pp 2": Case(Layout(tp=2, cp=2, pp=2), Layout(dp=4), experts=tiny.EXPERTS),
    "experts, uneven stages, dp 2, no remat, unrolled": Case(
        Layout(dp=2, pp=2, layers=(3, 1), devices=LOW),
        Layout(tp=2, devices="4-5"),
        experts=tiny.EXPERTS,
        remat=Remat.NONE,
        unroll=True,
    ),
    "experts not renormalised, copies 2, tied, remat of all but products": Case(
        Layout(copies=2, tp=4),
        Layout(dp=2, devices=HIGH[:1] + "-5"),
        experts=dataclasses.replace(tiny.EXPERTS, renormalise=False, dense_layers=(0, 2)),
        tied=True,
        remat=Remat.DOTS,
    ),
    "experts, frozen but for routers and one MLP": Case(
        Layout(tp=2, pp=2, devices=LOW), Layout(dp=2, devices="4-5"), experts=tiny.EXPERTS, changes=ROUTERS
    ),
    "one microbatch, gpipe": Case(
        Layout(pp=4, devices=LOW), Layout(dp=4), shape=tiny.Shape(microbatches=1), schedule="gpipe"
    ),
    "cp 2, attention in blocks": Case(
        Layout(cp=2, tp=2, devices=LOW), Layout(cp=2, dp=2, devices=HIGH), blocks=(3, 1), remat=Remat.FULL
    ),
    "cp 4, attention in blocks, nothing again": Case(
        Layout(cp=4, devices=LOW), Layout(tp=2, devices=HIGH[:1] + "-5"), blocks=(3, 1), remat=Remat.NONE
    ),
    "pp 2, attention in blocks, products kept": Case(
        Layout(pp=2, cp=2, devices=LOW), Layout(tp=2, pp=2, devices=HIGH), blocks=(5, 1), remat=Remat.DOTS
    ),
    "sp: pp 2, tied; encoder cp 2, no remat": Case(
        Layout(tp=2, pp=2, sp=True, devices=LOW), Layout(cp=2, tp=2, sp=True), tied=True, remat=Remat.NONE
    ),
    "sp: dp 2 cp 2, experts; encoder pp 2, features of two layers": Case(
        Layout(dp=2, cp=2, tp=2, sp=True),
        Layout(tp=2, pp=2, sp=True, devices=LOW),
        experts=tiny.EXPERTS,
        feature_layer=(-1, 0),
        remat=Remat.DOTS,
    ),
    "sp: tp 4; audio": Case(Layout(tp=4, sp=True), Layout(dp=2), Layout(tp=2, sp=True, devices=LOW[:1] + "-1")),
    "vocabulary of 61: tp 2": Case(Layout(tp=2, devices=LOW[:1] + "-1"), Layout(dp=2, devices="4-5"), vocab=61),
    "vocabulary of 61: tp 4, pp 2, sp, tied": Case(Layout(tp=4, pp=2, sp=True), Layout(dp=4), vocab=61, tied=True),
    "vocabulary of 61: tp 4, dp 2, clip active": Case(Layout(tp=4, dp=2), Layout(dp=4), vocab=61, changes=CLIP),
    "vocabulary of 61: tp 2, dp 2, pp 2, zero 3, tied, clip active": Case(
        Layout(tp=2, dp=2, pp=2, zero=3), Layout(dp=4), vocab=61, tied=True, changes=CLIP
    ),
    "llm cp 2 ring, encoder cp 2 by heads": Case(
        Layout(cp=2, devices="0-1", context="ring"),
        Layout(cp=2, devices="2-3", context="heads"),
        blocks=(3, 1),
    ),
    "llm cp 4 tp 2 by heads, fewer key heads, encoder cp 2 ring": Case(
        Layout(cp=4, tp=2, context="heads"), Layout(cp=2, devices="0-1", context="ring")
    ),
    "llm cp 4 pp 2 ring, tied, audio cp 2 ring, nothing again": Case(
        Layout(cp=4, pp=2, context="ring"),
        Layout(cp=4, tp=2, context="ring"),
        Layout(cp=2, tp=2, devices=LOW, context="ring"),
        tied=True,
        remat=Remat.NONE,
    ),
    "llm cp 2 tp 2 pp 2 by heads, experts, audio cp 2 by heads, products kept": Case(
        Layout(cp=2, tp=2, pp=2, context="heads"),
        Layout(dp=4),
        Layout(cp=2, dp=2, devices=LOW, context="heads"),
        experts=tiny.EXPERTS,
        remat=Remat.DOTS,
        encoder_window=2,
    ),
    "zero 2: dp 2 cp 2, tied; encoder dp 4, two share": Case(
        Layout(dp=2, cp=2, zero=2, devices=LOW), Layout(dp=4, zero=2, zero_size=2, devices=HIGH), tied=True
    ),
    "zero 2: dp 4, two share, tp 2, no remat; encoder pp 2": Case(
        Layout(dp=4, tp=2, zero=2, zero_size=2), Layout(dp=2, pp=2, zero=2, devices=HIGH), remat=Remat.NONE
    ),
    "zero 3: tp 2 pp 2, tied; encoder dp 4, two share": Case(
        Layout(dp=2, tp=2, pp=2, zero=3), Layout(dp=4, zero=3, zero_size=2, devices=LOW), tied=True
    ),
    "zero 3: dp 4, two share, tied, no remat; encoder tp 2, features of two layers": Case(
        Layout(dp=4, zero=3, zero_size=2, devices=LOW),
        Layout(dp=2, tp=2, zero=3, devices=HIGH),
        feature_layer=(-1, 0),
        remat=Remat.NONE,
        tied=True,
    ),
    "zero 3: sp, cp 2, experts, unrolled; encoder cp 2, frozen": Case(
        Layout(dp=2, cp=2, tp=2, sp=True, zero=3),
        Layout(dp=2, cp=2, zero=3, devices=HIGH),
        experts=tiny.EXPERTS,
        changes=FROZEN_VISION,
        unroll=True,
    ),
    "zero 3: frozen llm, experts; encoder pp 2, remat of all but products": Case(
        Layout(dp=4, tp=2, zero=3),
        Layout(dp=2, pp=2, zero=3, devices=LOW),
        experts=tiny.EXPERTS,
        changes=FROZEN_LLM,
        remat=Remat.DOTS,
    ),
    "zero 3: projector only": Case(
        Layout(dp=2, pp=2, zero=3, devices=LOW), Layout(dp=4, zero=3, devices=HIGH), changes=PROJECTOR
    ),
    "zero 1: dp 4, two share; encoder dp 4, none share": Case(
        Layout(dp=4, zero_size=2, devices=LOW), Layout(dp=4, zero_size=1, devices=HIGH), tied=True
    ),
    "zero 3: sp alone; audio tp 2": Case(
        Layout(tp=4, sp=True, zero=3), Layout(dp=2, zero=2), Layout(dp=2, tp=2, zero=3, devices=LOW)
    ),
    "replicas 2 on pp 2, tied, uneven shares": Case(
        Layout(pp=2, dp=2, devices=LOW),
        Layout(replicas=2, dp=2, devices=LOW),
        tied=True,
        shape=tiny.Shape(microbatches=3),
        changes=CLIP,
    ),
    "replicas 4 on pp 4, frozen encoder, a window of 4": Case(
        Layout(pp=4, dp=2), Layout(replicas=4, dp=2), shape=MANY, changes=FROZEN_VISION, encoder_window=4
    ),
    "replicas 4 on pp 4, a window of 4, projector alone": Case(
        Layout(pp=4, tp=2), Layout(replicas=4, tp=2), shape=MANY, changes=PROJECTOR, encoder_window=4
    ),
    "replicas 2 with zero 3 on pp 2 vpp 2": Case(
        Layout(pp=2, vpp=2, tp=4), Layout(replicas=2, dp=4, zero=3), shape=MANY, remat=Remat.NONE
    ),
    "replicas 2 with zero 2 on two stages each of pp 4, gpipe": Case(
        Layout(pp=4, dp=2), Layout(replicas=2, dp=2, cp=2, zero=2), schedule="gpipe"
    ),
    "replicas 2 of seeing experts with a bias, tp 2, frozen llm": Case(
        Layout(pp=2, tp=2, devices=LOW),
        Layout(replicas=2, tp=2, sp=True, devices=LOW),
        seeing=dataclasses.replace(
            tiny.EXPERTS, count=8, dense_layers=(0,), balance_loss=0.5, selection_bias=True, bias_rate=0.05
        ),
        changes=FROZEN_LLM,
    ),
    "replicas of two encoders, which enter both stages of pp 2": Case(
        Layout(pp=2, dp=2, devices=LOW),
        Layout(replicas=2, dp=2, devices=LOW),
        Layout(replicas=2, tp=2, devices=LOW),
        deepstack=(1, 0, -1),
        cross=(1, 3),
    ),
    "replicas 3 in another order, beside and on pp 2": Case(
        Layout(pp=2, tp=2, devices=LOW), Layout(replicas=3, tp=2, devices="4,5,3,2,0,1"), shape=MANY
    ),
    "uneven stages, tied": Case(Layout(pp=2, layers=(1, 3), dp=2, devices=LOW), Layout(tp=4, devices=HIGH), tied=True),
}
PAPER_CASES = {
    f"{text} {place}": paper_case(text, colocated=place == "colocated")
    for text in PAPER
    for place in ("colocated", "disjoint")
}
DEFAULT = [  # beside the runs of test_drawn.py
    "llm cp 4 pp 2 tied", "ratio 3 to 2", "text-only microbatches, and some without targets",
    "llm cp 2 ring, encoder cp 2 by heads", "llm cp 4 tp 2 by heads, fewer key heads, encoder cp 2 ring",
    "zero 2: dp 2 cp 2, tied; encoder dp 4, two share", "zero 3: tp 2 pp 2, tied; encoder dp 4, two share",
    "replicas 2 on pp 2, tied, uneven shares",
]  # fmt: skip
ALL = KINDS | PAPER_CASES


@functools.cache
def reference(encoders: tuple[str, ...], dtype: Any, **model: Any) -> Reference:
    """One compiled reference serves every layout and optimizer of a model."""
    layouts = dict.fromkeys(encoders, Layout())
    return Reference(tiny.graph(Layout(), layouts, dtype, **model), MOMENTUM)


def run(case: Case, config: OptimizerConfig, dtype: Any, steps: int) -> list[compare.StepReport]:
    return judged(build(case, config, dtype), case, config, dtype, steps)


def build(case: Case, config: OptimizerConfig, dtype: Any) -> Trainer:
    graph = tiny.graph(case.llm, case.encoders, dtype, remat=case.remat, unroll=case.unroll, **model(case))
    options = dict(schedule=case.schedule, encoder_window=case.encoder_window)
    config = dataclasses.replace(config, **dict(case.changes))
    # the reference is traced later, and knows neither blocks nor chunks
    with mock.patch.dict(attention.BLOCKS, cpu=case.blocks), mock.patch.dict(loss.CHUNK, cpu=5):
        trainer = tiny.trainer(graph, case.shape, config, dtype=dtype, **options)
    if case.costs is not None:
        rng = random.Random(case.costs)
        cost = lambda splits: Cost(rng.randint(1, 99), rng.randint(50, 199), splits * rng.randint(1, 49))
        stages = trainer.pipeline.stages
        trainer.pipeline.reschedule({key: cost(stage.splits) for key, stage in stages.items()})
    return trainer


def judged(trainer: Trainer, case: Case, config: OptimizerConfig, dtype: Any, steps: int) -> list[compare.StepReport]:
    config = dataclasses.replace(config, **dict(case.changes))
    judge = reference(tuple(case.encoders), dtype, **model(case)).with_config(config)
    return list(compare.compare(trainer, (data(case, seed) for seed in range(steps)), judge))


def model(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = dict(tied=case.tied, feature_layer=case.feature_layer, experts=case.experts)
    found |= {"kv_heads": case.kv_heads} if case.kv_heads != 4 else {}
    found |= {name: getattr(case, name) for name in ("deepstack", "cross") if getattr(case, name)}
    found |= {"vocab": case.vocab} if case.vocab != tiny.VOCAB else {}
    return found | ({"seeing": case.seeing} if case.seeing else {})


def data(case: Case, seed: int) -> list[dict[str, np.ndarray]]:
    found = tiny.microbatches(case.shape, tuple(case.encoders), seed=seed, text_only=case.text_only, vocab=case.vocab)
    if case.unweighted:
        found[0]["weights"][len(found[0]["weights"]) // 2 :] = 0
        found[1]["weights"][:] = 0
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_gradients_and_state_equal_the_reference_in_float64(name: str) -> None:
    (report,) = run(ALL[name], MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), report


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ALL)
def test_losses_of_20_steps_of_sgd_equal_the_reference_in_float64(name: str) -> None:
    reports = run(ALL[name], SGD, jnp.float64, 20)
    assert max(r.loss_error for r in reports) <= 1e-9, reports


@pytest.mark.slow
@pytest.mark.parametrize(("config", "close"), [(SGD, 1e-5), (ADAMW, 1e-4)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", ALL)
def test_float32_runs_equal_the_reference(name: str, config: OptimizerConfig, close: float) -> None:
    reports = run(ALL[name], config, jnp.float32, 20)
    assert reports[0].within(loss=1e-5, leaves=1e-5, params=1e-5), reports[0]
    assert max(worst.error for r in reports for worst in r.params.values()) <= 1e-5, reports
    assert max(r.loss_error for r in reports) <= close, [r.loss_error for r in reports]
