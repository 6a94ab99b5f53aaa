"""The models on one device: equal to plain NumPy, and true to what packing, causality and precision demand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from flax import nnx

from hetjax.core import stacks
from models.attention import RopeScaling, attend
from models.axes import ONE_DEVICE
from models.contract import ModuleDef
from models.decoder import Decoder
from models.layers import exact_gelu
from models.moe import Experts, Mixture, route
from models.sight import Sight
from models.vit import ViT
from models.whisper import Whisper

Tree = Any
DECODER = Decoder(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
VIT = ViT(
    image_size=8, patch_size=4, width=16, num_layers=2, num_heads=4, mlp_width=24, output_width=12, projector_width=20
)
WHISPER = Whisper(num_mels=5, width=16, num_layers=2, num_heads=4, mlp_width=24, output_width=12, num_positions=12)
LLAMA3 = RopeScaling("llama3", 8.0, original_length=128)  # head_dim 8: keeps one frequency, blends one, divides two
RICH = dataclasses.replace(DECODER, qk_norm=True, attention_bias=True, rope_scaling=LLAMA3, sliding_window=5)
SEQ = 16
BIAS_AND_GATE = dict(selection_bias=True, shared_width=6, shared_gate=True)


def init(definition: ModuleDef) -> Tree:
    """The module's own initial values."""
    keys = jax.random.split(jax.random.key(3), definition.num_layers)
    layers = stacks.init(definition.layers, keys)
    first, last = definition.first.init(jax.random.key(1)), definition.last.init(jax.random.key(2))
    return {"first": first, "layers": layers, "last": last}


def random_params(definition: ModuleDef, seed: int = 0, dtype: Any = np.float64) -> Tree:
    """Parameters of which none is zero or one, as biases and norms are at first."""
    rng = np.random.default_rng(seed)
    centre = lambda path: float("norm" in jax.tree_util.keystr(path) and "bias" not in jax.tree_util.keystr(path))
    draw = lambda path, a: (centre(path) + 0.3 * rng.normal(size=a.shape)).astype(dtype)
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init(definition)))


def run(definition: ModuleDef, params: Tree, x: Tree, batch: Tree, axes: Any = ONE_DEVICE) -> Tree:
    """The module's output, its layers scanned as the trainer does."""
    carry = definition.first.apply(params["first"], x, batch, axes)
    seen, stacked = definition.prepare(batch, axes), jax.tree.map(jnp.asarray, params["layers"])
    for run in stacks.runs(definition.layers):
        rows = [stacks.rows(stacked, definition.layers, run, place) for place in range(len(run.period))]

        def body(carry: Tree, i: jax.Array, run: stacks.Run = run, rows: list = rows) -> tuple[Tree, None]:
            for place, part in enumerate(run.period):
                carry = part.apply(stacks.take(stacked, rows[place], i), carry, seen, axes)
            return carry, None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(run.times, dtype=jnp.int32))
    return definition.last.apply(params["last"], carry, batch, axes)


@functools.cache
def compiled(
    config: Decoder | ViT | Whisper, dtype: Any = jnp.float64, encoders: tuple[str, ...] = ()
) -> Callable[..., Tree]:
    """`run` of `config`, with what it needs but parameters and data."""
    definition = config.module(dtype, encoders=encoders) if isinstance(config, Decoder) else config.module(dtype)
    return jax.jit(functools.partial(run, definition))


def rows_of(*documents: list[np.ndarray]) -> Tree:
    """A batch whose rows pack these documents (token arrays) and end in padding."""
    names = ("tokens", "positions", "segment_ids")
    batch = {n: np.zeros((len(documents), SEQ), np.int32) for n in names}
    for row, packed in enumerate(documents):
        at = 0
        for i, tokens in enumerate(packed):
            place = (row, slice(at, at + len(tokens)))
            batch["tokens"][place], batch["positions"][place] = tokens, np.arange(len(tokens))
            batch["segment_ids"][place] = i + 1
            at += len(tokens)
    return batch


def documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, DECODER.vocab_size, n) for n in lengths]


