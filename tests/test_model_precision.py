"""Float64 stays float64, bfloat16 products leave weight gradients in float32."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import DECODER, RICH, SEQ, VIT, close, compiled, documents, random_params, rows_of, run

from hetjax.core.remat import Keep, Remat
from models.axes import ONE_DEVICE
from models.decoder import Decoder
from models.grouped import grouped_dot
from models.layers import dot
from models.moe import ROUTING, Experts, no_routing
from models.vit import ViT

Tree = Any
EXPERTS = dataclasses.replace(DECODER, experts=Experts(5, 2, 12))


def jaxprs(jaxpr: Any) -> Iterator[Any]:
    """`jaxpr` and all that its equations hold."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from jaxprs(inner)


def test_in_float64_nothing_is_rounded_to_less(x64: None) -> None:
    for config in (RICH, EXPERTS, VIT, dataclasses.replace(VIT, variant="clip")):
        definition = config.module(jnp.float64)
        batch = rows_of(documents(4)) | {"vision.pixels": np.zeros((1, 8, 8, 3), np.float32)}
        loss = lambda p, d=definition, b=batch: run(d, p, {}, b)["x"].sum()
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(random_params(definition)).jaxpr
        made = [v.aval for j in jaxprs(jaxpr) for e in j.eqns for v in e.outvars]
        assert len(made) > 200
        assert not [a for a in made if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype != jnp.float64]


@pytest.mark.parametrize("config", [RICH, EXPERTS, VIT], ids=["decoder", "experts", "vit"])
def test_in_bfloat16_outputs_are_narrow_and_gradients_are_not(config: Decoder | ViT) -> None:
    rng = np.random.default_rng(0)
    batch = rows_of(documents(9, 5), documents(12))
    batch |= {"vision.pixels": rng.normal(size=(4, 8, 8, 3)).astype(np.float32)}
    definition = config.module(jnp.bfloat16)
    params = random_params(definition, dtype=np.float32)
    narrow, wide = (compiled(config, dtype)(params, {}, batch)["x"] for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    size = lambda a: float(np.sqrt(np.square(np.asarray(a, np.float64)).sum()))
    assert size(np.float32(narrow) - wide) < 0.05 * size(wide)
    grads = jax.eval_shape(jax.grad(lambda p: run(definition, p, {}, batch)["x"].sum().astype(jnp.float32)), params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_weight_gradients_of_bfloat16_products_accumulate_in_float32() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 4, 8, 32)), jnp.bfloat16)  # 16 microbatches
    g = jnp.asarray(rng.normal(size=(16, 4, 8, 6, 4)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(32, 6, 4)), jnp.float32)
    exact = np.einsum("mbsd,mbshk->dhk", np.asarray(x, np.float64), np.asarray(g, np.float64))

    def error(product: Callable[..., jax.Array]) -> float:
        total = jnp.zeros_like(w)
        for x_m, g_m in zip(x, g, strict=True):
            (g_w,) = jax.vjp(lambda w, x_m=x_m: product(x_m, w), w)[1](g_m)
            assert g_w.dtype == jnp.float32
            total = total + g_w
        return float(np.sqrt(np.mean(np.square(total - exact))) / np.sqrt(np.mean(np.square(exact))))

    assert dot(x[0], w).dtype == jnp.bfloat16
    assert error(dot) < 1e-6
    assert error(lambda x, w: jnp.tensordot(x, w.astype(x.dtype), 1)) > 1e-3  # what autodiff gives


def test_weight_gradients_of_bfloat16_experts_accumulate_in_float32() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 32, 24)), jnp.bfloat16)  # 16 microbatches
    g = jnp.asarray(rng.normal(size=(16, 32, 6)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(3, 24, 6)), jnp.float32)
    sizes, total = jnp.array([20, 0, 12], jnp.int32), jnp.zeros_like(w)
    for x_m, g_m in zip(x, g, strict=True):
        y, pull = jax.vjp(lambda w, x_m=x_m: grouped_dot(x_m, w, sizes), w)
        assert y.dtype == jnp.bfloat16 and pull(g_m)[0].dtype == jnp.float32
        total = total + pull(g_m)[0]
    a, b = np.asarray(x, np.float64), np.asarray(g, np.float64)
    exact = np.stack([np.einsum("mna,mnb->ab", a[:, r], b[:, r]) for r in (slice(20), slice(0), slice(20, 32))])
    assert np.sqrt(np.mean(np.square(total - exact))) < 1e-6 * np.sqrt(np.mean(np.square(exact)))


def test_products_over_two_dims_have_the_gradients_of_autodiff(x64: None) -> None:
    rng = np.random.default_rng(0)
    x, w, g = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(4, 5, 6)), rng.normal(size=(2, 3, 6))
    mine, pull = jax.vjp(lambda x, w: dot(x, w, contract=2), x, w)
    theirs, pull_theirs = jax.vjp(lambda x, w: jnp.tensordot(x, w, 2), x, w)
    close((mine, pull(g)), (theirs, pull_theirs(g)))


def test_a_checkpoint_policy_sees_the_products() -> None:
    """One that keeps them keeps the hidden features [tokens, 24]; one that keeps nothing does not.

    Two weights have that shape too."""
    batch = rows_of(documents(5))

    def kept(policy: Any, config: Decoder = DECODER) -> list[tuple[int, ...]]:
        definition = config.module(jnp.float32)
        layer, seen = definition.layers[0], definition.prepare(batch, ONE_DEVICE)
        params = layer.init(jax.random.key(0))
        run_layer = jax.checkpoint(lambda w, c: layer.apply(w, c, seen, ONE_DEVICE)["x"], policy=policy)
        x = jnp.ones((1, SEQ, DECODER.width))
        routing = {ROUTING: no_routing(config.experts, config.num_layers, x)} if config.experts else {}
        return [a.shape for a in jax.tree.leaves(jax.vjp(run_layer, params, {"x": x, **routing})[1])]

    hidden = (SEQ, DECODER.mlp_width)
    assert hidden == (DECODER.width, DECODER.mlp_width)
    assert kept(Keep(Remat.DOTS).policy).count(hidden) == 2 + 2
    assert kept(Keep(Remat.FULL).policy).count(hidden) == 2
    assert EXPERTS.experts is not None
    routed = (SEQ * EXPERTS.experts.per_token, EXPERTS.experts.width)
    assert kept(Keep(Remat.DOTS).policy, EXPERTS).count(routed) == 2
    assert routed not in kept(Keep(Remat.FULL).policy, EXPERTS)
