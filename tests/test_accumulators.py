"""Gradients are added in place, microbatch by microbatch in their order, whatever lies in the accumulators before."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core import accumulators, loss
from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.stacks import Row
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from models.decoder import Decoder

SGD = OptimizerConfig(name="sgd", learning_rate=0.1)
SHAPE = tiny.Shape(samples=2, groups=2, slots=4)
COLOCATED = dict(llm=Layout(pp=2, devices="0-1"), encoders={"vision": Layout(dp=2, devices="0-1")})
SCHEDULES: list[dict[str, Any]] = [
    dict(schedule="1f1b"),
    dict(schedule="1f1b", encoder_window=1),
    dict(schedule="zerobubble", encoder_window=2),
    dict(schedule="gpipe"),
]
SMALL = Decoder(vocab_size=32, width=40, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=48)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_every_schedule_gives_the_same_bits_whatever_lay_in_the_accumulators() -> None:
    """The tied embedding gets gradients from two stages; the encoder has two replicas, the others one."""
    graph = tiny.graph(**COLOCATED, dtype=jnp.float32, tied=True)
    data = tiny.microbatches(SHAPE)
    found, orders = [], set()
    for options in SCHEDULES:
        trainer = tiny.trainer(graph, SHAPE, SGD, **options)
        orders.add(trainer.pipeline.schedule.order)
        state = trainer.init()
        full = {key: jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), tree) for key, tree in state.acc.items()}
        done = trainer.gradients(state._replace(acc=full), data)
        found.append(bits((done.grads, done.scores, done.reduced.squares)))
    assert len(orders) == len(SCHEDULES)
    assert all(bits == found[0] for bits in found)
    assert np.isfinite(np.concatenate(done.reduced.squares)).all()


def test_every_gradient_is_measured_once() -> None:
    spec = tiny_spec(tiny.graph(**COLOCATED, dtype=jnp.float32, tied=True))
    trainer = Trainer(spec)
    paths = [path for _, of_stage in trainer.finish.paths for path in of_stage]
    of_stages = [trainer.pipeline.stages[key].parameters for key in trainer.pipeline.stages]
    assert paths.count("llm/first/embed") == 1 and "llm/last/head" not in paths
    assert len(paths) == sum(len(jax.tree.leaves(p.owned(p.grads))) for p in of_stages)


def tiny_spec(graph: Any) -> TrainSpec:
    example = tiny.microbatches(SHAPE)[0]
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example.items()}
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    return TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=SGD, **sizes)


def test_a_layers_rows_alone_change_and_stale_values_do_no_harm() -> None:
    acc = {"a": jnp.full((1, 3, 2), jnp.nan), "b": {"c": jnp.zeros((1, 1, 2))}}
    rows, new = {"a": Row(2, -2)}, {"a": jnp.array([1.0, 2.0])}
    add = jax.jit(lambda acc, i, first: accumulators.add_layer(acc, rows, i, new, first))
    once = add(acc, jnp.int32(0), True)
    twice = add(add(once, jnp.int32(1), True), jnp.int32(0), False)
    np.testing.assert_array_equal(twice["a"], [[[1, 2], [np.nan, np.nan], [2, 4]]])
    np.testing.assert_array_equal(twice["b"]["c"], acc["b"]["c"])


def stage_of(
    model: Decoder, remat: Remat, *, samples: int = 2, optimizer: OptimizerConfig = SGD, unroll: bool = False
) -> Any:
    """The one stage of a decoder alone, on one device; nothing is compiled."""
    names = ("tokens", "positions", "segment_ids", "targets")
    batch = {name: jax.ShapeDtypeStruct((samples, 16), jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct((samples, 16), jnp.float32)
    graph = vlm((), Module("llm", model.module(jnp.float32), Layout(), remat, unroll))
    sizes = dict(groups=1, num_microbatches=1)
    trainer = Trainer(TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=optimizer, **sizes))
    return trainer.pipeline.stages["llm", 0]


@pytest.mark.parametrize("unroll", [False, True])
def test_the_gradients_of_the_layers_never_exist_together(unroll: bool) -> None:
    """With more layers the backward's workspace does not grow: no accumulator is copied, no layer's weights are taken
    before it is their turn."""

    def workspace(num_layers: int) -> int:
        stage = stage_of(dataclasses.replace(SMALL, num_layers=num_layers), Remat.FULL, unroll=unroll)
        stage.thunks(evaluate=False)["backward"]()
        copies = re.findall(rf"f32\[(?:1,)?{num_layers},[\d,]+\]\S* copy\(.*", stage.programs["backward"].as_text())
        assert not (unroll and copies), "of accumulators"
        return stage.memory["backward"].temp_size_in_bytes

    layer = sum(a.size for a in jax.tree.leaves(stage_of(SMALL, Remat.FULL).parameters.params["layers"])) * 4 // 3
    assert workspace(8) - workspace(3) < layer


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_a_layer_keeps_no_weight_nor_what_depends_on_the_batch_alone(remat: Remat) -> None:
    stage = stage_of(SMALL, remat)
    stage.thunks(evaluate=False)
    kept = [a for a in stage.kept if a.shape[:2] == (1, SMALL.num_layers)]
    shapes = {a.shape[2:] for a in kept}
    weights = {a.shape[1:] for a in jax.tree.leaves(stage.parameters.weights["layers"])}
    assert not shapes & weights and (2, 16, 1, SMALL.head_features // 2) not in shapes
    assert all(a.dtype == jnp.float32 for a in kept), "no positions, segments and masks"
    assert sum(a.shape[2:] == (2, 2, 32, 16) for a in kept) == (remat is Remat.NONE), "weights of attention, once"
    assert remat is Remat.NONE or shapes == {(2, 16, SMALL.width)}


def test_unrolled_layers_are_in_no_loop_and_what_they_keep_is_not_stacked() -> None:
    scanned, unrolled = (stage_of(SMALL, Remat.FULL, unroll=unroll) for unroll in (False, True))
    for stage in (scanned, unrolled):
        stage.thunks(evaluate=False)["forward"]()
    stacked = [a.shape for a in scanned.kept if a.shape[:2] == (1, SMALL.num_layers)]
    shapes = [a.shape for a in unrolled.kept]
    assert stacked and not any(shape[:2] == (1, SMALL.num_layers) for shape in shapes)
    assert all(shapes.count((1, *shape[2:])) >= SMALL.num_layers for shape in stacked)
    assert " while(" in scanned.programs["forward"].as_text()
    assert " while(" not in unrolled.programs["forward"].as_text()


def test_the_loss_takes_one_product_of_the_heads_size_and_the_logits_of_a_chunk(monkeypatch: Any) -> None:
    """By these the backward's workspace grows with the vocabulary; the forward has nothing of the vocabulary's size."""
    chunk, few, many = 4, 2**10, 2**12
    monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
    frozen = dataclasses.replace(SGD, frozen=("llm/first/embed",))  # whose gradient would be as large

    def compiled(vocab_size: int) -> Any:
        stage = stage_of(dataclasses.replace(SMALL, vocab_size=vocab_size), Remat.FULL, optimizer=frozen)
        for name, compile in stage.thunks(evaluate=False).items():
            if name != "update":
                compile()
        return stage

    small, large = compiled(few), compiled(many)
    assert not large.y and small.memory["forward"].temp_size_in_bytes == large.memory["forward"].temp_size_in_bytes
    logits, head = 4 * chunk * (many - few), 4 * SMALL.width * (many - few)
    grown = large.memory["backward"].temp_size_in_bytes - small.memory["backward"].temp_size_in_bytes
    assert grown < head + 3 * logits < 2 * head


def test_carries_that_have_no_gradient_are_refused() -> None:
    definition = SMALL.module(jnp.float32)
    first = definition.first
    counted = lambda *args: first.apply(*args) | {"count": jnp.zeros((2, 16), jnp.int32)}
    definition = dataclasses.replace(definition, first=dataclasses.replace(first, apply=counted))
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in definition.reads}
    sizes = dict(groups=1, num_microbatches=1)
    graph = vlm((), Module("llm", definition, Layout()))
    with pytest.raises(ValueError, match="llm: the carry's 'count' is int32; it must be of floating-point numbers"):
        Trainer(TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=SGD, **sizes))
