"""Attention equals its definition, in blocks and as a whole, in values and gradients; in blocks its memory grows with
the sequence."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_loss import full
from test_models import DECODER, random_params, run

from hetjax.data import DataConfig
from hetjax.run import experiment
from models import attention
from models.attention import attend, whole
from models.axes import Axes, Axis
from models.blockwise import blockwise
from models.decoder import Decoder
from models.sight import Sight, everywhere

Arrays = tuple[jax.Array, ...]


def arrays(rng: np.random.Generator, s: int, keys: int, *, b: int = 2, h: int = 4, kv: int = 2, d: int = 6) -> Arrays:
    """Queries, keys, values and a cotangent of the output."""
    return tuple(rng.normal(size=(b, n, heads, d)) for n, heads in ((s, h), (keys, kv), (keys, kv), (s, h)))


def packed(rng: np.random.Generator, b: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [b, s] of rows that pack up to four documents and end in padding."""
    positions, segments = np.zeros((2, b, s), np.int32)
    for row in range(b):
        cuts = np.unique([0, *rng.integers(0, s + 1, 4)])
        for i, (start, end) in enumerate(itertools.pairwise(cuts)):
            positions[row, start:end], segments[row, start:end] = np.arange(end - start), i + 1
    return positions, segments


def zigzag(s: int, cp: int) -> np.ndarray:
    """Tokens in the order in which cp shards hold chunks (0, 2cp-1), (1, 2cp-2), ..."""
    chunks = np.array_split(np.arange(s), 2 * cp)
    return np.concatenate([chunks[i] for r in range(cp) for i in (r, 2 * cp - 1 - r)])


def outputs(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Arrays:
    """The output, and the gradients of queries, keys and values."""
    y, pull = jax.vjp(function, q, k, v)
    return y, *pull(g)


def close(mine: Arrays, expected: Arrays, tolerance: float = 1e-12) -> None:
    for a, b in zip(mine, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-3))


@pytest.mark.parametrize("seed", range(12))
def test_blocks_have_the_values_and_gradients_of_the_whole(seed: int, x64: None) -> None:
    rng = np.random.default_rng(seed)
    kv = int(rng.choice([1, 2, 4]))
    s, block, cp = int(rng.integers(5, 40)), int(rng.integers(2, 12)), int(rng.choice([1, 2, 4]))
    q, k, v, g = arrays(rng, s, s, h=4, kv=kv, d=int(rng.choice([3, 8])))
    positions, segments = (a[:, zigzag(s, cp)] for a in packed(rng, 2, s))
    mine = np.sort(rng.choice(s, int(rng.integers(1, s + 1)), replace=False))  # the queries of one shard
    sight = Sight(
        positions[:, mine],
        segments[:, mine],
        positions,
        segments,
        causal=bool(rng.random() < 0.8),
        window=None if rng.random() < 0.5 else int(rng.integers(1, 9)),
    )
    given = q[:, mine], k, v, g[:, mine]
    forms = (lambda *x: blockwise(*x, sight, block=block)), (lambda *x: whole(*x, sight))
    found, expected = (jax.jit(functools.partial(outputs, f))(*given) for f in forms)
    close(found, expected)
    empty = ~sight.mask().any(-1)
    assert (np.asarray(found[0])[empty] == 0).all() and (np.asarray(found[1])[empty] == 0).all()


