"""FLOPs against what XLA counts in the models themselves, and against numbers worked out by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hetjax.core import flops, stacks
from hetjax.core.flops import Flops
from hetjax.judge.reference import apply_module
from models.contract import ModuleDef, Params
from models.cross_attention import CrossAttention
from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT

SEQ, ROWS, PICTURES = 64, 2, 2
DECODER = Decoder(vocab_size=1024, width=128, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=384, head_dim=64)
SIGLIP = ViT(
    image_size=64,
    patch_size=8,
    width=256,
    num_layers=3,
    num_heads=4,
    mlp_width=1024,
    output_width=256,
    feature_layer=-2,
)
CLIP = dataclasses.replace(SIGLIP, variant="clip", select="default", projector_width=384)
DEEP = dataclasses.replace(SIGLIP, deepstack=(1, -1))


def parameters(definition: ModuleDef) -> Params:
    """Abstract parameters of a whole module."""
    key = jax.random.key(0)
    keys = jax.random.split(key, definition.num_layers)
    layers = jax.eval_shape(lambda: stacks.init(definition.layers, keys))
    first, last = (jax.eval_shape(part.init, key) for part in (definition.first, definition.last))
    return {"first": first, "layers": layers, "last": last}


def count(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs that XLA finds in a function, before it optimises anything."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def decoder_sum(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    y = apply_module(DECODER.module(jnp.float32), params, {}, batch)
    return (y["x"] @ y["head"]).sum()


def abstract_tokens() -> dict[str, jax.ShapeDtypeStruct]:
    names = ("tokens", "positions", "segment_ids", "targets")
    return {name: jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32) for name in names}


def test_a_decoders_forward_is_what_xla_counts() -> None:
    counted = count(decoder_sum, parameters(DECODER.module(jnp.float32)), abstract_tokens())
    assert counted == pytest.approx(flops.decoder_forward(DECODER, SEQ).total_non_causal * ROWS * SEQ, rel=0.03)


def test_a_decoder_that_attends_to_pictures_is_what_xla_counts() -> None:
    config = dataclasses.replace(DECODER, num_layers=3, cross_attention=CrossAttention((1,)))
    definition, rows = config.module(jnp.float32, encoders=("vision",)), 48
    batch = {name: jax.ShapeDtypeStruct((1, SEQ), jnp.int32) for name in (*abstract_tokens(), "vision.index")}
    vision = jax.ShapeDtypeStruct((PICTURES, rows, config.width), jnp.float32)

    def run(params: Params, vision: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        y = apply_module(definition, params, {"vision": vision}, batch)
        return y["x"] @ y["head"]

    counted = count(run, parameters(definition), vision, batch)
    parts = flops.forward(config, rows=1, seq_len=SEQ, items=0, attended=PICTURES * rows)
    assert parts is not None
    assert counted == pytest.approx(flops.total(parts).total_non_causal, rel=0.03)


def test_training_a_decoder_is_three_forwards() -> None:
    counted = count(jax.value_and_grad(decoder_sum), parameters(DECODER.module(jnp.float32)), abstract_tokens())
    expected = flops.training(flops.decoder_forward(DECODER, SEQ)).total_non_causal * ROWS * SEQ
    assert counted == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("config", [SIGLIP, CLIP, DEEP], ids=["siglip", "clip", "deepstack"])
def test_a_vits_forward_is_what_xla_counts(config: ViT) -> None:
    definition = config.module(jnp.float32)
    pixels = jax.ShapeDtypeStruct((PICTURES, config.image_size, config.image_size, 3), jnp.float32)
    run = lambda params, pixels: apply_module(definition, params, {}, {"vision.pixels": pixels})
    counted = count(run, parameters(definition), pixels)
    assert counted == pytest.approx(flops.vit_forward(config).total * PICTURES, rel=0.03)


def test_a_frozen_decoder_still_passes_gradients_back() -> None:
    """Per parameter and token 4 FLOPs instead of 6; attention has no parameters to spare."""
    definition = DECODER.module(jnp.float32)
    params = parameters(definition)
    x = jax.ShapeDtypeStruct((ROWS, SEQ, DECODER.width), jnp.float32)

    def tail(x: jax.Array, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """The decoder behind its embedding, so that the gradient is that of an encoder's rows."""
        whole = dataclasses.replace(definition, first=dataclasses.replace(definition.first, apply=lambda *_: {"x": x}))
        y = apply_module(whole, params, {}, batch)
        return (y["x"] @ y["head"]).sum()

    counted = count(jax.value_and_grad(tail), x, params, abstract_tokens())
    expected = flops.training(flops.decoder_forward(DECODER, SEQ), trainable=False).total_non_causal * ROWS * SEQ
    assert counted == pytest.approx(expected, rel=0.03)


