"""Which token comes next: the likeliest, or one drawn from the distribution that `Sampling` leaves of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hetjax.core.loss import likeliest
from models.axes import Axes


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy: the likeliest one, always.

    Else logits are divided by it, the `top_k` largest are kept (0: all), and of those the fewest whose probabilities
    add up to `top_p` (Holtzman et al., arXiv:1904.09751). Equal logits are kept or left out together.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}; it must be from 0 to {2**31 - 1}")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p} do nothing at temperature=0, which is greedy; "
                "set a temperature, such as 1.0, or leave them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0


class Draw(NamedTuple):
    """A `Sampling` on devices, as arrays or their specs, with a stream of random numbers per prompt."""

    temperature: Any
    top_k: Any  # at least 1
    top_p: Any
    seed: Any
    prompt: Any  # [b], the number of each row's prompt: a draw depends on nothing else that is beside it


class Rules(NamedTuple):
    """Penalties on devices, as arrays or their specs, over the vocabulary [v]."""

    repetition: Any
    never: Any  # bool [v]: tokens that do not come
    never_first: Any  # bool [v]
    seen: Any  # bool [b, v]: tokens that were in the prompt or the answer


def penalised(logits: jax.Array, rules: Rules | None, step: jax.Array | int) -> jax.Array:
    """`logits` [b, v / tp] as the rules leave them for token `step` of the answer."""
    if rules is None:
        return logits
    repeated = jnp.where(logits < 0, logits * rules.repetition, logits / rules.repetition)
    logits = jnp.where(rules.seen, repeated, logits)
    return jnp.where(rules.never | (rules.never_first & (step == 0)), -jnp.inf, logits)


def remembered(rules: Rules | None, tokens: jax.Array, axes: Axes) -> Rules | None:
    """The rules once `tokens` [b] are there too."""
    if rules is None:
        return None
    local = tokens - axes.tp.index() * rules.seen.shape[1]
    return rules._replace(seen=rules.seen | (jnp.arange(rules.seen.shape[1])[None] == local[:, None]))


def pick(logits: jax.Array, ids: int, axes: Axes, draw: Draw | None, step: jax.Array | int) -> jax.Array:
    """The next token of every row, int32 [b], of `logits` [b, v / tp] of `ids` and padding; `draw` None is greedy."""
    if draw is None:
        return likeliest(logits, axes)
    whole = kept(axes.tp.gather(logits, dim=1)[:, :ids], draw)  # sums of another length would round in another way
    key = lambda prompt: jax.random.fold_in(jax.random.fold_in(jax.random.key(draw.seed), prompt), step)
    tokens = jax.vmap(lambda prompt, row: jax.random.categorical(key(prompt), row))(draw.prompt, whole)
    return axes.tp.pmax(tokens.astype(jnp.int32))  # the same on all


def kept(logits: jax.Array, draw: Draw) -> jax.Array:
    """`logits` [b, v] over the temperature, -inf where the sampling leaves a token out."""
    logits = logits / draw.temperature
    falling = -jnp.sort(-logits, -1)
    rank = jnp.arange(logits.shape[-1])[None]
    falling = jnp.where(rank < draw.top_k, falling, -jnp.inf)
    chances = jax.nn.softmax(falling, -1)
    before = jnp.cumsum(chances, -1) - chances
    inside = (rank < draw.top_k) & ((rank == 0) | (before < draw.top_p))
    least = jnp.where(inside, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
