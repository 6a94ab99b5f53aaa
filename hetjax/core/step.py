"""What is alive between the tasks of a step, and what each task does with it."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hetjax.core import optimizer
from hetjax.core.alive import Alive
from hetjax.core.finish import Finish, Reduced, Scores
from hetjax.core.packing import Prepared
from hetjax.core.tasks import Kind, StageKey, Task, Thing, What
from hetjax.core.wiring import Tie
from models.contract import ROUTED
from models.paths import at, nested

Tree = Any
Trees = dict[StageKey, Tree]
Flags = Mapping[StageKey, tuple[jax.Array, jax.Array]]  # False and True on each stage's devices
Act = Callable[[Task], jax.Array | None]  # does a task; gives what is ready when it is through, or None
Doing = Mapping[Kind, Act]


class Gradients:
    """What is alive between the tasks that lead to a step's gradients."""

    def __init__(
        self, finish: Finish, flags: Flags, alive: Alive, microbatches: Sequence[Prepared], acc: Trees, count: float
    ) -> None:
        self.finish, self.flags, self.alive, self.microbatches, self.acc = finish, flags, alive, microbatches, acc
        self.wiring, self.seeds = finish.wiring, finish.seeds(count)
        self.leaving: dict[Task, dict[str, jax.Array]] = {}
        self.scores: dict[int, Scores] = collections.defaultdict(dict)
        self.grads = dict(acc)
        self.squares: dict[StageKey, jax.Array] = {}
        self.shared: dict[StageKey, jax.Array] = {}  # squares of what ties complete, by owner
        self.doing: Doing = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.WEIGHTS: self._weights,
            Kind.BOUNDARY: self._boundary,
            Kind.REDUCE: self._reduce,
            Kind.MEASURE: self._measure,
            Kind.TIE: self._tie,
            **dict.fromkeys((Kind.LEAVE, Kind.GONE, Kind.RETURN), alive.move),
        }

    def reduced(self) -> Reduced:
        """The outcome."""
        stages = self.finish.stages
        acc = {
            key: optimizer.merge(stages[key].parameters.repeated(mine), self.grads[key])
            for key, mine in self.acc.items()
        }
        squares = [*map(self.squares.get, self.finish.measured), *map(self.shared.get, self.finish.owners)]
        return Reduced(self.grads, acc, squares, self.alive)

    def _inputs(self, key: StageKey, i: int) -> dict[Thing, dict[str, jax.Array]]:
        """What has come to a stage for a microbatch, by where from."""
        sources = dict.fromkeys(link.source for link in self.wiring.sources_of(key, i))
        return {thing: self.alive[thing] for thing in (Thing(What.INPUTS, key, i, source) for source in sources)}

    def _forward(self, task: Task) -> jax.Array:
        key, i = task.stage, task.microbatch
        stage, inputs = self.wiring.stages[key], self._inputs(key, i)
        packed = self.wiring.place(key, self.microbatches[i])
        y, kept, done = stage.programs["forward"](self.alive[Thing(What.WEIGHTS, key)], _joined(inputs), packed)
        if stage.has_backward:
            self.alive[Thing(What.RESIDUALS, key, i)] = packed, kept
        else:
            self._drop(inputs)
        if stage.scores and not stage.ends_in_loss:
            self.scores[i][key[0]] = {k: y[k] for k in stage.scores}
        for link in self.wiring.links[key]:
            self.leaving[Task(Kind.BOUNDARY, key, i, link.target)] = y
        return done

    def _backward(self, task: Task) -> jax.Array:
        key, i = task.stage, task.microbatch
        inputs = self._inputs(key, i)
        # in the order of the stages, not of their arrival
        returned = [self.alive.pop(Thing(What.COTANGENTS, key, i, link.target)) for link in self.wiring.links[key]]
        acc, g_x, done, pairs = self.wiring.stages[key].programs["backward"](
            self.alive[Thing(What.WEIGHTS, key)],
            _joined(inputs),
            *self.alive.pop(Thing(What.RESIDUALS, key, i)),
            [*returned, *([self.seeds[key]] if key in self.seeds else [])],
            self.acc.get(key, {}),
            self._is_first(key, i),
        )
        self._drop(inputs)
        if key in self.acc:
            self.acc[key] = acc
        if pairs:
            self.alive[Thing(What.PAIRS, key, i)] = pairs
        if key == self.wiring.last:
            self.scores[i][key[0]], done = done, done["loss"]
        for link in self.wiring.sources_of(key, i):
            if self.wiring.stages[link.source].has_backward:
                g_y = {k: g_x[link.names[k]] for k in link.boundary.gradients}
                self.leaving[Task(Kind.BOUNDARY, key, i, link.source)] = g_y
        return done

    def _weights(self, task: Task) -> jax.Array:
        key, i = task.stage, task.microbatch
        pairs = self.alive.pop(Thing(What.PAIRS, key, i))
        program = self.wiring.stages[key].programs["weights"]
        self.acc[key], done = program(pairs, self.acc[key], self._is_first(key, i))
        return done

    def _is_first(self, key: StageKey, i: int) -> jax.Array:
        """On the stage's devices, whether a microbatch is the first of the step's that it is given."""
        return self.flags[key][i == self.wiring.stages[key].plan.share.replica]

    def _drop(self, things: Mapping[Thing, Tree]) -> None:
        for thing in things:
            self.alive.pop(thing)

    def _boundary(self, task: Task) -> jax.Array | None:
        assert task.to is not None
        between, (key, i, to) = self.wiring.between, (task.stage, task.microbatch, task.to)
        arrays = self.leaving.pop(task, None)  # None: those of another process
        if link := between.get((key, to)):
            thing, moved = Thing(What.INPUTS, to, i, key), link.forward(arrays)
        else:
            thing, moved = Thing(What.COTANGENTS, to, i, key), between[to, key].boundary.backward(arrays)
        if to not in self.wiring.mine:
            return None
        self.alive[thing] = moved
        return next(iter(moved.values()), None)

    def _reduce(self, task: Task) -> jax.Array:
        key = task.stage
        reduced, self.squares[key] = self.wiring.stages[key].programs["reduce"](self.acc[key])
        self.grads[key] = optimizer.merge(reduced, self.acc[key])
        return self.squares[key]

    def _measure(self, task: Task) -> jax.Array:
        key = task.stage
        self.grads[key] = self.acc[key]
        self.squares[key] = self.wiring.stages[key].programs["measure"](self.acc[key])
        return self.squares[key]

    def _tie(self, task: Task) -> None:
        """The gradients of a copy's leaves, added to the owner's; where it is the last copy's, they are complete.

        One copy's at a time, since the owner's devices have room for no more."""
        mine = self.wiring.mine
        for tie in self.finish.trained_ties:
            if (tie.copy, tie.owner) == (task.stage, task.to) and tie.gradients is not None:
                jax.block_until_ready(self.shared.get(tie.owner))
                given = tie.gradients.forward(self.grads[tie.copy] if tie.copy in mine else None)
                if tie.owner in mine:
                    owners = {path: at(self.grads[tie.owner], path) for path in given}
                    total, self.shared[tie.owner] = self.finish.add[tie.owner](owners, given)
                    self.grads[tie.owner] = optimizer.merge(nested(total), self.grads[tie.owner])


