"""What encoders that see and that hear share: the two blocks of a layer."""

from collections.abc import Callable

import jax
from flax import nnx

from models.axes import Axes
from models.context import attend_across
from models.layers import add, dot, dots, mlp, normal, zeros
from models.sight import Sight
from models.weight import Use


class Attention(nnx.Module):
    """Self-attention; heads are cut over tp, tokens over cp. Whisper's keys have no bias."""

    def __init__(self, width: int, num_heads: int, *, key_bias: bool = True, rngs: nnx.Rngs) -> None:
        d, h, k = width, num_heads, width // num_heads
        into = lambda: normal(rngs, (d, h, k), (None, "heads", None), d**-0.5, Use("x"))
        self.q, self.k, self.v = into(), into(), into()
        self.q_bias, self.v_bias = (zeros((h, k), ("heads", None)) for _ in range(2))
        self.k_bias = zeros((h, k), ("heads", None)) if key_bias else None
        self.o = normal(rngs, (h, k, d), ("heads", None, None), d**-0.5, Use("y"))
        self.o_bias = zeros((d,), (None,))

    def __call__(self, x: jax.Array, axes: Axes, sight: Sight | None = None) -> jax.Array:
        """`sight` tells which keys each query sees, as `attend_across` takes it; None: every one."""
        together = dots(x, *(w.get_value() for w in (self.q, self.k, self.v)), gathers=axes.sp)
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q, k, v = (y if b is None else add(y, b.get_value()) for y, b in zip(together, biases, strict=True))
        y = attend_across(q, k, v, sight, axes)
        return add(axes.total(dot(y, self.o.get_value(), contract=2)), self.o_bias.get_value())


class Mlp(nnx.Module):
    """Two linear maps with an activation between; the hidden features are cut over tp."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[jax.Array], jax.Array], *, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation
        self.up = normal(rngs, (width, hidden), (None, "mlp"), width**-0.5, Use("x"))
        self.up_bias = zeros((hidden,), ("mlp",))
        self.down = normal(rngs, (hidden, width), ("mlp", None), hidden**-0.5, Use("hidden"))
        self.down_bias = zeros((width,), (None,))

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return mlp(x, self.up, self.up_bias, self.down, self.down_bias, activation=self.activation, axes=axes)
