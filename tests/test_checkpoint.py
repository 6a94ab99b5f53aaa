"""Every array survives a save; what was saved under one layout restores under any other; damage is reported."""

import gc
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from conftest import Counter
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import State, Trainer
from hetjax.run import checkpoint, digests
from hetjax.run.checkpoint import CheckpointError, Checkpoints
from hetjax.run.named import programs, to_names
from hetjax.run.names import nested

SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
ADAMW = OptimizerConfig(learning_rate=1e-2)
DISJOINT = (Layout(pp=2, tp=2, devices="0-3"), Layout(dp=2, devices="4-5"))
COLOCATED = (Layout(dp=4, tp=2), Layout(dp=8))


def build(layouts: tuple[Layout, Layout], config: OptimizerConfig = ADAMW, **model: object) -> Trainer:
    graph = tiny.graph(layouts[0], {"vision": layouts[1]}, np.float32, tied=True)
    return tiny.trainer(graph, SHAPE, config)


def train(trainer: Trainer, state: State, seeds: range) -> tuple[State, list[float]]:
    losses = []
    for seed in seeds:
        state, outcome = trainer.step(state, tiny.microbatches(SHAPE, seed=seed))
        losses.append(float(outcome.loss))
    return state, losses


def values(trainer: Trainer, state: State) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in to_names(trainer, state).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], list[float]]:
    """A checkpoint of step 2 under the disjoint layouts, its arrays, and the losses of the two steps after it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    trainer = build(DISJOINT)
    state, _ = train(trainer, trainer.init(), range(2))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(trainer, state, {"place": 7})
        arrays = values(trainer, state)
        _, losses = train(trainer, state, range(2, 4))  # donates what is being written
    return directory, arrays, losses


@pytest.mark.parametrize("layouts", [DISJOINT, COLOCATED], ids=["same layout", "another layout"])
def test_every_array_and_the_losses_after_it_are_restored(saved: tuple, layouts: tuple[Layout, Layout]) -> None:
    directory, arrays, losses = saved
    trainer = build(layouts)
    with Checkpoints(directory) as checkpoints:
        state, data = checkpoints.restore(trainer)
    assert (state.step, data) == (2, {"place": 7})
    restored = values(trainer, state)
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
    _, again = train(trainer, state, range(2, 4))
    if layouts is DISJOINT:
        assert again == losses
    else:
        np.testing.assert_allclose(again, losses, rtol=1e-6)


def test_names_are_those_of_the_model_layer_by_layer(saved: tuple) -> None:
    _, arrays, _ = saved
    assert "params/llm/layers/0003/attention/q" in arrays and "optimizer/llm/0/mu/layers/0003/attention/q" in arrays
    assert "params/llm/first/embed" in arrays and "params/llm/last/head" not in arrays
    assert len({name for name in arrays if re.search(r"optimizer/\w+/\d+/count", name)}) == 2


def test_the_copies_of_a_save_are_compiled_with_the_rest(compilations: Counter) -> None:
    trainer = build(DISJOINT)
    for _, compile in programs(trainer):
        compile()
    state = trainer.init()
    jax.block_until_ready(state.params)
    compilations.reset()
    names = to_names(trainer, state)
    assert compilations.count == 0 and len(names) > 50


def test_only_the_last_ones_are_kept_and_a_second_save_of_a_step_is_none(tmp_path: Path) -> None:
    trainer = build(COLOCATED)
    state = trainer.init()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(trainer, state._replace(step=step), {})
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
        with pytest.raises(CheckpointError, match="step 1 was not saved, a checkpoint of step 3 is there; use another"):
            checkpoints.save(trainer, state._replace(step=1), {})


def test_an_empty_directory_has_nothing_to_restore(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no complete checkpoint; train first"),
    ):
        checkpoints.restore(build(COLOCATED))


def test_another_optimizer_is_refused_by_name(saved: tuple) -> None:
    trainer = build(COLOCATED, OptimizerConfig(name="sgd", momentum=0.9))
    with (
        Checkpoints(saved[0]) as checkpoints,
        pytest.raises(CheckpointError, match=r"optimizer/llm/0/count: this run has no such array"),
    ):
        checkpoints.restore(trainer)


def test_another_model_is_refused_with_both_shapes(saved: tuple) -> None:
    graph = tiny.graph(Layout(), {"vision": Layout()}, np.float32, tied=True)
    llm = tiny.decoder(tied=True, mlp_width=16).module(np.float32, encoders=("vision",))
    modules = tuple(m if m.name != "llm" else m.__class__("llm", llm, m.layout, m.remat) for m in graph.modules)
    trainer = tiny.trainer(graph.__class__(modules, graph.edges), SHAPE, ADAMW)
    message = re.escape("optimizer/llm/0/mu/layers/0000/mlp/down has shape [32, 16], this run's is [16, 16]")
    with Checkpoints(saved[0]) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(trainer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_says_what_to_do(saved: tuple, tmp_path: Path) -> None:
    damaged = tmp_path / "checkpoints"
    shutil.copytree(saved[0], damaged)
    for path in damaged.rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(damaged) as checkpoints,
        pytest.raises(CheckpointError, match=r"cannot be read .* remove this directory"),
    ):
        checkpoints.restore(build(COLOCATED))
    del checkpoints
    gc.collect()  # Orbax leaves the tasks of a failed read behind, each with an exception that no one retrieved


def test_the_end_of_another_process_is_no_damage_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end this one with the status of what only a user can mend, which no launcher starts again."""
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-to-all failed: Connection reset by peer")

    def gone(*_: object) -> None:
        raise lost

    monkeypatch.setattr(checkpoint, "to_names", gone)
    trainer = build(DISJOINT)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(jax.errors.JaxRuntimeError) as raised:
        checkpoints.save(trainer, trainer.init(), {})
    assert raised.value is lost and lost.__notes__ == [f"when {tmp_path}/0 was to be written"]