class Update:
    """What is alive between the tasks from a step's gradients to its new parameters."""

    def __init__(
        self,
        finish: Finish,
        alive: Alive,
        reduced: Reduced,
        scores: list[Scores],
        count: float,
        learning_rate: float,
    ) -> None:
        self.finish, self.alive, self.reduced, self.scores = finish, alive, reduced, scores
        self.scalars = finish.scalars(count, learning_rate)
        self.decisions: dict[StageKey, jax.Array] = {}
        self.loads: dict[StageKey, jax.Array] = {}
        self.told: Tree = {}  # by the decision
        self.doing: Doing = {
            Kind.DECIDE: self._decide,
            Kind.UPDATE: self._update,
            Kind.TIE: self._tie,
            **dict.fromkeys((Kind.LEAVE, Kind.GONE, Kind.RETURN), alive.move),
        }

    def _decide(self, task: Task) -> jax.Array:
        """From squares and scores, which every device of a stage has, on one device; the decision to all."""
        finish = self.finish
        self.told, decision = finish.decide(finish.parts(self.reduced.squares, self.scores), self.scalars)
        self.decisions = finish.spread(decision)
        for name, spread in finish.spread_loads.items():
            self.loads |= spread(self.told[ROUTED][name])
        return self.told["loss"]

    def _update(self, task: Task) -> None:
        key, mine = task.stage, self.finish.moved[task.stage].parameters
        weights, masters, state = (Thing(what, key) for what in (What.WEIGHTS, What.MASTERS, What.STATE))
        old = self.alive[weights]
        given = mine.all_of(self.alive[masters], old), self.alive[state], mine.moving_of(old)
        program, loads = self.finish.moved[key].programs["update"], [self.loads[key]] if key in self.loads else []
        decided = self.decisions[key], loads
        params, self.alive[state], moved = program(*given, self.reduced.grads.get(key, {}), *decided)
        self.alive[masters] = mine.masters(params)
        self.alive[weights] = mine.working.assemble(params, optimizer.merge(moved, old))

    def _tie(self, task: Task) -> None:
        """The new values of an owner's leaves, to the copy."""
        for tie in self.finish.trained_ties:
            if (tie.owner, tie.copy) == (task.stage, task.to):
                owner, copy = (Thing(What.WEIGHTS, key) for key in (tie.owner, tie.copy))
                here = [
                    self.alive[thing] if thing.stage in self.finish.wiring.mine else None for thing in (owner, copy)
                ]
                if (weights := lent(tie, *here)) is not None:
                    self.alive[copy] = weights


def lent(tie: Tie, owner: Tree | None, copy: Tree | None) -> Tree | None:
    """The copy's working weights, with those of the owner's. None: they are another process's."""
    values = tie.values.forward(owner)
    return None if copy is None else optimizer.merge(nested(values), copy)


def _joined(inputs: Mapping[Thing, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    return {name: array for arrays in inputs.values() for name, array in arrays.items()}
