"""The end of a step: one reduction per gradient, one norm over all modules, one decision, one update per stage.

Each gradient's sum of squares comes from the pass that reduces it; that of a tied leaf from the addition that completes
it. A sum that is not finite tells of a gradient that is not. These sums and the decision travel between meshes as
device arrays; the host never waits. A step whose gradients or loss are not finite changes nothing anywhere:
parameters, optimizer state and its counts stay as they were, in every module.
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
    module_squares: dict[str, list[jax.Array]]  # sums of squares of gradients, an array of leaves per stage and tie
    ok: jax.Array  # False: the step was skipped
    host: HostTimes  # of the pass over the schedule


class Tie(NamedTuple):
    """A leaf held by two stages: the owner's, and a copy in the module's last stage."""

    owner: StageKey
    copy: StageKey
    owner_path: tuple[str, str]
    copy_path: tuple[str, str]
    gradient: Boundary | None  # copy -> owner; None: it is frozen
    value: Boundary  # owner -> copy, of the working weight


class Reduced(NamedTuple):
    """The step's gradients, sharded over the data replicas."""

    grads: dict[StageKey, Tree]
    acc: dict[StageKey, Tree]  # accumulators of the next step; of a stage with one replica, the gradients themselves
    squares: list[jax.Array]  # of each stage's complete leaves, then of each tie's


