"""The chunked loss over a vocabulary cut over tp is the cross-entropy of full logits."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_model_precision import jaxprs
from test_models import close

from hetjax.core.loss import token_scores, token_sum
from models.axes import ONE_DEVICE, Axes, Axis

Tree = Any
B, S, D, V = 3, 8, 6, 16


def example(seed: int = 0) -> tuple[np.ndarray, ...]:
    """x, head, targets, weights; a third of the tokens have weight 0."""
    rng = np.random.default_rng(seed)
    weights = rng.random((B, S)) * (rng.random((B, S)) < 0.67)
    return rng.normal(size=(B, S, D)), rng.normal(size=(D, V)), rng.integers(0, V, (B, S)).astype(np.int32), weights


def full(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The definition."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(x @ head, -1), targets[..., None], -1)[..., 0]
    return -(chosen * weights).sum()


def over_tp(function: Any, tp: int, out: P | tuple[P, P]) -> Any:
    """`function(..., axes=)` as one program on `tp` devices, the head's vocabulary cut."""
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))
    function = functools.partial(function, axes=Axes(tp=Axis("tp", tp)))
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(None, "tp"), P(), P()), out_specs=out)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 1000])
def test_any_chunk_gives_the_loss_and_gradients_of_full_logits(chunk: int, x64: None) -> None:
    inputs = example()
    mine = jax.jit(jax.value_and_grad(functools.partial(token_sum, axes=ONE_DEVICE, chunk=chunk), (0, 1)))(*inputs)
    close(mine, jax.jit(jax.value_and_grad(full, (0, 1)))(*inputs))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_vocabulary_cut_over_tp_gives_the_same(tp: int, x64: None) -> None:
    inputs = example()
    mine = jax.jit(jax.value_and_grad(over_tp(functools.partial(token_sum, chunk=7), tp, P()), (0, 1)))(*inputs)
    close(mine, jax.jit(jax.value_and_grad(full, (0, 1)))(*inputs))


def test_large_logits_do_not_overflow(x64: None) -> None:
    x, head, targets, weights = example()
    inputs = (1e4 * x, head, targets, weights)
    close(over_tp(token_sum, 2, P())(*inputs), full(*inputs))


def test_a_token_without_weight_gives_no_gradient(x64: None) -> None:
    x, head, targets, weights = example()
    g = jax.jit(jax.grad(functools.partial(token_sum, axes=ONE_DEVICE, chunk=5)))(x, head, targets, weights)
    np.testing.assert_array_equal((np.abs(g) > 0).any(-1), weights > 0)


def test_logits_of_all_tokens_never_exist() -> None:
    """Not even in the backward pass: no intermediate is as large as [tokens, vocabulary]."""
    shapes = ((B, 64, D), (D, 256), (B, 64), (B, 64))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    program = jax.value_and_grad(functools.partial(token_sum, axes=ONE_DEVICE, chunk=16), (0, 1))
    sizes = [
        math.prod(v.aval.shape)
        for j in jaxprs(jax.make_jaxpr(program)(*inputs).jaxpr)
        for e in j.eqns
        for v in e.outvars
    ]
    assert 16 * 256 in sizes and max(sizes) < B * 64 * 256 / 8


def test_scores_compute_the_logits_once() -> None:
    program = jax.make_jaxpr(functools.partial(token_scores, axes=ONE_DEVICE))(*example())
    assert [e.primitive.name for j in jaxprs(program.jaxpr) for e in j.eqns].count("dot_general") == 1


def test_bfloat16_logits_are_not_rounded() -> None:
    x, head, targets, weights = example()
    x = jnp.asarray(8 * x, jnp.bfloat16)
    head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)  # what a bfloat16 product sees of it
    got = token_sum(x, jnp.asarray(head), targets, jnp.asarray(weights, jnp.float32), axes=ONE_DEVICE)
    logits = np.asarray(x, np.float64) @ head.astype(np.float64)
    top = logits.max(-1)
    entropy = (
        np.log(np.exp(logits - top[..., None]).sum(-1))
        + top
        - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (entropy * weights).sum(), rtol=1e-6)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_likeliest_id_is_the_lowest_of_equal_ones_beside_the_same_loss(tp: int, x64: None) -> None:
    rng = np.random.default_rng(0)
    x, head = rng.integers(-1, 2, (B, S, D)).astype(float), rng.integers(-1, 2, (D, V)).astype(float)  # many ties
    ties = ((x @ head) == (x @ head).max(-1, keepdims=True)).sum(-1)
    assert (ties > 1).sum() > 5
    *_, targets, weights = example()
    scores = over_tp(functools.partial(token_scores, chunk=5), tp, (P(), P()))
    total, found = jax.jit(scores)(x, head, targets, weights)
    np.testing.assert_array_equal(found, np.argmax(x @ head, -1))
    close(total, full(x, head, targets, weights))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_likeliest_id_is_one_of_the_vocabulary_even_of_broken_logits(tp: int) -> None:
    x, head, *rest = (a.astype(np.float32) if a.dtype == np.float64 else a for a in example())
    x[0, 0], head[0, 3] = np.nan, np.nan
    _, found = over_tp(token_scores, tp, (P(), P()))(x, head, *rest)
    found = np.asarray(found)
    assert ((found >= 0) & (found < V)).all()
