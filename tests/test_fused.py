"""The fused kernels of GPUs are told, of every query, the keys it sees; a plain stand-in that is told the same trains
as plain attention does, on one device and on a mesh."""

import functools
import importlib.metadata
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P
from test_attention import Arrays, arrays, close, outputs, packed, zigzag

from models import fused as module
from models import hopper
from models.attention import whole
from models.axes import Axis
from models.fused import BACKWARD, FORWARD, fused, refusal, within
from models.hopper import say
from models.sight import Sight, in_order


def plain(q: Any, k: Any, v: Any, first: jax.Array, end: jax.Array, *, same: bool) -> list[jax.Array]:
    """What the forward kernel is told, in plain JAX; the sums that it leaves to the backward are made up."""
    number = jnp.arange(k.shape[1])[None, None]
    last = jnp.broadcast_to(jnp.arange(1, q.shape[1] + 1)[None], end.shape) if same else end
    mask = ((number >= first[..., None]) & (number < last[..., None]))[:, None]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -1e30)
    weights = jnp.where(mask, jax.nn.softmax(logits, -1), 0)
    sums = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return [jnp.einsum("bhqk,bkhd->bqhd", weights, v), sums, sums]


def plain_vjp(q: Any, k: Any, v: Any, first: Any, end: Any, y: Any, top: Any, total: Any, g: Any, *, same: bool) -> Any:
    """What the backward kernels are told, in plain JAX."""
    return jax.vjp(lambda *x: plain(*x, first, end, same=same)[0], q, k, v)[1](g)


for primitive, run in ((FORWARD, plain), (BACKWARD, plain_vjp)):
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform="cpu")


@pytest.mark.parametrize("seed", range(12))
def test_ranges_show_the_keys_that_the_sight_shows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cp, s = int(rng.choice([1, 2, 4])), 8 * int(rng.integers(1, 6))
    causal, window = bool(rng.random() < 0.8), None if rng.random() < 0.5 else int(rng.integers(1, 9))
    order = zigzag(s, cp)
    positions, segments = packed(rng, 2, s)
    mine = order.reshape(cp, -1)[int(rng.integers(cp))]  # the queries of one device
    keys = positions[:, order], segments[:, order]
    sight = Sight(positions[:, mine], segments[:, mine], *keys, causal=causal, window=window, zigzag=cp)
    np.testing.assert_array_equal(in_order(positions[:, order], cp), positions)
    first, end = (np.asarray(a)[..., None] for a in sight.ranged().ranges)
    number = np.arange(s)
    np.testing.assert_array_equal(((number >= first) & (number < end))[:, :, order], sight.mask())
    empty = segments[:, mine] == 0
    assert (end[..., 0] == 0)[empty].all() and (first[..., 0] == s)[empty].all()  # no block of keys is visited


def test_no_tile_of_the_forward_begins_behind_its_own_keys() -> None:
    """Or its kernel would wait for ever. What padding, behind the documents, is told shows it nothing either."""
    rng = np.random.default_rng(0)
    positions, segments = packed(rng, 4, 64)
    for window in (None, 3):
        first, end = Sight(positions, segments, positions, segments, window=window, zigzag=1).ranged().ranges
        told, place = np.asarray(within(first, end)), np.arange(64)
        assert (told.reshape(4, -1, 16).min(-1) <= place[::16] + 1).all()
        assert (told == np.where(segments > 0, first, place + 1)).all() and (segments == 0).any()


@pytest.mark.parametrize("window", [None, 3])
def test_on_one_device_values_and_gradients_are_those_of_plain_attention(window: int | None, x64: None) -> None:
    rng = np.random.default_rng(0)
    q, k, v, g = arrays(rng, 24, 24)
    positions, segments = packed(rng, 2, 24)
    sight = Sight(positions, segments, positions, segments, window=window, zigzag=1).ranged()
    run = lambda form: jax.jit(functools.partial(outputs, lambda *x: form(*x, sight)))(q, k, v, g)
    found, expected = run(fused), run(whole)
    close(found, expected)
    assert (np.asarray(found[0])[segments == 0] == 0).all()
    told = str(jax.make_jaxpr(lambda *x: fused(*x, sight))(q, k, v))
    assert "same=True" in told  # so that the backward skips what is behind a query