def test_values_that_the_disk_has_changed_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, name = build(COLOCATED), "params/llm/layers/0001/mlp/down"
    one_up = lambda names: nested({**names, name: names[name].at[3, 5].add(1e-3)})
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint, "nested", one_up)  # a byte that Orbax does not miss
        checkpoints.save(trainer, trainer.init(), {})
        checkpoints.wait()
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=rf"/0: {name} has other values than were saved; .* remove this"):
            checkpoints.restore(trainer)


def test_a_digest_sees_one_element_and_where_it_stands_however_the_array_is_cut() -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    array = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    swapped, other = array.copy(), array.copy()
    swapped[2], swapped[3], other[5, 7] = array[3], array[2], np.nextafter(array[5, 7], np.float32(9))
    specs = {"whole": P(), "rows": P("a"), "both": P("b", "a"), "over one": P(None, ("a", "b"))}
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    found = digests.of({name: place(array, spec) for name, spec in specs.items()})
    assert len(set(found.values())) == 1
    wrong = digests.of({"swapped": place(swapped, P("a")), "other": place(other, P())})
    assert not set(wrong.values()) & set(found.values())


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(Layout(pp=2, tp=2, layers=(3, 1), devices="0-3"), marks=pytest.mark.slow),
        Layout(pp=2, vpp=2, tp=2, devices="0-3"),
    ],
    ids=str,
)
def test_layers_of_two_kinds_restore_under_another_cut_by_their_number_in_the_model(
    cut: Layout, tmp_path: Path
) -> None:
    def fresh(llm: Layout, seed: int) -> Trainer:
        graph = tiny.graph(llm, {"vision": Layout(devices="7")}, np.float32, experts=tiny.EXPERTS)
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.microbatches(SHAPE)[0].items()}
        sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
        return Trainer(TrainSpec(graph, jax.devices(), batch, optimizer=ADAMW, seed=seed, **sizes))

    one, other = fresh(Layout(), 3), fresh(cut, 4)
    state = one.init()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(one, state, {})
        checkpoints.wait()
        restored = values(other, checkpoints.restore(other)[0])
    saved = values(one, state)
    assert restored.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
    layers = lambda leaf: [i for i in range(4) if f"params/llm/layers/{i:04d}/{leaf}" in saved]
    assert layers("attention/q") == [0, 1, 2, 3] and layers("moe/gate") == [0, 2, 3] and layers("mlp/gate") == [1]
    assert saved["params/llm/layers/0002/moe/gate"].shape == (6, tiny.WIDTH, 12)
