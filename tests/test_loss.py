"""Loss and gradients in chunks, over a vocabulary cut over tp, are those of full logits; so are scores."""

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

from hetjax.core.loss import Head, add_gradients, token_scores, training_chunk
from models.axes import ONE_DEVICE, Axes, Axis, vary

Tree = Any
DATA = ("dp", "cp")
B, S, D, V = 3, 8, 6, 16
Inputs = tuple[np.ndarray, ...]


def example(seed: int = 0) -> Inputs:
    """x, head, targets, weights; a third of the tokens have weight 0."""
    rng = np.random.default_rng(seed)
    weights = rng.random((B, S)) * (rng.random((B, S)) < 0.67)
    return rng.normal(size=(B, S, D)), rng.normal(size=(D, V)), rng.integers(0, V, (B, S)).astype(np.int32), weights


def full(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The definition."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(x @ head, -1), targets[..., None], -1)[..., 0]
    return -(chosen * weights).sum()


def right(inputs: Inputs) -> Tree:
    """(loss, gradient of x, gradient of the head)."""
    loss, grads = jax.jit(jax.value_and_grad(full, (0, 1)))(*inputs)
    return loss, *grads


def in_chunks(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    axes: Axes = ONE_DEVICE,
    vocab: int = 1,
    ids: int = V,
) -> Tree:
    """The same, by `add_gradients`; the head lies as [d, v], or with `vocab` 0 as [v, d]."""
    weight, swap = (head, lambda a: a) if vocab else (head.T, jnp.transpose)
    empty = 0 * weight  # varies as the head does
    total, g_x, acc = add_gradients(
        x, Head(weight, vocab, ids), targets, weights, empty, seed=jnp.ones((), x.dtype), axes=axes, chunk=chunk
    )
    return total, g_x, swap(acc)


def over_tp(function: Any, tp: int, out: Any) -> Any:
    """`function(..., axes=)` as one program on `tp` devices, the head's vocabulary cut."""
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))
    function = functools.partial(function, axes=Axes(tp=Axis(("tp",), tp)))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), P(None, "tp"), P(), P()), out_specs=out))


GRADIENTS = (P(), P(), P(None, "tp"))


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 1000])
def test_any_chunk_gives_the_loss_and_gradients_of_full_logits(chunk: int, x64: None) -> None:
    inputs = example()
    close(jax.jit(functools.partial(in_chunks, chunk=chunk))(*inputs), right(inputs))


@pytest.mark.parametrize(("tp", "vocab"), [(1, 0), (2, 1), (4, 0)])
def test_a_vocabulary_cut_over_tp_gives_the_same(tp: int, vocab: int, x64: None) -> None:
    inputs = example()
    close(over_tp(functools.partial(in_chunks, chunk=7, vocab=vocab), tp, GRADIENTS)(*inputs), right(inputs))


@pytest.mark.parametrize(("tp", "ids"), [(2, 13), (4, 13), (4, 9)])  # of 9 ids the last of 4 devices has none
def test_what_is_behind_the_vocabulary_is_no_part_of_it(tp: int, ids: int, x64: None) -> None:
    """Every logit is negative, and those of the padding would be large; a token without weight asks for one of them."""
    x, head, targets, weights = example()
    x, head, targets = abs(x), -abs(head[:, :ids]), targets % ids
    expected = right((x, head, targets, weights))
    padded = np.pad(head, ((0, 0), (0, -ids % tp)), constant_values=7.0)
    inputs = x, padded, np.where(weights == 0, ids, targets), weights
    loss, g_x, g_head = over_tp(functools.partial(in_chunks, chunk=7, ids=ids), tp, GRADIENTS)(*inputs)
    close((loss, g_x, g_head[:, :ids]), expected)
    assert not g_head[:, ids:].any()
    total, found = over_tp(functools.partial(token_scores, ids=ids, chunk=5), tp, (P(), P()))(*inputs)
    close(total, expected[0])
    np.testing.assert_array_equal(found, np.argmax(x @ head, -1))