def close(a: Tree, b: Tree) -> None:
    """Every array of `a` is within 1e-12 of that of `b`, relative to its largest element.

    Where that is 0 but for rounding (a key's bias moves no softmax), relative to a hundredth of the tree's largest.
    """
    top = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    scale = lambda leaf: max(float(np.abs(leaf).max()), 1e-2 * top)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale(b)), a, b)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4, "head_dim": 6, "rope_theta": 500.0, "norm_eps": 1e-2},
        {"num_kv_heads": 1, "qk_norm": True},
        {"attention_bias": True},
        {"sliding_window": 3},
        {"rope_scaling": LLAMA3, "head_dim": 8},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"experts": Experts(5, 2, 12)},
        {"experts": Experts(6, 3, 10, renormalise=False, dense_layers=(1, 2)), "num_layers": 4},
        {"experts": Experts(6, 2, 10, scores="sigmoid", selection_bias=True, scale=2.5, shared_width=6)},
        {"experts": Experts(8, 3, 10, renormalise=False, scores="sigmoid", groups=4, chosen_groups=2, **BIAS_AND_GATE)},
    ],
    ids=str,
)
def test_a_decoder_equals_plain_numpy(changes: dict, x64: None) -> None:
    config = dataclasses.replace(DECODER, **{"head_dim": None} | changes)
    params = random_params(config.module(jnp.float64))
    (tokens,) = documents(SEQ)
    got = compiled(config)(params, {}, rows_of([tokens]))
    close(got["x"][0], plain.decoder_row(config, params, params["first"]["embed"][tokens]))
    close(got["head"], params["last"]["head"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature_layer": -2, "projector_width": None},
        {"variant": "clip"},
        {"variant": "clip", "select": "default", "feature_layer": -2},
        {"select": "default", "feature_layer": [-1, 0, 1, 1], "projector_bias": False},
        {"variant": "clip", "feature_layer": 0, "image_size": 11},  # three pixels fill no patch
    ],
    ids=str,
)
def test_a_vit_equals_plain_numpy(changes: dict, x64: None) -> None:
    config = dataclasses.replace(VIT, **changes)
    definition = config.module(jnp.float64)
    params = random_params(definition)
    pixels = np.random.default_rng(1).normal(size=(2, *[config.image_size] * 2, 3)).astype(np.float32)
    got = compiled(config)(params, {}, {"vision.pixels": pixels})["x"]
    assert got.shape == (2, definition.rows, definition.width)
    close(got, np.stack([plain.vit_picture(config, params, p) for p in pixels.astype(np.float64)]))


@pytest.mark.parametrize(
    "changes", [{}, {"variant": "qwen2_audio"}, {"variant": "qwen2_audio", "projector": "mlp"}], ids=str
)
def test_an_audio_encoder_equals_plain_numpy(changes: dict, x64: None) -> None:
    config = dataclasses.replace(WHISPER, **changes)
    definition = config.module(jnp.float64)
    params = random_params(definition)
    mel = np.random.default_rng(1).normal(size=(6, 24, 5)).astype(np.float32)
    frames = np.array([24, 23, 22, 21, 4, 3], np.int32)
    got = compiled(config)(params, {}, {"audio.mel": mel, "audio.frames": frames})["x"]
    assert got.shape == (6, definition.rows, definition.width)
    for y, clip, n in zip(got, mel.astype(np.float64), frames, strict=True):
        close(y[: config.rows_of(int(n))], plain.whisper_clip(config, params, clip, int(n)))
    assert [config.rows_of(int(n)) for n in frames] == ([12] * 6 if config.variant == "whisper" else [6, 6, 5, 5, 1, 1])


def test_a_shorter_context_gives_a_clip_the_same_rows(x64: None) -> None:
    long = dataclasses.replace(WHISPER, variant="qwen2_audio")
    short = dataclasses.replace(long, max_frames=16)
    params = random_params(long.module(jnp.float64))
    mel = np.random.default_rng(1).normal(size=(4, 24, 5)).astype(np.float32)
    frames = np.array([16, 15, 14, 3], np.int32)
    wanted = compiled(long)(params, {}, {"audio.mel": mel, "audio.frames": frames})["x"]
    got = compiled(short)(params, {}, {"audio.mel": mel[:, : short.frames], "audio.frames": frames})["x"]
    assert (short.frames, got.shape[1]) == (17, 4), "the last window looks into the frame behind the context"
    for i, n in enumerate(frames):
        rows = short.rows_of(int(n))
        close(got[i, :rows], wanted[i, :rows])


