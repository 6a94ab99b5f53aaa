"""Attention in blocks equals attention as a whole, in values and gradients, and its memory grows with the sequence."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models.attention import attend, whole
from models.axes import Axis
from models.blockwise import blockwise
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
def test_on_a_mesh_gradients_are_those_of_one_device(remat: bool, x64: None) -> None:
    """Rows over dp, tokens over cp in zig-zag, heads over tp; keys and values are gathered over cp."""
    s, block = 24, 5
    rng = np.random.default_rng(0)
    q, k, v, g = arrays(rng, s, s, h=8, kv=2)
    positions, segments = packed(rng, 2, s)
    expected = outputs(lambda *x: whole(*x, Sight(positions, segments, positions, segments)), q, k, v, g)
    mesh = jax.make_mesh((2, 2, 2), ("dp", "cp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    cp = Axis("cp", 2)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> Arrays:
        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys = [cp.gather(a, 1) for a in (k, v, *places)]
            return blockwise(q, keys[0], keys[1], Sight(*places, *keys[2:]), block=block)

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


def test_memory_grows_with_the_sequence_and_not_with_its_square() -> None:
    def workspace(s: int) -> int:
        x = jax.ShapeDtypeStruct((1, s, 2, 8), jnp.float32)
        places = jax.ShapeDtypeStruct((1, s), jnp.int32)

        def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, p: jax.Array, i: jax.Array) -> Arrays:
            return outputs(lambda *x: attend(*x, Sight(p, i, p, i)), q, k, v, g)

        return jax.jit(program).lower(x, x, x, x, places, places).compile().memory_analysis().temp_size_in_bytes

    a, b, c = (workspace(s) for s in (1024, 2048, 4096))
    assert c - b < 2.2 * (b - a) and c < 4 * 2 * 4096 * 4096  # less than the weights alone, 4 bytes for 2 heads