def defined(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight | None) -> jax.Array:
    """Attention by its definition, for autodiff."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    mask = True if sight is None else sight.mask()[:, None]
    weights = jnp.where(mask, jnp.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1), v)


@pytest.mark.parametrize("rule", [False, True])
def test_the_whole_has_the_values_and_gradients_of_the_definition(rule: bool, x64: None) -> None:
    rng = np.random.default_rng(1)
    given = arrays(rng, 11, 11, kv=2)
    places = packed(rng, 2, 11)
    sight = Sight(*places, *places, window=4) if rule else None
    close(*(jax.jit(functools.partial(outputs, lambda *x, f=f: f(*x, sight)))(*given) for f in (whole, defined)))


def test_blocks_without_a_rule_are_attention_of_all_on_all(x64: None) -> None:
    q, k, v, g = arrays(np.random.default_rng(0), 13, 22)
    mine = outputs(lambda *x: blockwise(*x, everywhere(q, k), block=5), q, k, v, g)
    close(mine, outputs(whole, q, k, v, g))


def test_blocks_that_are_skipped_hold_nothing_that_is_seen() -> None:
    rng = np.random.default_rng(0)
    skipped = 0
    for _ in range(100):
        (q, q_segments), (k, k_segments) = packed(rng, 1, 40), packed(rng, 1, 40)
        a, b = slice(*np.sort(rng.choice(41, 2, replace=False))), slice(*np.sort(rng.choice(41, 2, replace=False)))
        causal, window = bool(rng.random() < 0.7), None if rng.random() < 0.5 else int(rng.integers(1, 9))
        sight = Sight(q[:, a], q_segments[:, a], k[:, b], k_segments[:, b], causal=causal, window=window)
        may = bool(sight.overlaps())
        skipped += not may
        assert may or not sight.mask().any()
    assert skipped > 20


def test_in_bfloat16_blocks_are_as_close_to_the_truth_as_the_whole() -> None:
    rng = np.random.default_rng(0)
    given = [jnp.asarray(a, jnp.float32) for a in arrays(rng, 64, 64, d=8)]
    positions, segments = packed(rng, 2, 64)
    sight = Sight(positions, segments, positions, segments)
    forms = (lambda *x: blockwise(*x, sight, block=16)), (lambda *x: whole(*x, sight))
    in_blocks, at_once = (jax.jit(functools.partial(outputs, f)) for f in forms)
    truth = at_once(*given)
    narrow = [a.astype(jnp.bfloat16) for a in given]
    size = lambda a: float(jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum()))
    errors = [
        [size(a.astype(jnp.float32) - t) / size(t) for a, t in zip(f(*narrow), truth, strict=True)]
        for f in (in_blocks, at_once)
    ]
    assert all(mine < 1.5 * theirs + 1e-3 for mine, theirs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("form", [whole, functools.partial(blockwise, block=5)])
def test_on_a_mesh_gradients_are_those_of_one_device(form: Any, remat: bool, x64: None) -> None:
    """Rows over dp, tokens over cp in zig-zag, heads over tp; keys and values are gathered over cp."""
    s = 24
    rng = np.random.default_rng(0)
    q, k, v, g = arrays(rng, s, s, h=8, kv=2)
    positions, segments = packed(rng, 2, s)
    expected = outputs(lambda *x: whole(*x, Sight(positions, segments, positions, segments)), q, k, v, g)
    mesh = jax.make_mesh((2, 2, 2), ("dp", "cp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    cp = Axis(("cp",), 2)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> Arrays:
        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys = [cp.gather(a, 1) for a in (k, v, *places)]
            return form(q, keys[0], keys[1], Sight(*places, *keys[2:]))

        return outputs(jax.checkpoint(function) if remat else function, q, k, v, g)

    heads, tokens = P("dp", "cp", "tp"), P("dp", "cp")
    on_mesh = jax.shard_map(program, mesh=mesh, in_specs=(heads,) * 4 + (tokens,) * 2, out_specs=(heads,) * 4)
    order = zigzag(s, 2)
    found = jax.jit(on_mesh)(*(a[:, order] for a in (q, k, v, g, positions, segments)))
    close(tuple(a[:, np.argsort(order)] for a in found), expected)


def test_keys_shared_by_devices_get_the_sum_of_their_gradients(x64: None) -> None:
    """One key-value head for all of tp, which does not vary over it, as under copies."""
    q, k, v, g = arrays(np.random.default_rng(0), 12, 12, h=4, kv=1)
    expected = outputs(whole, q, k, v, g)
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, shared = P(None, None, "tp"), P()
    function = lambda q, k, v: blockwise(q, k, v, everywhere(q, k), block=5)
    program = jax.shard_map(
        functools.partial(outputs, function),
        mesh=mesh,
        in_specs=(heads, shared, shared, heads),
        out_specs=(heads, heads, shared, shared),
    )
    close(jax.jit(program)(q, k, v, g), expected)


@pytest.mark.parametrize("remat", [False, True])
def test_memory_grows_with_the_sequence_and_not_with_its_square(remat: bool) -> None:
    """As a stage uses it: in a scan over layers, which would hoist what depends on the rule alone."""

    def workspace(s: int) -> int:
        def program(x: jax.Array, places: jax.Array) -> jax.Array:
            layer = lambda x: attend(x, x, x, Sight(*[places] * 4))
            layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
            y, pull = jax.vjp(lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0], x)
            return pull(y)[0]

        x, places = jax.ShapeDtypeStruct((1, s, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, s), jnp.int32)
        return jax.jit(program).lower(x, places).compile().memory_analysis().temp_size_in_bytes

    a, b, c = (workspace(s) for s in (1024, 2048, 4096))
    assert c - b < 2.2 * (b - a) and c < 4096 * 4096  # less than the masks alone


# -- the pick ----------------------------------------------------------------------------------------------------------


def test_long_sequences_go_in_blocks_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in which some is hidden, where blocks are skipped, from half the length on."""
    lengths: list[int] = []
    monkeypatch.setattr(attention, "blockwise", lambda q, k, v, sight, block: lengths.append(q.shape[1]) or q)
    for s, ruled in ((255, True), (256, True), (511, False), (512, False)):
        x, places = jax.ShapeDtypeStruct((1, s, 1, 8), jnp.float32), jnp.ones((1, s), jnp.int32)
        jax.eval_shape(lambda x, sight: attend(x, x, x, sight), x, Sight(*[places] * 4) if ruled else None)
    one, keys = jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    jax.eval_shape(attend, one, keys, keys)
    assert lengths == [256, 512]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """jax's plain attention in place of cuDNN, which needs a GPU; what it was asked for."""
    asked: list[dict[str, Any]] = []
    plain = jax.nn.dot_product_attention

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        asked.append(options)
        return plain(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return asked


@pytest.mark.parametrize(
    ("packed", "cp", "context", "dtype", "refused", "served"),
    [
        (False, 1, "gather", jnp.bfloat16, None, "cuDNN"),
        (True, 1, "gather", jnp.bfloat16, None, "fused"),
        (False, 2, "gather", jnp.bfloat16, None, "fused"),
        (False, 2, "heads", jnp.bfloat16, None, "cuDNN"),
        (True, 2, "heads", jnp.bfloat16, None, "fused"),
        (True, 2, "ring", jnp.bfloat16, "none serves context='ring'", None),
        (True, 1, "gather", jnp.bfloat16, "not here", None),
        (False, 1, "gather", jnp.float32, "not float32", None),
    ],
)
def test_on_a_gpu_cudnn_serves_rows_of_one_document_and_a_fused_kernel_the_others(
    packed: bool,
    cp: int,
    context: str,
    dtype: Any,
    refused: str | None,
    served: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(attention, "program_device", lambda: device)
    monkeypatch.setattr(attention, "refusal", lambda q, k, kind: refused if kind == device.device_kind else "")
    given, said = [], []
    monkeypatch.setattr(
        attention,
        "fused",
        lambda q, k, v, sight: given.append((sight.zigzag, sight.window, sight.ranges.end.shape)) or q,
    )
    monkeypatch.setattr(attention, "say", lambda what, reason: said.append(reason))
    asked = stand_in(monkeypatch)
    config = Decoder(vocab_size=8, width=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=8, sliding_window=5)
    definition = config.module(dtype, packed=packed)
    layer = definition.layers[0]
    mesh = jax.sharding.AbstractMesh((cp,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    axes = Axes(cp=Axis(("cp",), cp), context=context)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    carry = {"x": jax.ShapeDtypeStruct((2, 8, 32), dtype)}
    run = jax.shard_map(
        lambda w, x, batch: layer.apply(w, x, definition.prepare(batch, axes), axes),
        mesh=mesh, in_specs=(P(), P(None, "cp"), P(None, "cp")), out_specs=P(None, "cp"),
    )  # fmt: skip
    params = jax.eval_shape(layer.init, jax.random.key(0))
    jax.eval_shape(run, params, carry, {"positions": tokens, "segment_ids": tokens})
    assert asked == ([dict(is_causal=True, local_window_size=(4, 0))] if served == "cuDNN" else [])
    seen = (1, 5, (2, 8)) if context == "heads" else (cp, 5, (2, 8 // cp))  # whole rows, in order
    assert given == ([seen] if served == "fused" else []) and said == ([refused] if refused else [])


@pytest.mark.parametrize(
    ("train", "held_out", "packed"), [(False, None, False), (True, None, True), (False, True, True)]
)
def test_the_decoder_is_told_whether_any_of_a_runs_data_are_packed(
    train: bool, held_out: bool | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    module = Decoder.module

    def recorded(self: Decoder, dtype: Any, **options: Any) -> Any:
        told.append(options["packed"])
        return module(self, dtype, **options)

    monkeypatch.setattr(Decoder, "module", recorded)
    data = [None if pack is None else DataConfig("a.json", 8, 1, pack=pack) for pack in (train, held_out)]
    experiment.build_graph(experiment.Experiment(experiment.LanguageModel(DECODER), data[0], held_out=data[1]))
    assert told == [packed]


@pytest.mark.parametrize("window", [None, 3])
def test_a_kernel_that_knows_no_segments_trains_unpacked_rows_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch, x64: None
) -> None:
    """Rows of one document and padding, one of padding alone: the loss and every gradient, to rounding."""
    config = Decoder(
        vocab_size=16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, sliding_window=window
    )
    s = 12
    rng = np.random.default_rng(0)
    place, lengths = np.arange(s), np.array([[s], [7], [1], [0]])
    batch = {
        "tokens": rng.integers(0, 16, (4, s)) * (place < lengths),
        "positions": place * (place < lengths),
        "segment_ids": (place < lengths).astype(np.int32),
        "targets": rng.integers(0, 16, (4, s)),
        "weights": (place < lengths - 1).astype(np.float32),
    }

    def outcome(packed: bool) -> Any:
        definition = config.module(jnp.float64, packed=packed)
        params = random_params(definition)

        def total(params: Any) -> jax.Array:
            y = run(definition, params, {}, batch)
            return full(y["x"], y["head"], batch["targets"], batch["weights"])

        return jax.jit(jax.value_and_grad(total))(params)

    expected = outcome(packed=True)
    monkeypatch.setattr(attention, "_cudnn_serves", lambda q, sight: sight.ordered)
    asked = stand_in(monkeypatch)
    found = outcome(packed=False)
    assert len(asked) > 0
    close(tuple(jax.tree.leaves(found)), tuple(jax.tree.leaves(expected)), 1e-5)  # jax's softmax is float32
