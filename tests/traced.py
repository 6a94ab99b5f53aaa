"""Which collectives a stage's programs have, found in what jax traces: what is written, before XLA changes it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval

from hetjax.core.stage import Stage

COLLECTIVES = ("psum", "pmax", "all_gather", "reduce_scatter", "all_to_all", "ppermute")


class Collective(NamedTuple):
    """One of a program, on one device."""

    kind: str
    axes: tuple[str, ...]  # of several devices
    dtype: str
    shape: tuple[int, ...]  # of what the device brings
    size: int  # elements of its largest side
    times: int  # how often it runs; those of a loop whose length is not known count once


def collectives(stage: Stage, program: str) -> list[Collective]:
    """Those of a program that is not compiled yet, but for those over axes of one device."""
    _, function, args = stage.thunks(evaluate=True)[program].args  # type: ignore[attr-defined]
    closed = jax.make_jaxpr(function)(*args)
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    several = {axis for axis, size in stage.plan.mesh.shape.items() if size > 1}
    all_ = (c._replace(axes=tuple(axis for axis in c.axes if axis in several)) for c in _within(used, 1))
    return [found for found in all_ if found.axes]


def _within(jaxpr: Any, times: int) -> Iterator[Collective]:
    for equation in jaxpr.eqns:
        kind = equation.primitive.name.removesuffix("_invariant")
        if kind in COLLECTIVES:
            axes = equation.params.get("axes", equation.params.get("axis_name"))
            for given, made in zip(equation.invars, equation.outvars, strict=True):
                size = max(math.prod(given.aval.shape), math.prod(made.aval.shape))
                yield Collective(kind, tuple(axes), str(given.aval.dtype), tuple(given.aval.shape), size, times)
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from _within(body, inner)
