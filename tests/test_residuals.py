"""What a forward keeps for its backward: few arrays, each once, whatever the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core import residuals
from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from models.decoder import Decoder
from models.layers import dot
from models.vit import ViT
from models.whisper import Whisper

MOST = 16  # arrays; each costs the host time in every task
SGD = OptimizerConfig(name="sgd")
DECODER = Decoder(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
ENCODERS: dict[str, ViT | Whisper] = {
    "siglip": tiny.vit(),
    "clip": tiny.vit(variant="clip", select="default"),
    "whisper": tiny.whisper(variant="whisper", projector="mlp"),
    "qwen2_audio": tiny.whisper(),
}


def kept(name: str, dtype: Any, seq: int) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """What the stages of a decoder and of one encoder keep; nothing is compiled."""
    model = ENCODERS[name]
    encoder = Module(name, model.module(dtype, name=name), Layout(), Remat.NONE)
    graph = vlm((encoder,), Module("llm", DECODER.module(dtype, encoders=(name,)), Layout(), Remat.NONE))
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "targets", f"{name}.index"), ((2, seq), jnp.int32))
    batch["weights"] = (2, seq), jnp.float32
    if isinstance(model, ViT):
        batch[f"{name}.pixels"] = (2, model.image_size, model.image_size, 3), jnp.float32
    else:
        batch[f"{name}.mel"] = (2, model.frames, model.num_mels), jnp.float32
        batch[f"{name}.frames"] = (2,), jnp.int32
    abstract = {key: jax.ShapeDtypeStruct(*given) for key, given in batch.items()}
    sizes = dict(groups=1, num_microbatches=1)
    trainer = Trainer(TrainSpec(graph=graph, devices=jax.devices()[:1], batch=abstract, optimizer=SGD, **sizes))
    for stage in trainer.pipeline.stages.values():
        stage.thunks(evaluate=False)
    return {key: stage.kept for (key, _), stage in trainer.pipeline.stages.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "seq"), [("siglip", 16), ("clip", 256), ("whisper", 300), ("qwen2_audio", 16)])
def test_a_stage_keeps_few_arrays(name: str, seq: int, dtype: Any) -> None:
    for key, found in kept(name, dtype, seq).items():
        assert len(found) <= MOST, (key, [a.shape for a in found])


def test_an_array_that_several_vjps_need_is_kept_once() -> None:
    w = jnp.ones((4, 4))

    def program(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.sin(x)
        y, pull = jax.vjp(lambda h, w: (dot(h, w), dot(h, w)), h, w)
        taken = residuals.take_apart(pull, [w])
        assert len(taken.arrays) == 1
        return residuals.put_together(taken, [w])(y), pull(y)

    for mine, expected in zip(*jax.jit(program)(jnp.ones((3, 4))), strict=True):
        np.testing.assert_array_equal(mine, expected)
