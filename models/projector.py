"""What takes an encoder's features to the language model's width."""

import jax
from flax import nnx

from models.axes import Axes
from models.layers import add, dot, exact_gelu, mlp, normal, zeros
from models.weight import Use


class Projector(nnx.Module):
    """Two linear maps with an exact GELU between, as in LLaVA 1.5 (arXiv:2310.03744)."""

    def __init__(self, in_width: int, hidden: int, out_width: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        into = normal(rngs, (in_width, hidden), (None, "mlp"), in_width**-0.5, Use("x"))
        setattr(self, "in", into)  # a keyword
        self.in_bias = zeros((hidden,), ("mlp",)) if bias else None
        self.out = normal(rngs, (hidden, out_width), ("mlp", None), hidden**-0.5, Use("hidden"))
        self.out_bias = zeros((out_width,), (None,)) if bias else None

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return mlp(x, getattr(self, "in"), self.in_bias, self.out, self.out_bias, activation=exact_gelu, axes=axes)


class Linear(nnx.Module):
    """One linear map, as in Qwen2-Audio."""

    def __init__(self, in_width: int, out_width: int, *, rngs: nnx.Rngs) -> None:
        self.weight = normal(rngs, (in_width, out_width), (None, None), in_width**-0.5, Use("x"))
        self.bias = zeros((out_width,), (None,))

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return add(dot(x, self.weight.get_value()), self.bias.get_value())
