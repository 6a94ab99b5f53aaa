"""A step of SGD under layouts that differ between the modules, exported, is the same step in torch.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import beside_torch
import families
import hf_folders
import jax
import numpy as np
import pytest
from beside_torch import in_transformers, torch

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.hf import export, initial
from hetjax.hf.source import Source
from hetjax.hf.stored import open_source

pytestmark = beside_torch.QUIET
RATE = 0.5
LAYOUTS = {  # of the decoder, and of the encoder
    "tp 2 x pp 2 | dp 2": (Layout(tp=2, pp=2, devices="0-3"), Layout(dp=2, devices="4-5")),
    "dp 2 x tp 2 | tp 2 x pp 2": (Layout(dp=2, tp=2, devices="0-3"), Layout(tp=2, pp=2, devices="4-7")),
}
CASES = [
    pytest.param("clip + llama", "tp 2 x pp 2 | dp 2", marks=pytest.mark.slow),
    ("siglip + qwen2, tied", "dp 2 x tp 2 | tp 2 x pp 2"),
    pytest.param("siglip + qwen3_moe, every other layer", "tp 2 x pp 2 | dp 2", marks=pytest.mark.slow),
    pytest.param("qwen2_audio", "tp 2 x pp 2 | dp 2", marks=pytest.mark.slow),
    pytest.param("qwen2_audio", "dp 2 x tp 2 | tp 2 x pp 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "layouts"), CASES)
def test_a_step_of_sgd_under_layouts_exports_what_torch_gets(family: str, layouts: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", families.ALL[family])
    source, model = open_source(folder), in_transformers.load(folder)
    microbatch = families.microbatch(source.models)
    (tower,) = source.models.keys() - {"llm"}
    # our two groups own two slots each: the second sample's picture or clip lies in the third
    spec = TrainSpec(
        graph=beside_torch.graph(source.models, dict(zip(("llm", tower), LAYOUTS[layouts], strict=True))),
        devices=jax.devices(),
        batch={k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in microbatch.items()},
        groups=2,
        num_microbatches=1,
        optimizer=OptimizerConfig(name="sgd", learning_rate=RATE, clip_norm=None),
    )
    trainer = Trainer(spec)
    trainer.compile()
    state = initial.state(trainer, initial.open_starts(trainer.graph, dict.fromkeys(source.models, str(folder))))
    state, outcome = trainer.step(state, [microbatch])
    export.to_hf(_Live(source, trainer.whole(state.params)), tmp_path / "out")

    expected = beside_torch.theirs(model, source, microbatch)
    assert abs(float(outcome.loss) - expected.scalar) <= 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
    after, before = (in_transformers.load(d).state_dict() for d in (tmp_path / "out", folder))
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(after[name].numpy(), value.numpy(), atol=1e-5, err_msg=name)
    assert any(not torch.equal(after[name], before[name]) for name in after)


class _Live:
    """A trainer's parameters as a source."""

    def __init__(self, began: Source, params: Mapping[str, Any]) -> None:
        self.path, self.models, self.arrays, self.extras = began.path, began.models, began.arrays, began.extras
        self._params = params

    def fetch(self, names: list[str]) -> dict[str, np.ndarray]:
        return {name: beside_torch.leaf(self.models, self._params, name) for name in names}
