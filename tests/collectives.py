"""The collectives of a stage's programs, as they are traced: nothing is compiled."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import tiny

from hetjax.core.graph import Graph
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.stage import Stage
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer

EXCHANGES = {"psum", "psum_invariant", "pmax", "all_gather", "reduce_scatter", "all_to_all", "ppermute"}


class Collective(NamedTuple):
    """One that a device takes part in."""

    name: str  # of EXCHANGES
    axes: tuple[str, ...]  # of more than one device
    shape: tuple[int, ...]  # of what the device brings
    times: int  # how often, in the loops around it

    @property
    def elements(self) -> int:
        """What the device brings each time."""
        return math.prod(self.shape)


def traced(graph: Graph, shape: tiny.Shape, config: OptimizerConfig, **options: Any) -> dict[str, list[Collective]]:
    """Those of each program of a trainer, by "llm/0 backward"."""
    example = tiny.microbatches(shape, tuple(e.name for e in graph.encoders))[0]
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example.items()}
    sizes = dict(groups=shape.groups, num_microbatches=shape.microbatches)
    trainer = Trainer(TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=config, **sizes, **options))
    found: dict[str, list[Collective]] = {}

    def record(stage: Stage, name: str, function: Any, args: tuple, **_: Any) -> None:
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
        found[f"{stage.plan.module}/{stage.plan.index} {name}"] = list(_walk(jaxpr, dict(stage.plan.mesh.shape), 1))

    with mock.patch.object(Stage, "_compile", record):
        for stage in trainer.pipeline.stages.values():
            for thunk in stage.thunks(evaluate=False).values():
                thunk()
    return found


def _walk(jaxpr: Any, sizes: dict[str, int], times: int) -> Iterator[Collective]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in EXCHANGES:
            names = params.get("axes", params.get("axis_name"))
            axes = tuple(a for a in (names if isinstance(names, tuple) else (names,)) if sizes[a] > 1)
            if axes:
                yield from (Collective(name, axes, tuple(v.aval.shape), times) for v in equation.invars)
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner, sizes, times * (params["length"] if name == "scan" else 1))
