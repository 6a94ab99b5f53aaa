"""A step's end: one reduction per gradient, one norm over all modules, one decision, one update per stage.

Each gradient's sum of squares comes from the pass that reduces it; that of a tied leaf from the addition that completes
it. A sum that is not finite tells of a gradient that is not. These sums and the decision travel between meshes as
device arrays; the host never waits. A step whose gradients or loss are not finite changes nothing anywhere:
parameters, optimizer state and its counts stay as they were, in every module.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import optimizer, processes
from hetjax.core.alive import Alive
from hetjax.core.decision import Decision, Spreading
from hetjax.core.parameters import shardings
from hetjax.core.stage import Stage
from hetjax.core.tasks import HostTimes, StageKey
from hetjax.core.wiring import Wiring
from models.contract import AUXILIARY, ROUTED
from models.paths import Path, at

Tree = Any
# of a microbatch, by module: "loss", the sum over its targets, of the language model, and what a model tells beside
Scores = dict[str, dict[str, jax.Array]]


class Outcome(NamedTuple):
    """Device scalars of a step: read them one step late, and the host never blocks."""

    loss: jax.Array  # mean over the step's targets, and the mean of the microbatches' auxiliary losses
    norm: jax.Array  # global gradient norm before clipping
    module_squares: dict[str, list[jax.Array]]  # sums of squares of gradients, an array of leaves per stage and tie
    ok: jax.Array  # False: the step was skipped
    host: HostTimes  # of the pass over the schedule
    routed: dict[str, jax.Array]  # of modules with experts [their layers, experts]: how many of its tokens went to each
    auxiliary: jax.Array | None = None  # what of the loss is auxiliary


class Reduced(NamedTuple):
    """The step's gradients, sharded over the data replicas."""

    grads: dict[StageKey, Tree]
    acc: dict[StageKey, Tree]  # accumulators of the next step; of a leaf without replicas, the gradient itself
    squares: list[jax.Array | None]  # of each stage's complete leaves, then of each tie's; None: another process's
    alive: Alive  # the stages' working weights