@pytest.mark.parametrize(("remat", "window"), [(False, None), (True, 5)])
def test_on_a_mesh_values_and_gradients_are_those_of_one_device(remat: bool, window: int | None, x64: None) -> None:
    """Rows over dp, tokens over cp in zig-zag, heads over tp; the types of what varies over the mesh are checked."""
    s = 24
    rng = np.random.default_rng(1)
    q, k, v, g = arrays(rng, s, s, h=8, kv=2)
    positions, segments = packed(rng, 2, s)
    rule = Sight(positions, segments, positions, segments, window=window)
    expected = outputs(lambda *x: whole(*x, rule), q, k, v, g)
    mesh = jax.make_mesh((2, 2, 2), ("dp", "cp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    cp = Axis(("cp",), 2)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> Arrays:
        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys = [cp.gather(a, 1) for a in (k, v, *places)]
            return fused(q, keys[0], keys[1], Sight(*places, *keys[2:], window=window, zigzag=2).ranged())

        return outputs(jax.checkpoint(function) if remat else function, q, k, v, g)

    heads, tokens = P("dp", "cp", "tp"), P("dp", "cp")
    on_mesh = jax.shard_map(program, mesh=mesh, in_specs=(heads,) * 4 + (tokens,) * 2, out_specs=(heads,) * 4)
    order = zigzag(s, 2)
    found = jax.jit(on_mesh)(*(a[:, order] for a in (q, k, v, g, positions, segments)))
    close(tuple(a[:, np.argsort(order)] for a in found), expected)


def test_keys_shared_by_devices_get_the_sum_of_their_gradients(x64: None) -> None:
    """One key-value head for all of tp, which does not vary over it."""
    q, k, v, g = arrays(np.random.default_rng(0), 12, 12, h=4, kv=1)
    positions, segments = packed(np.random.default_rng(0), 2, 12)
    sight = Sight(positions, segments, positions, segments, zigzag=1).ranged()
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, shared = P(None, None, "tp"), P()
    program = jax.shard_map(
        functools.partial(outputs, lambda *x: fused(*x, sight)),
        mesh=mesh,
        in_specs=(heads, shared, shared, heads),
        out_specs=(heads, heads, shared, shared),
    )
    close(jax.jit(program)(q, k, v, g), outputs(lambda *x: whole(*x, sight), q, k, v, g))


@pytest.mark.parametrize(
    ("device", "tokens", "features", "dtype", "version", "kernels", "reason"),
    [
        ("NVIDIA H100 80GB HBM3", 256, 128, jnp.bfloat16, "0.0.17", True, None),
        ("NVIDIA GH200 480GB", 256, 64, jnp.float16, "0.0.17", True, None),
        ("NVIDIA A100-SXM4-80GB", 256, 128, jnp.bfloat16, "0.0.17", True, "Hopper"),
        ("NVIDIA H200", 250, 128, jnp.bfloat16, "0.0.17", True, "multiples of 128"),
        ("NVIDIA H200", 256, 96, jnp.bfloat16, "0.0.17", True, "96 features, not 64 or 128"),
        ("NVIDIA H200", 256, 128, jnp.float32, "0.0.17", True, "not float32"),
        ("NVIDIA H200", 256, 128, jnp.bfloat16, "0.0.16", True, "tokamax 0.0.17 is needed"),
        ("NVIDIA H200", 256, 128, jnp.bfloat16, None, True, "no package metadata"),
        ("NVIDIA H200", 256, 128, jnp.bfloat16, "0.0.17", False, "no module named"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(
    device: str,
    tokens: int,
    features: int,
    dtype: Any,
    version: str | None,
    kernels: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(module, "KERNELS", ("json",) if kernels else ("json", "no_such_module"))
    monkeypatch.setattr(hopper, "missing", hopper.missing.__wrapped__)
    q, k = jax.ShapeDtypeStruct((1, 128, 4, features), dtype), jax.ShapeDtypeStruct((1, tokens, 2, features), dtype)
    found = refusal(q, k, device)
    assert found is None if reason is None else reason.lower() in found.lower()


def test_the_log_says_once_that_attention_goes_in_plain_blocks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        say("attention goes", "a reason")
        say("attention goes", "a reason")
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == ["a reason"]
