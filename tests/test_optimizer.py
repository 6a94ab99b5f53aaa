"""Learning rates, freezing and weight decay by path; a skipped step changes nothing; the clip is one for all."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hetjax.core import optimizer
from hetjax.core.optimizer import OptimizerConfig

PARAMS = {
    "first": {"embed": jnp.linspace(-1, 1, 12).reshape(4, 3)},
    "layers": {"attention": {"q": jnp.linspace(0, 1, 18).reshape(2, 3, 3)}, "norm": jnp.ones((2, 3))},
    "last": {"projector": {"in": jnp.linspace(1, 2, 9).reshape(3, 3)}},
}


def update(
    config: OptimizerConfig, params: Any, grads: Any, *, ok: bool = True, scale: float = 1.0, steps: int = 1
) -> Any:
    tx = optimizer.transformation(config, "llm")
    state = tx.init(params)
    for _ in range(steps):
        params, state = optimizer.apply_update(
            tx,
            params,
            state,
            grads,
            learning_rate=jnp.asarray(0.1),
            multipliers=optimizer.multipliers(config, "llm", params),
            scale=jnp.asarray(scale),
            ok=jnp.asarray(ok),
        )
    return params, state


def test_sgd_subtracts_the_scaled_gradient() -> None:
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    got, _ = update(OptimizerConfig(name="sgd"), PARAMS, grads, scale=0.5)
    jax.tree.map(lambda g, p: np.testing.assert_allclose(g, p - 0.05, rtol=1e-6), got, PARAMS)


def test_adamw_equals_optax_adamw() -> None:
    grads = jax.tree.map(jnp.sin, PARAMS)
    config = OptimizerConfig(name="adamw", weight_decay=0.3, no_decay=("*norm*",), b1=0.8, b2=0.9)
    got, _ = update(config, PARAMS, grads, steps=3)
    mask = {
        "first": {"embed": True},
        "layers": {"attention": {"q": True}, "norm": False},
        "last": {"projector": {"in": True}},
    }
    tx = optax.adamw(0.1, b1=0.8, b2=0.9, weight_decay=0.3, mask=mask)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        u, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, params)


def test_a_step_that_is_not_ok_changes_nothing() -> None:
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    config = OptimizerConfig()
    got, state = update(config, PARAMS, grads, ok=False)
    before = optimizer.transformation(config, "llm").init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (got, state), (PARAMS, before))


def test_paths_choose_what_trains_and_how_fast() -> None:
    config = OptimizerConfig(
        name="sgd", frozen=("llm/*",), trainable=("llm/last/*", "*norm"), learning_rate_multipliers={"*norm": 2.0}
    )
    trainable, frozen = optimizer.split(config, "llm", PARAMS)
    assert jax.tree.structure(trainable) == jax.tree.structure(
        {"layers": {"norm": 0}, "last": {"projector": {"in": 0}}}
    )
    assert jax.tree.structure(frozen) == jax.tree.structure({"first": {"embed": 0}, "layers": {"attention": {"q": 0}}})
    jax.tree.map(np.testing.assert_array_equal, optimizer.merge(trainable, frozen), PARAMS)
    got, _ = update(config, trainable, jax.tree.map(jnp.ones_like, trainable))
    np.testing.assert_allclose(got["layers"]["norm"], 1 - 0.2, rtol=1e-6)
    np.testing.assert_allclose(got["last"]["projector"]["in"], PARAMS["last"]["projector"]["in"] - 0.1, rtol=1e-6)


def test_warmup_cosine_and_end() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_steps=12, end_learning_rate_fraction=0.1)
    rates = [optimizer.learning_rate(config, s) for s in range(14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[8] == pytest.approx(1.1) and rates[12] == rates[13] == pytest.approx(0.2)
    assert optimizer.learning_rate(OptimizerConfig(learning_rate=3.0), 10**6) == 3.0


def test_clip_scales_down_to_the_norm() -> None:
    assert float(optimizer.clip_scale(jnp.asarray(5.0), 2.5)) == pytest.approx(0.5, rel=1e-6)
    assert (
        float(optimizer.clip_scale(jnp.asarray(5.0), None)) == 1 == float(optimizer.clip_scale(jnp.asarray(0.5), 1.0))
    )


def test_any_element_by_element_chain_is_taken() -> None:
    config = OptimizerConfig(name="chain", chain=[optax.scale_by_lion()])
    got, _ = update(config, PARAMS, jax.tree.map(jnp.ones_like, PARAMS))
    jax.tree.map(lambda g, p: np.testing.assert_allclose(g, p - 0.1, rtol=1e-5, atol=1e-6), got, PARAMS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="adamx"), "OptimizerConfig.name='adamx'; it must be one of adamw, sgd, chain"),
        (dict(name="chain"), "OptimizerConfig.name='chain' with 0 entries in chain"),
        (dict(chain=(optax.identity(),)), "OptimizerConfig.name='adamw' with 1 entries in chain"),
        (dict(learning_rate=float("nan")), "OptimizerConfig.learning_rate=nan; it must be finite and not negative"),
        (dict(warmup_steps=-1), "OptimizerConfig.warmup_steps=-1; it must be finite and not negative"),
        (dict(warmup_steps=10, decay_steps=10), "OptimizerConfig.decay_steps=10 ends before warmup_steps=10"),
        (dict(b1=1.5), "OptimizerConfig.b1=1.5; it must be from 0 to 1"),
        (dict(clip_norm=0.0), "OptimizerConfig.clip_norm=0.0; it must be positive, or None for no clipping"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(frozen=("lm/*",)), "OptimizerConfig.frozen: 'lm/*' matches no parameter; the nearest is 'llm/norm'"),
        (
            dict(learning_rate_multipliers={"x": 1.0}),
            "OptimizerConfig.learning_rate_multipliers: 'x' matches no parameter",
        ),
        (dict(frozen=("*",)), "OptimizerConfig.frozen=['*'] freezes every parameter; name what trains in `trainable`"),
        (dict(name="chain", chain=(optax.clip_by_global_norm(1e-3),)), "an entry mixes the elements of a parameter"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.check(OptimizerConfig(**settings), ["llm/norm", "vision/x"])