def test_experts_have_the_gradients_of_all_experts_weighted_by_one_hot_choices(x64: None) -> None:
    """Also where an expert gets no token, and where all go to one."""
    config = Experts(5, 2, 12)
    layer = dataclasses.replace(DECODER, experts=config).module(jnp.float64).layers[0]
    w = random_params(dataclasses.replace(DECODER, experts=config).module(jnp.float64))["layers"]["moe"]
    w = {name: jnp.asarray(a[0]) for name, a in w.items()}
    w["router"] = w["router"].at[:, 3].set(-10.0).at[:, 1].set(10.0)
    assert layer.logical["moe"]["gate"] == ("experts", None, "expert_mlp")
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16))))
    block = nnx.split(nnx.eval_shape(lambda: Mixture(config, 16, rngs=nnx.Rngs(0))))[0]

    def mine(x: jax.Array, w: Tree) -> jax.Array:
        return nnx.merge(block, nnx.State({k: nnx.Param(v) for k, v in w.items()}))(x, jnp.ones((1, 16)), ONE_DEVICE)[0]

    def dense(x: jax.Array, w: Tree) -> jax.Array:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ w["router"]), config.per_token)
        weights = (jax.nn.one_hot(chosen, config.count) * (weights / weights.sum(-1, keepdims=True))[..., None]).sum(-2)
        hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, w["gate"])) * jnp.einsum("bsd,edf->bsef", x, w["up"])
        return jnp.einsum("bsef,efd,bse->bsd", hidden, w["down"], weights)

    chosen = route(x.reshape(-1, 16), w["router"], None, config).chosen
    assert (chosen == 1).any(1).all() and not (chosen == 3).any()
    (y, pull), (expected, pull_expected) = (jax.vjp(f, x, w) for f in (mine, dense))
    close(y, expected)
    close(pull(jnp.cos(y)), pull_expected(jnp.cos(y)))


def test_a_tied_head_is_the_embedding(x64: None) -> None:
    config = dataclasses.replace(DECODER, tied=True)
    definition = config.module(jnp.float64)
    params = random_params(definition)
    assert definition.tied == {"head": "embed"}
    assert definition.last.logical["head"] == definition.first.logical["embed"]
    tied = params | {"last": params["last"] | {"head": params["first"]["embed"]}}
    np.testing.assert_array_equal(compiled(config)(tied, {}, rows_of(documents(4)))["head"], params["first"]["embed"].T)


def test_rows_of_encoders_replace_embeddings_and_get_their_gradients(x64: None) -> None:
    encoders = ("vision", "audio")
    definition = DECODER.module(jnp.float64, encoders=encoders)
    params, rng = random_params(definition), np.random.default_rng(2)
    rows = {"vision": rng.normal(size=(3, 2, 16)), "audio": rng.normal(size=(1, 3, 16))}
    (tokens,) = documents(SEQ)
    index = {f"{e}.index": np.full((1, SEQ), -1, np.int32) for e in encoders}
    index["vision.index"][0, 3:7] = [4, 5, 0, 1]  # item 2, then item 0; item 1 is unused
    index["audio.index"][0, 9:12] = [0, 1, 2]
    embedded = params["first"]["embed"][tokens]
    embedded[3:7], embedded[9:12] = rows["vision"][[2, 0]].reshape(4, 16), rows["audio"][0]
    tokens = np.where((index["vision.index"][0] >= 0) | (index["audio.index"][0] >= 0), 10**6, tokens)
    batch = rows_of([tokens]) | index
    close(
        compiled(DECODER, encoders=encoders)(params, rows, batch)["x"][0], plain.decoder_row(DECODER, params, embedded)
    )
    on_device = jax.tree.map(jnp.asarray, params)
    grads = jax.jit(jax.grad(lambda rows: jnp.square(run(definition, on_device, rows, batch)["x"][:, :, :7]).sum()))(
        rows
    )
    assert (np.abs(grads["vision"][np.array([0, 2])]).max(-1) > 0).all() and (np.abs(grads["audio"]).max(-1) > 0).all()
    np.testing.assert_array_equal(grads["vision"][1], 0)


@pytest.mark.parametrize("index", [6, 10**6])
def test_a_row_that_is_not_there_is_nan(index: int, x64: None) -> None:
    params = random_params(DECODER.module(jnp.float64))
    batch = rows_of(documents(4)) | {"vision.index": np.full((1, SEQ), -1, np.int32)}
    batch["vision.index"][0, 1] = index
    x = compiled(DECODER, encoders=("vision",))(params, {"vision": np.ones((3, 2, 16))}, batch)["x"][0]
    assert np.isnan(x[1]).all()