def test_llama_3_8b_by_hand() -> None:
    config = Decoder(
        vocab_size=128256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=14336
    )
    got = flops.training(flops.decoder_forward(config, 8192))
    assert got.matmul == 6 * 7_504_658_432  # 8,030,261,248 parameters less the embedding and the norms
    assert got.attention == 3 * 4 * 8192 * 4096 * 32
    assert got.causal_attention == got.attention / 2
    assert got.total == got.matmul + got.attention / 2 and got.total_non_causal == got.matmul + got.attention


def test_mixtral_8x7b_by_hand() -> None:
    config = Decoder(
        vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_width=14336,
        experts=Experts(8, 2, 14336),
    )  # fmt: skip
    active = 12_879_925_248  # parameters that a token meets; published as 12.9 billion
    assert flops.decoder_forward(config, 4096).matmul == 2 * (active - 32000 * 4096 - 65 * 4096)  # embedding, norms
    sparse = dataclasses.replace(config, experts=Experts(8, 2, 1024, dense_layers=(0, 1)))
    less = 30 * 2 * 2 * 3 * 4096 * (14336 - 1024) + 2 * 2 * (4096 * 8 + 3 * 4096 * 14336)
    assert flops.decoder_forward(config, 4096).matmul - flops.decoder_forward(sparse, 4096).matmul == less


def test_clip_large_336_by_hand() -> None:
    config = ViT(
        image_size=336, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, output_width=4096,
        variant="clip", feature_layer=-2, select="default",
    )  # fmt: skip
    got = flops.vit_forward(config)
    towers = 23 * 577 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert got.matmul == 2 * (576 * 588 * 1024 + towers + 576 * (1024 * 4096 + 4096 * 4096))
    assert got.attention == got.causal_attention == 23 * 4 * 577**2 * 1024


def test_a_sliding_window_counts_the_keys_that_a_query_sees() -> None:
    seq_len, window = 1000, 100
    seen = sum(min(query + 1, window) for query in range(seq_len)) / seq_len
    got = flops.decoder_forward(dataclasses.replace(DECODER, sliding_window=window), seq_len)
    full = flops.decoder_forward(DECODER, seq_len)
    assert got.attention == full.attention / 10 and got.matmul == full.matmul
    assert got.causal_attention == pytest.approx(full.attention * seen / seq_len, rel=0.01)
    assert flops.decoder_forward(dataclasses.replace(DECODER, sliding_window=2000), seq_len) == full


def test_a_module_without_a_backward_costs_its_forward() -> None:
    forward = flops.vit_forward(CLIP)
    assert flops.training(forward, trainable=False, backward=False) == forward


def test_a_projector_that_trains_alone_asks_no_backward_of_its_tower() -> None:
    parts = flops.vit_parts(CLIP)
    tower, projector = parts["first"] + parts["layers"], parts["last"]
    got = flops.module_training(parts, trainable={"last"}, upstream=False)
    assert got == tower + projector * 3
    frozen = flops.module_training(parts, trainable=set(), upstream=True)
    assert frozen == flops.training(tower + projector, trainable=False)


def test_flops_of_modules_add_up() -> None:
    assert Flops(1, 2, 3) * 2 + Flops(10, 20, 30) == Flops(12, 24, 36)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peak_of_known_devices(kind: str, tera: float) -> None:
    assert flops.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA A10", "NVIDIA GeForce RTX 4090", "TPU7x", "TPU v55", ""])
def test_no_peak_is_made_up_for_an_unknown_device(kind: str) -> None:
    assert flops.peak_flops(kind) is None
