"""What a microbatch sends within a stage: as much as the axes ask for, and nothing over the data replicas."""

import dataclasses

import jax
import jax.numpy as jnp
import tiny
from traced import Collective, collectives

from hetjax.core import loss
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer

SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
EXPERTS = dataclasses.replace(tiny.EXPERTS, count=8, dense_layers=())
LAYERS = 4


def programs(llm: Layout, **model: object) -> dict[str, list[Collective]]:
    """Those of the language model's programs, one stage of them, nothing rematerialised."""
    graph = tiny.graph(llm, {"vision": Layout()}, jnp.float32, remat=Remat.NONE, **model)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.microbatches(SHAPE)[0].items()}
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    spec = TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=OptimizerConfig(), **sizes)
    stage = Trainer(spec).pipeline.stages["llm", 0]
    return {
        name: collectives(stage, name)
        for name in ("forward", "backward", "reduce")
        if name in stage.thunks(evaluate=False)
    }


def test_a_microbatch_sends_nothing_over_dp_and_only_keys_and_values_over_cp() -> None:
    found = programs(Layout(dp=2, cp=2))
    forward, backward = found["forward"], found["backward"]
    assert {c.kind for c in forward if c.size > 1 and "cp" in c.axes} == {"all_gather"}
    over_cp = [c for c in forward if c.kind == "all_gather" and len(c.shape) == 4]
    assert [(c.shape, c.times) for c in over_cp] == [((2, 8, 4, 4), LAYERS)] * 2
    back = [c for c in backward if c.kind == "reduce_scatter"]
    assert [(c.shape, c.times) for c in back] == [((2, 16, 4, 4), LAYERS)] * 2
    assert not [c for c in forward + backward if "dp" in c.axes and c.size > 1]  # the loss, one number, is summed
    assert all(c.axes == ("dp", "cp") for c in found["reduce"] if c.kind == "reduce_scatter")


def test_under_sequence_parallelism_no_activation_is_reduced_whole() -> None:
    whole, cut = (programs(Layout(tp=2, sp=sp)) for sp in (False, True))
    rows = (SHAPE.slots * 4, tiny.WIDTH)  # of the encoder, whose gradient each rank has a part of, once a microbatch
    chunk = SHAPE.samples * tiny.SEQ // loss.CHUNKS["cpu"]  # of tokens, as many as features: largest logit, two sums
    others = {rows, (chunk,), (2, chunk)}

    def activations(found: list) -> list[tuple[str, int]]:
        return [(c.kind, c.times) for c in found if c.shape[-1:] == (tiny.WIDTH,) and c.shape not in others]

    assert {kind for kind, _ in activations(whole["forward"] + whole["backward"])} == {"psum"}
    forward, backward = (activations(cut[name]) for name in ("forward", "backward"))
    assert {kind for kind, _ in forward + backward} == {"all_gather", "reduce_scatter"}
    # a layer has two blocks, with a gather in front and a scatter behind; the backward gathers again
    assert (forward.count(("all_gather", LAYERS)), forward.count(("reduce_scatter", LAYERS))) == (2, 2)
    assert (backward.count(("all_gather", LAYERS)), backward.count(("reduce_scatter", LAYERS))) == (4, 2)


def test_experts_are_exchanged_over_ep_alone() -> None:
    found = programs(Layout(dp=2, ep=2), experts=EXPERTS)
    forward, backward = found["forward"], found["backward"]
    routing = (LAYERS, 2 * EXPERTS.count + 1)  # sums of what routers say, made whole behind the last layer
    assert [c.times for c in forward + backward if c.shape == routing] == [1]
    sent = [c for c in forward + backward if c.size > 1 and c.shape != routing]
    assert {c.axes for c in sent} == {("dp",)} and {c.kind for c in sent} == {"all_gather", "reduce_scatter"}
    tokens = 2 * tiny.SEQ  # of a device
    rows = [c for c in forward if c.shape == (tokens, tiny.WIDTH)]
    assert [(c.kind, c.times) for c in rows] == [("all_gather", LAYERS)]
    back = [c for c in forward if c.kind == "reduce_scatter"]
    assert [(c.shape, c.times) for c in back] == [((2 * tokens, tiny.WIDTH), LAYERS)]
    reduced = [c for c in found["reduce"] if c.kind == "reduce_scatter"]
    experts = 8 * tiny.WIDTH * EXPERTS.width * LAYERS // 2  # of one of the three matrices, on a device
    assert reduced and all(c.size < experts for c in reduced)  # an expert's gradient is whole where it lies
