"""Initial values depend on the seed, the module and the layer, never on a layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.judge import compare
from models.moe import Experts


@pytest.mark.parametrize(
    "experts",
    [None, pytest.param(tiny.EXPERTS, marks=pytest.mark.slow)],
    ids=["one kind of layer", "two kinds"],
)
def test_values_at_step_0_are_those_of_one_device_whatever_the_layouts(experts: Experts | None) -> None:
    shape = tiny.Shape()
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.microbatches(shape)[0].items()}

    def initial(llm: Layout, vision: Layout) -> Trainer:
        graph = tiny.graph(llm, {"vision": vision}, jnp.float32, tied=True, experts=experts)
        options = dict(devices=jax.devices(), batch=batch, groups=shape.groups, num_microbatches=shape.microbatches)
        return Trainer(TrainSpec(graph, optimizer=OptimizerConfig(), seed=5, **options))

    trainers = initial(Layout(), Layout()), initial(Layout(pp=2, tp=2), Layout(dp=2, pp=2, devices="4-7"))
    plain, cut = (trainer.flat(trainer.init().params) for trainer in trainers)
    for module, leaves in plain.items():
        assert cut[module].keys() == leaves.keys()
        for path, value in leaves.items():
            np.testing.assert_array_equal(cut[module][path], value, err_msg=str(path))
    for trainer in trainers:
        assert all(worst.error < 1e-6 for worst in compare.compare_initial(trainer).values())
    trainers[1].spec = dataclasses.replace(trainers[1].spec, seed=6)
    assert all(worst.error > 0.1 for worst in compare.compare_initial(trainers[1]).values())