def test_replicas_may_have_more_or_fewer_tokens_with_weight_or_none(x64: None) -> None:
    """Three replicas of 24, 1 and 0 such tokens take 5, 1 and 0 chunks, with sums over tp in each."""
    x, head, targets, weights = (np.concatenate([a] * 3) if a.shape[0] == B else a for a in example())
    weights = np.ones_like(weights)
    weights[B:] = 0
    weights[B + 1, 3] = 0.5
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 1, 2), (*DATA, "tp"))
    axes = Axes(dp=Axis(("dp",), 3), cp=Axis(("cp",), 1), tp=Axis(("tp",), 2))

    def program(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> Tree:
        found = in_chunks(x, vary(head, DATA), targets, weights, axes=axes, chunk=5)
        return jax.lax.psum(found[0], DATA), found[1], jax.lax.psum(found[2], DATA)

    cut, columns = P(*DATA), P(None, "tp")
    run = jax.shard_map(program, mesh=mesh, in_specs=(cut, columns, cut, cut), out_specs=(P(), cut, columns))
    close(jax.jit(run)(x, head, targets, weights), right((x, head, targets, weights)))


def test_tokens_without_weight_are_not_computed(x64: None) -> None:
    """Not even where no chunk of the order in the batch is without weight: what they hold reaches nothing."""
    x, head, targets, weights = example()
    expected = right((x, head, targets, weights))
    program = jax.jit(functools.partial(in_chunks, chunk=np.count_nonzero(weights)))
    close(program(np.where(weights[..., None] == 0, np.nan, x), head, targets, weights), expected)
    loss, *gradients = program(np.full_like(x, np.nan), head, targets, np.zeros_like(weights))
    assert loss == 0 and not any(np.any(g) for g in gradients)


def test_a_cpus_last_chunk_is_a_small_part_of_a_microbatch() -> None:
    assert [training_chunk("cpu", 512, tokens) for tokens in (3, 1022, 1024, 9000)] == [1, 256, 256, 512]
    assert training_chunk("gpu", 16384, 1024) == 1024


def test_the_heads_gradient_is_added_where_it_trains_and_all_are_times_the_seed(x64: None) -> None:
    x, head, *tokens = map(jnp.asarray, example())
    acc = np.random.default_rng(1).normal(size=head.shape)
    add = functools.partial(
        add_gradients, x, Head(head, 1, V), *tokens, seed=jnp.float64(0.5), axes=ONE_DEVICE, chunk=5
    )
    loss, g_x, g_head = right((x, head, *tokens))
    close(add(acc), (loss, 0.5 * g_x, acc + 0.5 * g_head))
    *found, nothing = add(None)
    close(tuple(found), (loss, 0.5 * g_x))
    assert nothing is None


def test_large_logits_do_not_overflow(x64: None) -> None:
    x, head, targets, weights = example()
    inputs = (1e4 * x, head, targets, weights)
    close(over_tp(functools.partial(in_chunks, chunk=7), 2, GRADIENTS)(*inputs)[0], full(*inputs))


def test_logits_are_computed_once_and_those_of_all_tokens_never_exist() -> None:
    """Three products with the vocabulary: logits, and the gradients of both of its factors."""
    shapes = ((B, 64, D), (D, 256), (B, 64), (B, 64))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    program = jax.make_jaxpr(functools.partial(in_chunks, chunk=16, ids=256))(*inputs)
    equations = [e for j in jaxprs(program.jaxpr) for e in j.eqns]
    sizes = [math.prod(v.aval.shape) for e in equations for v in e.outvars]
    assert 16 * 256 in sizes and max(sizes) < B * 64 * 256 / 8
    assert [e.primitive.name for e in equations].count("dot_general") == 3


def test_scores_compute_the_logits_once() -> None:
    program = jax.make_jaxpr(functools.partial(token_scores, ids=V, axes=ONE_DEVICE, chunk=5))(*example())
    assert [e.primitive.name for j in jaxprs(program.jaxpr) for e in j.eqns].count("dot_general") == 1


@pytest.mark.parametrize("narrow_head", [False, True])
def test_of_bfloat16_features_neither_logits_nor_the_heads_gradient_are_rounded(narrow_head: bool) -> None:
    x, head, targets, weights = example()
    x = jnp.asarray(8 * x, jnp.bfloat16)
    narrow = jnp.asarray(head, jnp.bfloat16)
    head = np.asarray(narrow, np.float32)  # what a bfloat16 product sees of it
    given = x, narrow if narrow_head else jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)

    def program(x: jax.Array, head: jax.Array, *tokens: jax.Array) -> Tree:
        acc, seed = jnp.zeros((D, V)), jnp.float32(1)
        return add_gradients(x, Head(head, 1, V), *tokens, acc, seed=seed, axes=ONE_DEVICE, chunk=1000)

    got, g_x, g_head = jax.jit(program)(*given)
    assert got.dtype == g_head.dtype == jnp.float32 and g_x.dtype == jnp.bfloat16
    # A compiler may leave out a rounding that the program asks for.
    products = [e for j in jaxprs(jax.make_jaxpr(program)(*given).jaxpr) for e in j.eqns if "dot" in e.primitive.name]
    wide = {e.outvars[0].aval.shape: e.outvars[0].aval.dtype == jnp.float32 for e in products}
    assert wide == {(B * S, V): True, (B * S, D): False, (D, V): True}
    logits = np.asarray(x, np.float64) @ head.astype(np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = powers / powers.sum(-1, keepdims=True)
    hit = np.arange(V) == targets[..., None]
    np.testing.assert_allclose(got, -(np.log(softmax[hit].reshape(B, S)) * weights).sum(), rtol=1e-6)
    g = np.asarray(jnp.asarray((softmax - hit) * weights[..., None], jnp.bfloat16), np.float64)
    expected = np.einsum("bsd,bsv->dv", np.asarray(x, np.float64), g)
    assert np.sqrt(np.mean(np.square(g_head - expected)) / np.mean(np.square(expected))) < 1e-4


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_likeliest_id_is_the_lowest_of_equal_ones_beside_the_same_loss(tp: int, x64: None) -> None:
    rng = np.random.default_rng(0)
    x, head = rng.integers(-1, 2, (B, S, D)).astype(float), rng.integers(-1, 2, (D, V)).astype(float)  # many ties
    ties = ((x @ head) == (x @ head).max(-1, keepdims=True)).sum(-1)
    assert (ties > 1).sum() > 5
    *_, targets, weights = example()
    total, found = over_tp(functools.partial(token_scores, ids=V, chunk=5), tp, (P(), P()))(x, head, targets, weights)
    np.testing.assert_array_equal(found, np.argmax(x @ head, -1))
    close(total, full(x, head, targets, weights))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_likeliest_id_is_one_of_the_vocabulary_even_of_broken_logits(tp: int) -> None:
    x, head, *rest = (a.astype(np.float32) if a.dtype == np.float64 else a for a in example())
    x[0, 0], head[0, 3] = np.nan, np.nan
    _, found = over_tp(functools.partial(token_scores, ids=V, chunk=24), tp, (P(), P()))(x, head, *rest)
    found = np.asarray(found)
    assert ((found >= 0) & (found < V)).all()
