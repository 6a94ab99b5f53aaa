"""Which products of a layer leave their weights' gradients to another program, and what they leave for it.

A backward that is split (arXiv:2401.10241) takes no gradient of a weight that enters one product: it gives that
product's pair (`models/weight.py`), its input and the cotangent of its output, and the other half makes the gradient of
these. What a pair looks like is known from one abstract run of the layer, in which products tell.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.axes import vary
from models.contract import Params
from models.paths import Path, flat
from models.weight import Make, Pair

Tree = Any
CALLS = frozenset({"remat2", "checkpoint", "jit", "pjit", "closed_call"})
CASTS = frozenset({"pvary", "pcast"})
PRODUCT = "custom_vjp_call"


class Paired(NamedTuple):
    """A product with a pair: its weights in the order of their columns, how their gradients come of a pair, and the
    types of its arrays."""

    paths: tuple[Path, ...]
    make: Make
    like: Pair

    @property
    def path(self) -> Path:
        """Of the weight that has the pair."""
        return self.paths[0]

    def zeros(self, *lead: int) -> Pair:
        """The pair itself, or the cotangents that come of it, stacked over repetitions if `lead` says how many."""

        def stacked(like: Any) -> jax.Array:
            return vary(jnp.zeros((*lead, *like.shape), like.dtype), like.manual_axis_type.varying)

        return jax.tree.map(stacked, self.like)

    def gradients(self, pair: Pair) -> dict[Path, jax.Array]:
        """Of its weights, by path; they vary as the pair does."""
        return dict(zip(self.paths, self.make(pair), strict=True))

    def is_made_by(self, equation: Any) -> bool:
        """Whether an equation is this very product, and not a loop, a batch or a function with a VJP of its own that
        has it inside."""
        if equation.primitive.name != PRODUCT or self.like.x.shape not in [atom.aval.shape for atom in equation.invars]:
            return False
        return PRODUCT not in [inside.primitive.name for inside in _inside(equation, "call_jaxpr").eqns]


class Telling:
    """An abstract run of a layer, in which its products tell about themselves."""

    def __init__(self) -> None:
        self._found: list[Paired] = []

    def tell(self, paths: tuple[Path, ...], make: Make, like: Pair) -> None:
        """See `Told` in `models/weight.py`."""
        self._found.append(Paired(paths, make, jax.tree.map(jax.typeof, like)))

    def run(self, layer: Callable[[Any, Tree], Tree], given: tuple[Params, ...], carry: Tree) -> tuple[Paired, ...]:
        """The products of a layer that can leave gradients for later: each computed once, of weights that no other
        takes. `given`: taps and other parameters by path, and what else `layer` is given beside the carry."""
        jaxpr = jax.make_jaxpr(layer)(given, carry).jaxpr
        taps = dict(zip(sorted(flat(given[0])), jaxpr.invars, strict=False))

        def is_alone(paired: Paired) -> bool:
            takers = [list(_takers(jaxpr, taps[path])) for path in paired.paths]
            return all(len(found) == 1 and paired.is_made_by(found[0]) for found in takers)

        return tuple(filter(is_alone, self._found))


def _takers(jaxpr: Any, variable: Any) -> Iterator[Any]:
    """The equations that take a variable, however it comes to them."""
    for equation in jaxpr.eqns:
        for place, atom in enumerate(equation.invars):
            if atom is not variable:
                continue
            if equation.primitive.name in CASTS:
                yield from _takers(jaxpr, equation.outvars[0])
            elif equation.primitive.name in CALLS:
                inside = _inside(equation, "jaxpr")
                yield from _takers(inside, inside.invars[place])
            else:
                yield equation


def _inside(equation: Any, name: str) -> Any:
    jaxpr = equation.params[name]
    return getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
