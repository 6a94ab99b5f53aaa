"""The end of a step: one reduction per gradient, one norm over all modules, one decision, one update per stage.

Norms and flags travel between meshes as device scalars; the host never waits. A step whose gradients or loss are not
finite changes nothing anywhere: parameters, optimizer state and its counts stay as they were, in every module.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import optimizer
from hetjax.core.boundary import Boundary
from hetjax.core.pipeline import HostTimes, Pipeline, StageKey
from hetjax.core.stage import Stage

Tree = Any


class Outcome(NamedTuple):
    """Device scalars of a step: read them one step late, and the host never blocks."""

    loss: jax.Array  # mean over the step's targets
    norm: jax.Array  # global gradient norm before clipping
    module_squares: dict[str, list[jax.Array]]  # squared gradient norms, one per stage
    ok: jax.Array  # False: the step was skipped
    finite: dict[StageKey, jax.Array]  # a flag per gradient leaf
    host: HostTimes  # of the pass over the schedule


class Tie(NamedTuple):
    """A leaf held by two stages: the owner's, and a copy in the module's last stage."""

    owner: StageKey
    copy: StageKey
    owner_path: tuple[str, str]
    copy_path: tuple[str, str]
    gradient: Boundary  # copy -> owner
    value: Boundary  # owner -> copy


class Finish:
    """Programs of the step's end for all stages of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.stages = {k: s for k, s in pipeline.stages.items() if s.parameters.trains}
        self.ties = [tie for key, stage in self.stages.items() for tie in self._ties(key, stage)]
        self.home = pipeline.stages[pipeline.last].plan.mesh.devices.flat[0]
        self.dtype = jnp.promote_types(next(iter(self.stages.values())).parameters.dtype, jnp.float32)
        self._measure: dict[StageKey, Any] = {}
        self._add: dict[StageKey, Any] = {}
        self._decide: Any = None

    def _ties(self, key: StageKey, stage: Stage) -> list[Tie]:
        found = []
        mine = stage.parameters
        for part, leaf in sorted(mine.borrowed):
            owner_key = (key[0], 0)
            if leaf not in mine.trainable.get(part, {}):
                continue
            owner, source = self.stages[owner_key], mine.tied[leaf]
            grad, weight = mine.grads[part][leaf], mine.params[part][leaf]
            to = owner.parameters.grads["first"][source].sharding
            back = owner.parameters.params["first"][source]
            found.append(
                Tie(
                    owner_key,
                    key,
                    ("first", source),
                    (part, leaf),
                    Boundary({"x": grad}, {"x": to}),
                    Boundary({"x": back}, {"x": weight.sharding}),
                )
            )
        return found

    def thunks(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, function that compiles it) of every program."""
        found: list[tuple[str, Callable[[], object]]] = [
            (f"{m}/{i} measure", functools.partial(self._compile_measure, (m, i))) for m, i in self.stages
        ]
        found.append(("decide", self._compile_decide))
        for tie in self.ties:
            for direction in (tie.gradient, tie.value):
                found += [(f"tied {tie.owner[0]} {n}", thunk) for n, thunk in direction.programs()]
            found.append((f"tied {tie.owner[0]} add", functools.partial(self._compile_add, tie)))
        return found

    def _compile_measure(self, key: StageKey) -> None:
        def measure(grads: Tree) -> tuple[jax.Array, jax.Array]:
            return optimizer.squared_norm(grads).astype(self.dtype), optimizer.finite_flags(grads)

        stage = self.stages[key]
        out = NamedSharding(stage.plan.mesh, P())
        grads = stage.parameters.owned(stage.parameters.grads)
        self._measure[key] = jax.jit(measure, out_shardings=(out, out)).lower(grads).compile()

    def _compile_add(self, tie: Tie) -> None:
        leaf = self.stages[tie.owner].parameters.grads["first"][tie.owner_path[1]]
        self._add[tie.owner] = (
            jax.jit(jnp.add, out_shardings=leaf.sharding, donate_argnums=0).lower(leaf, leaf).compile()
        )

    def _compile_decide(self) -> None:
        clip = self.pipeline.spec.optimizer.clip_norm

        def decide(squares: list, losses: list, count: jax.Array) -> tuple[jax.Array, ...]:
            loss = jnp.stack(losses).sum() / count
            norm = jnp.sqrt(jnp.stack(squares).sum())
            scale = optimizer.clip_scale(norm, clip)
            return loss, norm, scale, jnp.isfinite(norm) & jnp.isfinite(loss)

        scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=SingleDeviceSharding(self.home))
        loss = self.pipeline.stages[self.pipeline.last].y["loss"].dtype
        losses = [scalar(loss)] * self.pipeline.spec.num_microbatches
        args = ([scalar(self.dtype)] * len(self.stages), losses, scalar(loss))
        self._decide = jax.jit(decide).lower(*args).compile()

    def reduce(self, acc: dict[StageKey, Tree]) -> tuple[dict[StageKey, Tree], dict[StageKey, Tree]]:
        """(gradients of the step, sharded over the data replicas; the accumulators, emptied). `acc` is consumed."""
        both = {key: stage.programs["reduce"](acc[key]) for key, stage in self.stages.items()}
        grads = {key: pair[0] for key, pair in both.items()}
        for tie in self.ties:
            leaf = tie.gradient.forward({"x": _get(grads[tie.copy], tie.copy_path)})["x"]
            total = self._add[tie.owner](_get(grads[tie.owner], tie.owner_path), leaf)
            grads[tie.owner] = _set(grads[tie.owner], tie.owner_path, total)
        return grads, {key: pair[1] for key, pair in both.items()}

    def apply(
        self,
        params: dict[StageKey, Tree],
        states: dict[StageKey, Tree],
        grads: dict[StageKey, Tree],
        losses: list[jax.Array],
        *,
        count: float,
        learning_rate: float,
        host: HostTimes,
    ) -> tuple[dict[StageKey, Tree], dict[StageKey, Tree], Outcome]:
        """New (params, optimizer states) and the outcome. The first two arguments are consumed.

        `losses` are the microbatches' loss sums, `count` the step's target tokens.
        """
        squares, finite = {}, {}
        for key, stage in self.stages.items():
            squares[key], finite[key] = self._measure[key](stage.parameters.owned(grads[key]))
        local = [x.addressable_shards[0].data for x in (*squares.values(), *losses)]
        local = jax.device_put([*local, np.asarray(max(count, 1.0), losses[0].dtype)], SingleDeviceSharding(self.home))
        n = len(squares)
        loss, norm, scale, ok = self._decide(local[:n], local[n:-1], local[-1])
        module_squares: dict[str, list[jax.Array]] = {}
        for (name, _), square in zip(squares, local[:n], strict=True):
            module_squares.setdefault(name, []).append(square)
        params, states = dict(params), dict(states)
        for key, stage in self.stages.items():
            everywhere = NamedSharding(stage.plan.mesh, P())
            rate = jax.device_put(np.asarray(learning_rate, self.dtype), everywhere)
            scalars = [_broadcast(v, everywhere) for v in (scale, ok)]
            params[key], states[key] = stage.programs["update"](params[key], states[key], grads[key], *scalars, rate)
        for tie in self.ties:
            value = tie.value.forward({"x": _get(params[tie.owner], tie.owner_path)})["x"]
            params[tie.copy] = _set(params[tie.copy], tie.copy_path, value)
        return params, states, Outcome(loss, norm, module_squares, ok, finite, host)

    def not_finite(self, outcome: Outcome) -> list[str]:
        """The paths of the gradients of a step that were not finite; waits for the devices."""
        found = []
        for key, stage in self.stages.items():
            leaves = jax.tree_util.tree_leaves_with_path(stage.parameters.owned(stage.parameters.grads))
            for (path, _), good in zip(leaves, np.asarray(outcome.finite[key]), strict=True):
                if not good:
                    found.append(optimizer.path_of(key[0], path))
        return found


def _get(tree: Mapping, path: tuple[str, str]) -> jax.Array:
    return tree[path[0]][path[1]]


def _set(tree: Mapping, path: tuple[str, str], leaf: jax.Array) -> dict:
    return {**tree, path[0]: {**tree[path[0]], path[1]: leaf}}


def _broadcast(scalar: jax.Array, everywhere: NamedSharding) -> jax.Array:
    """A one-device scalar on every device of a mesh: one put per device, straight from the source."""
    copies = jax.device_put(
        [scalar] * everywhere.mesh.size, [SingleDeviceSharding(d) for d in everywhere.mesh.devices.flat]
    )
    return jax.make_array_from_single_device_arrays((), everywhere, copies)
