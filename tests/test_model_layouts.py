"""Each model, cut over a mesh, has the outputs and gradients that it has on one device, in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from test_models import DECODER, LLAMA3, VIT, WHISPER, close, documents, random_params, rows_of, run

from hetjax.core import loss
from hetjax.core.layout import Layout
from hetjax.core.parameters import param_dims
from hetjax.core.plan import plan_stages
from models.axes import ONE_DEVICE, Axes, vary, vary_like
from models.contract import ModuleDef
from models.decoder import Decoder
from models.moe import Experts
from models.paths import nested
from models.vit import ViT
from models.whisper import Whisper

Tree = Any
SAMPLES, SEQ, ITEMS = 4, 16, 4
RICH = dataclasses.replace(
    DECODER,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    qk_norm=True,
    attention_bias=True,
    rope_scaling=LLAMA3,
    sliding_window=6,
)
CONFIGS = {
    "rich": RICH,
    "tied": dataclasses.replace(DECODER, tied=True),
    "experts": dataclasses.replace(
        RICH, num_layers=3, experts=Experts(8, 2, 8, dense_layers=(1,), balance_loss=0.5, z_loss=0.1)
    ),
    "three": dataclasses.replace(DECODER, num_heads=12, num_kv_heads=3),
    "siglip": VIT,
    "audio": dataclasses.replace(WHISPER, variant="qwen2_audio", projector="mlp"),
    "clip": dataclasses.replace(VIT, variant="clip", select="default", feature_layer=-2),
    "several layers": dataclasses.replace(VIT, feature_layer=(-2, 0, -1), projector_bias=False),
}


def scored(definition: ModuleDef, axes: Axes, params: Tree, x: Tree, batch: Tree, g: Tree) -> Tree:
    """(outputs, gradients of params, gradients of x) from the outputs' cotangents; of a language model the outputs are
    its rows and this device's part of the loss, which is no part of the head's."""
    y, pull = jax.vjp(lambda params, x: run(definition, params, x, batch, axes), params, x)
    g = {k: vary_like(a, y[k]) for k, a in g.items()}
    if "head" not in y:
        return y, *pull(g)
    tokens, seed = (batch["targets"], batch["weights"]), jnp.ones(())
    head, empty = loss.Head(y["head"], 1, definition.vocab), 0 * y["head"]
    total, g_x, g_head = loss.add_gradients(y["x"], head, *tokens, empty, seed=seed, axes=axes, chunk=3)
    mine = g["x"] / axes.sp.size  # gathered over sp, the rows are there once for each of its devices
    beside = {k: v for k, v in y.items() if k not in ("x", "head")}  # what routers tell
    pulled = pull({"x": mine + g_x, "head": g_head} | {k: g[k] for k in beside})
    return {"x": axes.sp.pmax(y["x"]), "loss": total} | beside, *pulled


def example(config: Decoder | ViT | Whisper) -> tuple[ModuleDef, Tree, Tree]:
    """(definition, inputs, batch): packed and padded rows, pictures that several replicas hold, unused slots."""
    rng = np.random.default_rng(0)
    if isinstance(config, Whisper):
        mel = rng.normal(size=(ITEMS, config.frames, config.num_mels)).astype(np.float32)
        return config.module(jnp.float64), {}, {"audio.mel": mel, "audio.frames": np.array([24, 11, 0, 3], np.int32)}
    if isinstance(config, ViT):
        pixels = rng.normal(size=(ITEMS, config.image_size, config.image_size, 3)).astype(np.float32)
        return config.module(jnp.float64), {}, {"vision.pixels": pixels}
    batch = rows_of(documents(9, 7), documents(5, 4, 3), documents(SEQ), documents(2, 11))
    index = np.full((SAMPLES, SEQ), -1, np.int32)
    index[0, 4:8] = [0, 1, 2, 3]  # items 0 and 1 are of the first half of the samples, 2 and 3 of the second
    index[1, 1:3] = [3, 2]
    index[3, 3:5] = [6, 7]
    batch |= {"vision.index": index, "targets": rng.integers(0, DECODER.vocab_size, (SAMPLES, SEQ)).astype(np.int32)}
    batch["weights"] = (rng.random((SAMPLES, SEQ)) * (batch["segment_ids"] > 0)).astype(np.float32)
    rows = rng.normal(size=(ITEMS, 2, config.width))
    return config.module(jnp.float64, encoders=("vision",)), {"vision": rows}, batch


@functools.cache
def judged(name: str) -> Tree:
    """(definition, params, x, batch, cotangents) and, of one device, (outputs, gradients of params, gradients of x)."""
    definition, x, batch = example(CONFIGS[name])
    params = random_params(definition)
    shapes = jax.eval_shape(functools.partial(run, definition), params, x, batch)
    rng = np.random.default_rng(1)
    g = {k: rng.normal(size=a.shape) for k, a in shapes.items() if k != "head"}
    return (definition, params, x, batch, g), jax.jit(functools.partial(scored, definition, ONE_DEVICE))(
        params, x, batch, g
    )


def on_mesh(definition: ModuleDef, layout: Layout, params: Tree, x: Tree, batch: Tree, g: Tree) -> Tree:
    """Outputs and gradients as a stage computes them: per device, of parameters cast to varying over the replicas."""
    plan = plan_stages("model", definition, layout, jax.devices())[0]
    spec = plan.grid.spec
    specs = nested({path: spec(dims) for path, dims in param_dims(definition, plan).items()})
    g_specs = {k: spec(definition.output[k]) for k in g}
    y_specs = g_specs | ({"loss": P()} if "tokens" in batch else {})
    x_specs = {k: spec(("items", None, None)) for k in x}
    batch_specs = {k: spec(definition.reads[k]) for k in batch}

    def program(params: Tree, x: Tree, batch: Tree, g: Tree) -> Tree:
        params = jax.tree.map(lambda p, where: vary(p, plan.grid.meets(where)), params, specs)
        y, g_params, g_x = scored(definition, plan.axes, params, x, batch, g)
        y = {k: lax.psum(a, plan.grid.tokens) if k == "loss" else a for k, a in y.items()}
        total = lambda a, where: lax.psum(a, plan.grid.spread(a.shape, where).replicas)
        return y, jax.tree.map(total, g_params, specs), g_x

    ins, outs = (specs, x_specs, batch_specs, g_specs), (y_specs, specs, x_specs)
    return jax.jit(jax.shard_map(program, mesh=plan.mesh, in_specs=ins, out_specs=outs))(params, x, batch, g)


def zigzag(cp: int) -> np.ndarray:
    """Positions in the order in which cp shards hold chunks (0, 2cp-1), (1, 2cp-2), ..."""
    chunks = np.split(np.arange(SEQ), 2 * cp)
    return np.concatenate([chunks[i] for r in range(cp) for i in (r, 2 * cp - 1 - r)])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("rich", Layout(cp=2, tp=4)),
        ("rich", Layout(dp=2, cp=4)),
        ("tied", Layout(dp=2, tp=2)),
        pytest.param("experts", Layout(dp=2, tp=4), marks=pytest.mark.slow),
        ("siglip", Layout(cp=2, tp=4)),
        ("siglip", Layout(dp=2, cp=4)),
        ("several layers", Layout(dp=2, cp=2, tp=2)),
        ("clip", Layout(dp=2, tp=2, copies=2)),
        ("audio", Layout(dp=2, cp=2, tp=2)),
        ("rich", Layout(dp=2, cp=2, tp=2, sp=True)),
        ("several layers", Layout(cp=2, tp=2, sp=True)),
        ("tied", Layout(dp=2, tp=4)),
        pytest.param("experts", Layout(dp=2, cp=2, ep=2), marks=pytest.mark.slow),
        ("experts", Layout(dp=2, tp=2, ep=4)),
        pytest.param("experts", Layout(tp=4, ep=2, sp=True), marks=pytest.mark.slow),
        pytest.param("rich", Layout(dp=2, cp=4, context="heads"), marks=pytest.mark.slow),
        pytest.param("audio", Layout(dp=2, cp=2, tp=2, context="ring"), marks=pytest.mark.slow),
        pytest.param("rich", Layout(cp=2, tp=4, context="ring"), marks=pytest.mark.slow),
        pytest.param("rich", Layout(cp=2, tp=4, context="heads"), marks=pytest.mark.slow),
        pytest.param("rich", Layout(dp=2, cp=2, tp=2, sp=True, context="ring"), marks=pytest.mark.slow),
        pytest.param("siglip", Layout(dp=2, cp=4, context="heads"), marks=pytest.mark.slow),
        pytest.param("several layers", Layout(dp=2, cp=2, tp=2, context="ring"), marks=pytest.mark.slow),
        pytest.param("audio", Layout(dp=2, cp=2, tp=2, context="heads"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_layout_changes_neither_outputs_nor_gradients(name: str, layout: Layout, x64: None) -> None:
    (definition, params, x, batch, g), expected = judged(name)
    order = zigzag(layout.cp)
    if "tokens" in batch:
        batch, g = {k: v[:, order] for k, v in batch.items()}, g | {"x": g["x"][:, order]}
    y, g_params, g_x = on_mesh(definition, layout, params, x, batch, g)
    if "tokens" in batch:
        y["x"] = y["x"][:, np.argsort(order)]
    for mine, one_device in zip((y, g_params, g_x), expected, strict=True):
        if mine:
            close(mine, one_device)


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("three", Layout(tp=2), "of tp=2 and kv_heads=3 neither divides the other; use tp of 1, 3, 6"),
        ("rich", Layout(tp=2, ep=2), "ep=2 cuts experts, and the model has none; set ep=1"),
        ("experts", Layout(dp=3, ep=3), "ep=3 does not divide experts=8; use ep of 1, 2, 4, 8"),
        ("experts", Layout(tp=3), "tp=3 does not divide heads=8"),
        ("siglip", Layout(cp=8), "cp=8 does not divide tokens=4; use cp of 1, 2, 4"),
        ("siglip", Layout(cp=4, tp=2, sp=True), "sp=True cuts tokens=4 over cp x tp = 8 devices"),
        ("clip", Layout(tp=2, sp=True), "sp=True, but the model's tokens cannot be cut over tp; set sp=False"),
        ("clip", Layout(cp=2), "cp=2, but the model's code does not handle cp .*; set cp=1"),
    ],
)
def test_a_layout_that_a_model_cannot_have_is_refused(name: str, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages("model", example(CONFIGS[name])[0], layout, jax.devices())
