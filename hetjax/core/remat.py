"""What the backward keeps of a layer's inner results, from all of them to none; the rest it computes again.

Between keeping everything and only a layer's input lie the matrix products: with all of them kept, only cheap things
(norms, activations, rotary positions, attention) are computed again. Of the products those come first that cost most
for each byte that they take.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.layers import GROUPED, is_product

Policy = Callable[..., bool]


class Remat(enum.StrEnum):
    """What a layer keeps for its backward pass: everything, its matmul results, or only its input; or what fits."""

    NONE = "none"
    DOTS = "dots"
    FULL = "full"
    AUTO = "auto"


def remat(function: Callable[..., Any], policy: Policy | None) -> Callable[..., Any]:
    """`function`, of whose inner results the backward keeps what the policy says."""
    return function if policy is None else jax.checkpoint(function, policy=policy, prevent_cse=False)


class Product(NamedTuple):
    """A matrix product as one device computes it."""

    cost: float  # FLOPs for each byte of its result
    size: int  # bytes of its result

    @classmethod
    def of(cls, primitive: Any, lhs: Any, rhs: Any, **settings: Any) -> "Product":
        """That of an equation for which `is_product` holds."""
        if primitive.name == GROUPED:
            contracted, elements = lhs.shape[-1], lhs.size // lhs.shape[-1] * rhs.shape[-1]
        else:
            contracted = math.prod(lhs.shape[dim] for dim in settings["dimension_numbers"][0][0])
            elements = lhs.size // contracted * (rhs.size // contracted)
        itemsize = jnp.dtype(settings.get("preferred_element_type") or lhs.dtype).itemsize
        return cls(2 * contracted / itemsize, elements * itemsize)

    @property
    def rank(self) -> tuple[float, int]:
        """Higher for what is kept rather."""
        return self.cost, -self.size


@dataclasses.dataclass(frozen=True)
class Keep:
    """What the layers of a stage keep. `least`: with `Remat.DOTS` only products of at least the rank of this one."""

    what: Remat
    least: Product | None = None

    @property
    def policy(self) -> Policy | None:
        """For `jax.checkpoint`; None: no checkpoint."""
        if self.what is Remat.NONE:
            return None
        if self.what is Remat.FULL:
            return jax.checkpoint_policies.nothing_saveable
        return is_product if self.least is None else self._keeps

    def _keeps(self, primitive: Any, *arrays: Any, **settings: Any) -> bool:
        assert self.least is not None
        return is_product(primitive, *arrays, **settings) and (
            Product.of(primitive, *arrays[:2], **settings).rank >= self.least.rank
        )

    def __str__(self) -> str:
        if self.least is None:
            return self.what.value
        return f"products of {self.least.cost:g} FLOPs a byte (those up to {self.least.size} bytes) or more"

    def to_json(self) -> list:
        """As `from_json` takes it."""
        return [self.what.value, None if self.least is None else list(self.least)]

    @classmethod
    def from_json(cls, found: list) -> "Keep":
        """Raises ValueError or TypeError for what `to_json` does not write."""
        what, least = found
        if what == Remat.AUTO:
            raise ValueError("a choice is none, dots or full")
        return cls(Remat(what), None if least is None else Product(*least))


def recorder(products: set[Product]) -> Policy:
    """A policy that keeps all products and adds them to `products`."""

    def policy(primitive: Any, *arrays: Any, **settings: Any) -> bool:
        keeps = is_product(primitive, *arrays, **settings)
        if keeps:
            products.add(Product.of(primitive, *arrays[:2], **settings))
        return keeps

    return policy