class Finish:
    """Programs of the step's end for all stages of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.stages = {k: s for k, s in pipeline.stages.items() if s.parameters.trains}
        self.ties = [tie for key, stage in pipeline.stages.items() for tie in self._ties(key, stage)]
        self.trained_ties = [tie for tie in self.ties if tie.gradient is not None]
        self.home = pipeline.stages[pipeline.last].plan.mesh.devices.flat[0]
        self.dtype = jnp.promote_types(next(iter(self.stages.values())).parameters.dtype, jnp.float32)
        self.paths = self._paths()
        self._add: dict[StageKey, Any] = {}
        self._decide: Any = None

    def _ties(self, key: StageKey, stage: Stage) -> list[Tie]:
        found = []
        mine, owner_key = stage.parameters, (key[0], 0)
        owner = self.pipeline.stages[owner_key].parameters
        for part, leaf in sorted(mine.borrowed):
            path, gradient = ("first", mine.tied[leaf]), None
            if leaf in mine.trainable.get(part, {}):
                gradient = Boundary({"x": mine.grads[part][leaf]}, {"x": _get(owner.grads, path).sharding})
            value = Boundary({"x": _get(owner.weights, path)}, {"x": mine.weights[part][leaf].sharding})
            found.append(Tie(owner_key, key, path, (part, leaf), gradient, value))
        return found

    def thunks(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, function that compiles it) of every program."""
        found: list[tuple[str, Callable[[], object]]] = [("decide", self._compile_decide)]
        for tie in self.ties:
            for direction in (tie.gradient, tie.value):
                found += [(f"tied {tie.owner[0]} {n}", thunk) for n, thunk in direction.programs()] if direction else []
        for tie in self.trained_ties:
            found.append((f"tied {tie.owner[0]} add", functools.partial(self._compile_add, tie)))
        return found

    def _paths(self) -> list[tuple[str, list[str]]]:
        """(module, paths of the gradients) for each array of `Reduced.squares`."""
        complete = {key: stage.parameters.complete(stage.parameters.grads) for key, stage in self.stages.items()}
        lent = [(tie.owner[0], ["/".join((tie.owner[0], *tie.owner_path))]) for tie in self.trained_ties]
        leaves = jax.tree_util.tree_leaves_with_path
        return [
            (key[0], [optimizer.path_of(key[0], p) for p, _ in leaves(tree)]) for key, tree in complete.items()
        ] + lent

    def _compile_add(self, tie: Tie) -> None:
        def add(mine: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
            total = mine + other
            return total, jnp.sum(jnp.square(total.astype(self.dtype)))[None]

        leaf = self.stages[tie.owner].parameters.grads["first"][tie.owner_path[1]]
        out = leaf.sharding, NamedSharding(self.stages[tie.owner].plan.mesh, P())
        self._add[tie.owner] = jax.jit(add, out_shardings=out, donate_argnums=0).lower(leaf, leaf).compile()

    def _compile_decide(self) -> None:
        clip = self.pipeline.spec.optimizer.clip_norm

        def decide(squares: list, losses: list, count: jax.Array) -> tuple[jax.Array, ...]:
            loss = jnp.stack(losses).sum() / count
            norm = jnp.sqrt(jnp.concatenate(squares).sum())
            scale = optimizer.clip_scale(norm, clip)
            return loss, norm, scale, jnp.isfinite(norm) & jnp.isfinite(loss)

        scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=SingleDeviceSharding(self.home))
        loss = self.pipeline.stages[self.pipeline.last].ends["loss"].dtype
        losses = [scalar(loss)] * self.pipeline.spec.num_microbatches
        squares = [
            jax.ShapeDtypeStruct((len(paths),), self.dtype, sharding=SingleDeviceSharding(self.home))
            for _, paths in self.paths
        ]
        args = (squares, losses, scalar(loss))
        self._decide = jax.jit(decide).lower(*args).compile()

    def reduce(self, acc: dict[StageKey, Tree]) -> Reduced:
        """The gradients of the step. `acc` is consumed."""
        grads, squares = dict(acc), []
        for key, stage in self.stages.items():
            if stage.parameters.num_replicas > 1:
                grads[key], of_stage = stage.programs["reduce"](acc[key])
            else:
                of_stage = stage.programs["measure"](acc[key])
            squares.append(of_stage)
        for tie in self.trained_ties:
            assert tie.gradient is not None
            leaf = tie.gradient.forward({"x": _get(grads[tie.copy], tie.copy_path)})["x"]
            total, square = self._add[tie.owner](_get(grads[tie.owner], tie.owner_path), leaf)
            grads[tie.owner] = _set(grads[tie.owner], tie.owner_path, total)
            squares.append(square)
        alone = {key: grads[key] for key, stage in self.stages.items() if stage.parameters.num_replicas == 1}
        return Reduced(grads, {**acc, **alone}, squares)

    def apply(
        self,
        params: dict[StageKey, Tree],
        states: dict[StageKey, Tree],
        weights: dict[StageKey, Tree],
        reduced: Reduced,
        losses: list[jax.Array],
        *,
        count: float,
        learning_rate: float,
        host: HostTimes,
    ) -> tuple[dict[StageKey, Tree], dict[StageKey, Tree], dict[StageKey, Tree], Outcome]:
        """New (params, optimizer states, working weights) and the outcome. The first three arguments are consumed.

        `losses` are the microbatches' loss sums, `count` the step's target tokens.
        """
        local = [x.addressable_shards[0].data for x in (*reduced.squares, *losses)]
        local = jax.device_put([*local, np.asarray(max(count, 1.0), losses[0].dtype)], SingleDeviceSharding(self.home))
        n = len(reduced.squares)
        loss, norm, scale, ok = self._decide(local[:n], local[n:-1], local[-1])
        module_squares: dict[str, list[jax.Array]] = {}
        for (name, _), squares in zip(self.paths, local[:n], strict=True):
            module_squares.setdefault(name, []).append(squares)
        params, states, weights = dict(params), dict(states), dict(weights)
        for key, stage in self.stages.items():
            everywhere = NamedSharding(stage.plan.mesh, P())
            rate = jax.device_put(np.asarray(learning_rate, self.dtype), everywhere)
            scalars = [_broadcast(v, everywhere) for v in (scale, ok)]
            grads = reduced.grads[key]
            old = stage.parameters.moving_of(weights[key])
            update = stage.programs["update"]
            params[key], states[key], new = update(params[key], states[key], old, grads, *scalars, rate)
            copies = optimizer.merge(new, weights[key])
            weights[key] = stage.parameters.working.assemble(params[key], copies)
        self._lend(weights, self.trained_ties)
        return params, states, weights, Outcome(loss, norm, module_squares, ok, host)

    def weights(self, params: Mapping[StageKey, Tree]) -> dict[StageKey, Tree]:
        """The working weights of these parameters."""
        found = {key: stage.weights(params[key]) for key, stage in self.pipeline.stages.items()}
        self._lend(found, self.ties)
        return found

    def _lend(self, weights: dict[StageKey, Tree], ties: list[Tie]) -> None:
        for tie in ties:
            value = tie.value.forward({"x": _get(weights[tie.owner], tie.owner_path)})["x"]
            weights[tie.copy] = _set(weights[tie.copy], tie.copy_path, value)

    def not_finite(self, outcome: Outcome) -> list[str]:
        """The paths of the gradients of a step that were not finite; waits for the devices."""
        squares = {name: iter(arrays) for name, arrays in outcome.module_squares.items()}
        found = []
        for name, paths in self.paths:
            finite = np.isfinite(next(squares[name]))
            found += [path for path, good in zip(paths, finite, strict=True) if not good]
        return found


def _get(tree: Mapping, path: tuple[str, str]) -> Any:
    return tree[path[0]][path[1]]


def _set(tree: Mapping, path: tuple[str, str], leaf: jax.Array) -> dict:
    return {**tree, path[0]: {**tree.get(path[0], {}), path[1]: leaf}}


def _broadcast(scalar: jax.Array, everywhere: NamedSharding) -> jax.Array:
    """A one-device scalar on every device of a mesh: one put per device, straight from the source."""
    copies = jax.device_put(
        [scalar] * everywhere.mesh.size, [SingleDeviceSharding(d) for d in everywhere.mesh.devices.flat]
    )
    return jax.make_array_from_single_device_arrays((), everywhere, copies)
