"""From Flax NNX modules to the contract's parts: nested dicts of arrays beside pure functions."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models.axes import Axes
from models.contract import Batch, Params, Part
from models.paths import nested


def part(make: Callable[[nnx.Rngs], nnx.Module], *, takes: tuple[str, ...] = ()) -> Part:
    """The part whose code is the NNX module that `make` builds; `takes` as in `Part`.

    Every parameter is an `nnx.Param(value, logical=dims)`, with `use=` where products alone meet it and `balanced=` if
    loads move it, and is named by its path of attributes. The module is called as `module(x, batch, axes)`.
    """
    build = lambda key: make(nnx.Rngs(params=key))
    definition, shapes = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    variables = dict(nnx.to_flat_state(shapes))

    def init(key: jax.Array) -> Params:
        return nested({path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(build(key)))})

    def apply(params: Params, x: Any, batch: Batch, axes: Axes) -> Any:
        values = [(path, v.replace(functools.reduce(operator.getitem, path, params))) for path, v in variables.items()]
        return nnx.merge(definition, nnx.from_flat_state(values))(x, batch, axes)

    told = lambda key: {path: v.get_metadata().get(key) for path, v in variables.items()}
    uses = {path: use for path, use in told("use").items() if use}
    balanced = frozenset(path for path, so in told("balanced").items() if so)
    return Part(init, apply, nested(told("logical")), uses, balanced, takes)
