"""What a microbatch sends within a stage: as much as the axes ask for, and nothing over the data replicas."""

import dataclasses

import jax.numpy as jnp
import tiny
from collectives import traced

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat

SGD = OptimizerConfig(name="sgd", learning_rate=0.1)
SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
EXPERTS = dataclasses.replace(tiny.EXPERTS, count=8, dense_layers=())
MICROBATCH = ("llm/0 forward", "llm/0 backward")
LAYERS = 4


def programs(llm: Layout, **model: object) -> dict:
    graph = tiny.graph(llm, {"vision": Layout()}, jnp.float32, remat=Remat.NONE, **model)
    return traced(graph, SHAPE, SGD)


def test_a_microbatch_sends_nothing_over_dp_and_only_keys_and_values_over_cp() -> None:
    found = programs(Layout(dp=2, cp=2))
    forward, backward = (found[name] for name in MICROBATCH)
    assert {c.name for c in forward if c.elements > 1 and "cp" in c.axes} == {"all_gather"}
    over_cp = [c for c in forward if c.name == "all_gather" and len(c.shape) == 4]
    assert [(c.shape, c.times) for c in over_cp] == [((2, 8, 4, 4), LAYERS)] * 2
    back = [c for c in backward if c.name == "reduce_scatter"]
    assert [(c.shape, c.times) for c in back] == [((2, 16, 4, 4), LAYERS)] * 2
    assert not [c for c in forward + backward if "dp" in c.axes and c.elements > 1]  # the loss, one number, is summed
    assert all(c.axes == ("dp", "cp") for c in found["llm/0 reduce"] if c.name == "reduce_scatter")


def test_under_sequence_parallelism_no_activation_is_reduced_whole() -> None:
    whole, cut = (programs(Layout(tp=2, sp=sp)) for sp in (False, True))
    rows = (SHAPE.slots * 4, tiny.WIDTH)  # of the encoder, whose gradient each rank has a part of, once a microbatch

    def activations(found: list) -> list[tuple[str, int]]:
        return [(c.name, c.times) for c in found if c.shape[-1:] == (tiny.WIDTH,) and c.shape != rows]

    assert {name for n in MICROBATCH for name, _ in activations(whole[n])} == {"psum_invariant"}
    forward, backward = (activations(cut[name]) for name in MICROBATCH)
    assert {name for name, _ in forward + backward} == {"all_gather", "reduce_scatter"}
    # a layer has two blocks, with a gather in front and a scatter behind; the backward gathers again
    assert (forward.count(("all_gather", LAYERS)), forward.count(("reduce_scatter", LAYERS))) == (2, 2)
    assert (backward.count(("all_gather", LAYERS)), backward.count(("reduce_scatter", LAYERS))) == (4, 2)


def test_experts_are_exchanged_over_ep_alone() -> None:
    found = programs(Layout(dp=2, ep=2), experts=EXPERTS)
    forward, backward = (found[name] for name in MICROBATCH)
    routing = (LAYERS, 2 * EXPERTS.count + 1)  # sums of what routers say, made whole behind the last layer
    assert [c.times for c in forward + backward if c.shape == routing] == [1]
    sent = [c for c in forward + backward if c.elements > 1 and c.shape != routing]
    assert {c.axes for c in sent} == {("dp",)} and {c.name for c in sent} == {"all_gather", "reduce_scatter"}
    tokens = 2 * tiny.SEQ  # of a device
    rows = [c for c in forward if c.shape == (tokens, tiny.WIDTH)]
    assert [(c.name, c.times) for c in rows] == [("all_gather", LAYERS)]
    back = [c for c in forward if c.name == "reduce_scatter"]
    assert [(c.shape, c.times) for c in back] == [((2 * tokens, tiny.WIDTH), LAYERS)]
    reduced = [c for c in found["llm/0 reduce"] if c.name == "reduce_scatter"]
    experts = 8 * tiny.WIDTH * EXPERTS.width * LAYERS // 2  # of one of the three matrices, on a device
    assert reduced and all(c.elements < experts for c in reduced)  # an expert's gradient is whole where it lies