class Finish:
    """What a pipeline runs behind its microbatches, beside the programs of its stages; `pipeline.py` dispatches it."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring, self.ties = wiring, wiring.ties
        self.trained_ties = [tie for tie in self.ties if tie.gradients is not None]
        self.owners = list(dict.fromkeys(tie.owner for tie in self.trained_ties))
        self.stages = {k: s for k, s in wiring.stages.items() if s.parameters.trains}
        complete = {k: s.parameters.complete(s.parameters.grads) for k, s in self.stages.items()}
        self.measured = {k: grads for k, grads in complete.items() if jax.tree.leaves(grads)}  # by their own programs
        self.moved = {k: s for k, s in wiring.stages.items() if s.parameters.moves}
        self.telling: dict[str, list[Stage]] = {}  # by module; of replicas each
        for (name, _), stage in wiring.stages.items():
            if stage.scores:
                self.telling.setdefault(name, []).append(stage)
        self.home = _first_device(wiring.stages[wiring.last])  # where it is decided
        self.dtype = jnp.promote_types(next(iter(self.stages.values())).parameters.dtype, jnp.float32)
        self.paths = self._paths()
        here = {k: NamedSharding(s.plan.mesh, P()) for k, s in self.moved.items() if k in wiring.mine}
        self.spread = Spreading(jax.ShapeDtypeStruct((3,), self.dtype), here)
        balanced = {key: where for key, where in here.items() if self.moved[key].parameters.loads}
        self.spread_loads = {
            name: Spreading(
                jax.ShapeDtypeStruct(self._scores[name][ROUTED].shape, self.dtype),
                {key: where for key, where in balanced.items() if key[0] == name},
            )
            for name in dict.fromkeys(name for name, _ in balanced)
        }
        self.add: dict[StageKey, Any] = {}  # (gradients of the owner, of a copy) -> (sums, sums of their squares)
        self.decide = self._decision()  # (parts, [count, rate]) -> (fields of the outcome, decision)

    def seeds(self, count: float) -> dict[StageKey, dict[str, jax.Array]]:
        """What the step's loss is, with `count` target tokens, of each of the scores of a microbatch: the cotangents
        with which its backwards begin, by stage."""
        shares = {"loss": 1.0 / max(count, 1.0), AUXILIARY: 1.0 / self.wiring.spec.num_microbatches, ROUTED: 0.0}
        made = lambda key, a: processes.placed(np.full(a.shape, shares[key], a.dtype), a.sharding)
        return {
            key: {k: made(k, a) for k, a in stage.ends.items() if k in stage.scores}
            for key, stage in self.wiring.stages_here.items()
            if stage.has_backward and stage.scores
        }

    def by_module(self, squares: list[jax.Array]) -> dict[str, list[jax.Array]]:
        """Arrays of `Reduced.squares`."""
        found: dict[str, list[jax.Array]] = {}
        for (name, _), of_stage in zip(self.paths, squares, strict=True):
            found.setdefault(name, []).append(of_stage)
        return found

    def thunks(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, function that compiles it) of every program."""
        found: list[tuple[str, Callable[[], object]]] = [("decide", self.decide.compile)]
        for tie in self.ties:
            for way in (tie.gradients, tie.values):
                found += [(f"tied {tie.owner[0]} {n}", thunk) for n, thunk in way.boundary.programs()] if way else []
        for owner in self.owners:
            if owner in self.wiring.mine:
                found.append((f"tied {owner[0]} add", functools.partial(self._compile_add, owner)))
        return found

    def lent(self, owner: StageKey) -> dict[Path, jax.ShapeDtypeStruct]:
        """The gradients of an owner to which copies add theirs."""
        mine = self.stages[owner].parameters
        return {path: at(mine.grads, path) for path in sorted(mine.lent) if at(mine.grads, path) is not None}

    def _paths(self) -> list[tuple[str, list[str]]]:
        """(module, paths of the gradients) for each array of `Reduced.squares`."""
        lent = [(key[0], ["/".join((key[0], *path)) for path in self.lent(key)]) for key in self.owners]
        leaves = jax.tree_util.tree_leaves_with_path
        return [
            (key[0], [optimizer.path_of(key[0], p) for p, _ in leaves(tree)]) for key, tree in self.measured.items()
        ] + lent

    def _compile_add(self, owner: StageKey) -> None:
        def add(mine: Tree, others: Tree) -> tuple[Tree, jax.Array]:
            total = jax.tree.map(jnp.add, mine, others)
            return total, jnp.stack([jnp.sum(jnp.square(a.astype(self.dtype))) for a in jax.tree.leaves(total)])

        leaves = self.lent(owner)
        out = shardings(leaves), NamedSharding(self.stages[owner].plan.mesh, P())
        self.add[owner] = jax.jit(add, out_shardings=out, donate_argnums=0).lower(leaves, leaves).compile()

    def _decision(self) -> Decision:
        spec, sink = self.wiring.spec, self.wiring.last[0]
        structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), [self._scores] * spec.num_microbatches)
        of_scores = jax.tree.structure(structs)

        def decide(parts: list[jax.Array], scalars: jax.Array) -> tuple[dict[str, Any], jax.Array]:
            squares, scores = parts[: len(self.paths)], jax.tree.unflatten(of_scores, parts[len(self.paths) :])
            total = jax.tree.map(lambda *parts: jnp.stack(parts).sum(0), *scores)
            loss = total[sink]["loss"]
            count, rate = scalars[0].astype(loss.dtype), scalars[1].astype(self.dtype)
            loss = loss / count
            told: dict[str, Any] = {
                ROUTED: {n: of[ROUTED].astype(self.dtype) for n, of in total.items() if ROUTED in of}
            }
            if losses := [of[AUXILIARY].astype(loss.dtype) for of in total.values() if AUXILIARY in of]:
                told[AUXILIARY] = sum(losses) / len(scores)
                loss += told[AUXILIARY]
            norm = jnp.sqrt(jnp.concatenate(squares).sum())
            ok = jnp.isfinite(norm) & jnp.isfinite(loss)
            scale = optimizer.clip_scale(norm, spec.optimizer.clip_norm)
            told |= {"loss": loss, "norm": norm, "ok": ok, "squares": squares}
            return told, jnp.stack([scale, ok.astype(self.dtype), rate])

        squares = [jax.ShapeDtypeStruct((len(paths),), self.dtype) for _, paths in self.paths]
        measured = [self.stages[key] for key in (*self.measured, *self.owners)]
        teller = lambda name, i: self.telling[name][i % len(self.telling[name])]
        told_by = [
            {name: dict.fromkeys(of, teller(name, i)) for name, of in self._scores.items()}
            for i in range(spec.num_microbatches)
        ]
        sources = [*measured, *jax.tree.leaves(told_by)]
        home = SingleDeviceSharding(self.home)
        rest = (jax.ShapeDtypeStruct((2,), self.scalars(0, 0).dtype, sharding=home),)
        return Decision(
            decide,
            [*squares, *jax.tree.leaves(structs)],
            list(map(_first_device, sources)),
            rest,
            home=self.home,
            everywhere=spec.devices,
        )

    @property
    def _scores(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        return {name: stages[0].scores for name, stages in self.telling.items()}

    def parts(self, squares: list[jax.Array | None], scores: list[Scores]) -> list[jax.Array | None]:
        """What `decide` takes: arrays of this process as they lie on their stages' first devices, None for others."""
        none = {name: dict.fromkeys(of) for name, of in self._scores.items()}
        told = jax.tree.leaves([{**none, **of_one} for of_one in scores], is_leaf=lambda x: x is None)
        return [None if a is None else a.addressable_data(0) for a in (*squares, *told)]

    def outcome(self, told: Tree, host: HostTimes) -> Outcome:
        """What a decision tells of the step."""
        rest = {k: v for k, v in told.items() if k != "squares"}
        return Outcome(**rest, module_squares=self.by_module(told["squares"]), host=host)

    def scalars(self, count: float, rate: float) -> np.ndarray:
        """The step's target tokens and its learning rate, as `decide` takes them."""
        loss = self.wiring.stages[self.wiring.last].ends["loss"]
        return np.array([max(count, 1.0), rate], jnp.promote_types(self.dtype, loss.dtype))

    def not_finite(self, outcome: Outcome) -> list[str]:
        """The paths of the gradients of a step that were not finite; waits for the devices."""
        squares = {name: iter(arrays) for name, arrays in outcome.module_squares.items()}
        found = []
        for name, paths in self.paths:
            finite = np.isfinite(next(squares[name]))
            found += [path for path, good in zip(paths, finite, strict=True) if not good]
        return found


def _first_device(stage: Stage) -> jax.Device:
    return stage.plan.mesh.devices.flat[0]