# -- packing, causality, padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DECODER, RICH], ids=["plain", "rich"])
def test_a_packed_row_equals_separate_rows(config: Decoder, x64: None) -> None:
    params = random_params(config.module(jnp.float64))
    a, b, c = documents(6, 3, 5)
    x = compiled(config)(params, {}, rows_of([a, b, c], [a], [b], [c]))["x"]
    close(x[0, :6], x[1, :6])
    close(x[0, 6:9], x[2, :3])
    close(x[0, 9:14], x[3, :5])
    assert np.abs(x[0, 6:9] - x[1, :3]).max() > 0.1


def test_a_token_changes_nothing_before_it_and_everything_after(x64: None) -> None:
    params = random_params(DECODER.module(jnp.float64))
    (a,) = documents(SEQ)
    b = np.where(np.arange(SEQ) == 6, (a + 1) % DECODER.vocab_size, a)
    x = compiled(DECODER)(params, {}, rows_of([a], [b]))["x"]
    np.testing.assert_array_equal(x[0, :6], x[1, :6])
    assert (np.abs(x[0, 6:] - x[1, 6:]).max(-1) > 1e-6).all()


def test_a_window_ends_what_a_token_reaches(x64: None) -> None:
    config = dataclasses.replace(DECODER, sliding_window=3)  # two layers: each reaches two tokens on
    params = random_params(config.module(jnp.float64))
    (a,) = documents(SEQ)
    b = np.where(np.arange(SEQ) == 6, (a + 1) % DECODER.vocab_size, a)
    x = compiled(config)(params, {}, rows_of([a], [b]))["x"]
    changed = np.abs(x[0] - x[1]).max(-1)
    assert (changed[6:11] > 1e-6).all() and (changed[11:] == 0).all()


def test_padding_sees_nothing_and_yields_zero(x64: None) -> None:
    segments, positions = np.array([[1, 1, 0, 0]]), np.array([[0, 1, 0, 1]])
    sight = Sight(positions, segments, positions, segments)
    np.testing.assert_array_equal(sight.mask()[0], np.tril([[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 4)))
    y, pull = jax.vjp(lambda x: attend(x, x, x, sight), x)
    assert (y[0, 2:] == 0).all() and (pull(jnp.ones_like(y))[0][0, 2:] == 0).all()
    assert np.isfinite(y).all() and np.isfinite(pull(y)[0]).all()


def test_padding_is_finite_and_nobody_looks_at_it(x64: None) -> None:
    definition = RICH.module(jnp.float64)
    params = random_params(definition)
    batch = rows_of(documents(5), [])  # the second row is padding alone
    other = batch | {"tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], 7)}
    x, y = (compiled(RICH)(params, {}, b)["x"] for b in (batch, other))
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x[0, :5], y[0, :5])
    grads = jax.jit(jax.grad(lambda p: run(definition, p, {}, batch)["x"].sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [RICH, dataclasses.replace(RICH, tied=True), VIT, dataclasses.replace(VIT, variant="clip")]
)
def test_every_parameter_is_float32_and_its_dims_are_named(config: Decoder | ViT) -> None:
    definition = config.module(jnp.bfloat16)
    for part in (definition.first, *definition.layers, definition.last):
        shapes = jax.eval_shape(part.init, jax.random.key(0))
        named = jax.tree.map(lambda a, dims: a.dtype == jnp.float32 and len(dims) == a.ndim, shapes, part.logical)
        assert all(jax.tree.leaves(named))


def test_initial_values_depend_on_the_key_alone() -> None:
    layer = DECODER.module(jnp.float32).layers[0]
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(layer.init))(keys)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, jax.tree.map(lambda a: a[1], stacked), layer.init(keys[1]))
    assert not np.array_equal(stacked["mlp"]["up"][0], stacked["mlp"]["up"][1])
    assert not np.array_equal(stacked["mlp"]["up"], stacked["mlp"]["gate"])
    assert abs(np.std(stacked["mlp"]["down"]) - DECODER.mlp_width**-0.5) < 0.02


def test_the_exact_gelu_and_its_derivative_are_those_of_jax() -> None:
    x = jnp.linspace(-6, 6, 201)
    theirs = functools.partial(jax.nn.gelu, approximate=False)
    for ours, reference in ((exact_gelu, theirs), (jax.vmap(jax.grad(exact_gelu)), jax.vmap(jax.grad(theirs)))):
        np.testing.assert_allclose(ours(x), reference(x), rtol=1e-5, atol=1e-6)
