"""A vocabulary that tp does not divide: nothing but the devices knows of its padding, and the padding of nothing."""

import functools
from pathlib import Path
from typing import Any

import answering
import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hetjax import convert, generate, train
from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.plan import plan_stages
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import State, Trainer
from hetjax.generate import Sampling
from hetjax.generate.defaults import Penalties
from hetjax.run.checkpoint import Checkpoints
from hetjax.run.named import abstract_names, to_names
from models.axes import Axes, Axis
from models.rows import lookup

VOCAB = 61
ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
CUT = Layout(dp=2, tp=4)  # 16 ids a device, of which the last one has three of padding
STAGES, SHARDS = Layout(pp=2, tp=4), Layout(dp=2, tp=4, zero=3)
WAYS = Sampling(), Sampling(temperature=100.0)


def graph(llm: Layout, *, tied: bool) -> Any:
    """The decoder alone."""
    return tiny.graph(llm, {}, np.float32, tied=tied, vocab=VOCAB)


def build(llm: Layout, *, tied: bool) -> Trainer:
    """Not compiled."""
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.microbatches(SHAPE, ())[0].items()}
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    return Trainer(TrainSpec(graph(llm, tied=tied), jax.devices(), batch, optimizer=ADAMW, **sizes))


def random_state(trainer: Trainer) -> State:
    """The first step's state with random moments, behind the vocabulary too."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)
    state = trainer.init()
    return state._replace(optimizer=jax.tree.map(draw, state.optimizer))


def embeddings(trainer: Trainer, state: State) -> list[np.ndarray]:
    """The embedding and its moments as they lie on devices: [vocabulary, features]."""
    first = trainer.pipeline.plans["llm"][0]
    key = ("llm", first.index)
    trees = (state.params[key], state.optimizer[key])
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return [np.asarray(leaf) for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['embed']")]


@pytest.mark.parametrize(
    ("layout", "tied"), [(STAGES, True), pytest.param(SHARDS, False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def test_values_and_checkpoints_are_those_of_one_device(layout: Layout, tied: bool, tmp_path: Path) -> None:
    cut, one = build(layout, tied=tied), build(Layout(), tied=tied)
    state = random_state(cut)
    for path, value in one.flat(one.initial_params())["llm"].items():
        np.testing.assert_array_equal(cut.flat(state.params)["llm"][path], value, err_msg=str(path))
    before = to_names(cut, state)
    assert before["params/llm/first/embed"].shape == (VOCAB, tiny.WIDTH)
    there = moved(state, cut, one, tmp_path / "there")
    back = moved(there, one, cut, tmp_path / "back")
    for names in (to_names(one, there), to_names(cut, back)):
        assert names.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(names[name], array, err_msg=name)
    assert {len(embed) for embed in embeddings(one, there)} == {VOCAB}
    for embed in embeddings(cut, back):
        assert len(embed) == 64 and not embed[VOCAB:].any()


def moved(state: State, one: Trainer, other: Trainer, directory: Path) -> State:
    """A state of `one` as a checkpoint gives it to `other`."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(one, state, {})
        checkpoints.wait()
        return checkpoints.restore(other)[0]


def test_what_is_saved_is_cut_along_another_dim_and_what_is_held_counts_the_padding() -> None:
    trainer = build(CUT, tied=False)
    stored = abstract_names(trainer)["optimizer/llm/0/mu/first/embed"]
    assert stored.shape == (VOCAB, tiny.WIDTH) and stored.sharding.shard_shape(stored.shape) == (VOCAB, tiny.WIDTH // 8)
    held = trainer.pipeline.stages["llm", 0].parameters.grads["first"]["embed"]
    assert memory.local_bytes(held) == 64 // 8 * tiny.WIDTH * 4
    grid = plan_stages("llm", graph(Layout(tp=4), tied=False).sink.definition, Layout(tp=4), jax.devices())[0].grid
    assert grid.padded((61, 61), ("vocab", "mlp")) == (64, 61)
    assert grid.fitting((61, 6), P("tp")) == P(None, None) and grid.fitting((64, 8), P("tp")) == P("tp", None)


def test_an_id_behind_the_vocabulary_yields_zeros_and_moves_nothing() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    table = jnp.ones((14, 3))
    find = functools.partial(lookup, vocab=13, axes=Axes(tp=Axis(("tp",), 2)))
    cut = jax.shard_map(find, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P())
    total = lambda table, tokens: (2 * cut(table, tokens).sum(), cut(table, tokens))
    (_, found), moves = jax.jit(jax.value_and_grad(total, has_aux=True))(table, jnp.array([[12, 13, 14, 0]]))
    np.testing.assert_array_equal(found[0, :, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(moves[:, 0], 2 * np.isin(np.arange(14), [0, 12]))


def test_answers_are_of_the_vocabulary_and_do_not_depend_on_tp(tmp_path: Path) -> None:
    """Of 49 ids on 8 devices the last one has none. All but a few are suppressed: their logits are often negative."""
    sizes = dict(vocab_size=49, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    folder = answering.folder(tmp_path / "folder", hf_folders.text("llama", **sizes))

    def answers(tp: int) -> list[list[list[int]]]:
        model = generate.load(folder, tp=tp)
        model.engine.penalties = Penalties(suppressed=tuple(range(3, 49)))
        found = [model(answering.prompts(tmp_path, vision=False), max_new_tokens=8, sampling=s) for s in WAYS]
        return [[answer.tokens for answer in each] for each in found]

    one, eight = answers(1), answers(8)
    assert one == eight
    assert {token for each in one for tokens in each for token in tokens} == {0, 1, 2}


@pytest.mark.slow
def test_what_is_behind_the_vocabulary_stays_zero_through_steps() -> None:
    trainer = tiny.trainer(graph(CUT, tied=True), SHAPE, ADAMW)
    state = trainer.init()
    for seed in range(3):
        done = trainer.gradients(state, tiny.microbatches(SHAPE, (), seed=seed, vocab=VOCAB))
        gradient = np.asarray(done.grads["llm", 0]["first"]["embed"])
        assert gradient.shape == (64, tiny.WIDTH) and not gradient[VOCAB:].any() and gradient[:VOCAB].any()
        state, _ = trainer.update(state, done)
    for embed in embeddings(trainer, state):
        assert not embed[VOCAB:].any() and embed[:VOCAB].all(-1).any()


@pytest.mark.slow
def test_an_export_is_that_of_a_run_under_tp_1(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    found = []
    for tp in (1, 2):
        changes = runs.layouts(vision=dict(), llm=dict(tp=tp)) | runs.settings(steps=4, num_microbatches=1)
        # Adam would move key biases, whose gradient is zero but for rounding, by that
        changes |= {"optimizer.OptimizerConfig.name": "sgd", "optimizer.OptimizerConfig.weight_decay": 0.0}
        changes |= {"decoder.Decoder.vocab_size": 33, "vit.ViT.feature_layer": -2}
        assert train.main(runs.arguments(gin, tmp_path / f"run{tp}", changes)) == 0
        assert convert.main(["to_hf", str(tmp_path / f"run{tp}"), "--out", str(tmp_path / f"out{tp}")]) == 0
        found.append(hf_folders.read(tmp_path / f"out{tp}"))
    one, two = found
    assert one.keys() == two.keys() and any(len(tensor) == 33 for tensor in one.values())
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)
