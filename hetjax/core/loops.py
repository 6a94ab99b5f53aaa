"""The layers of a stage as loops over their stacked weights, forwards and backwards, as one device runs them.

A run's forward scan takes the VJP of one layer and keeps what the layer's backward needs; the backward scans the layers
from the last to the first and adds each one's gradients to its rows of the accumulators. The gradients of all layers
never exist together. Under ZeRO-3 neither do their weights: a loop has those of the layer that is its turn, and gathers
the next one's beside its work.

Where the backward is split, that scan leaves pairs (`pairs.py`), and another one makes the weights' gradients of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hetjax.core import accumulators, in_turn, optimizer, remat, residuals, stacks
from hetjax.core.graph import Module
from hetjax.core.pairs import Paired, Telling
from hetjax.core.parameters import Parameters
from hetjax.core.plan import StagePlan
from hetjax.core.remat import Policy
from hetjax.core.residuals import Kept
from hetjax.core.stacks import LAYERS, Run
from models.axes import sum_like
from models.contract import Batch, Params
from models.layers import wide
from models.paths import Path, flat, nested
from models.weight import Pair, Tell

Tree = Any


class Turn(NamedTuple):
    """A layer of a run: its place in the period, and which repetition of it."""

    place: int
    i: jax.Array | int


class Back(NamedTuple):
    """What the backward of a run gives to that of the one before it."""

    g: Tree  # cotangent of the carry
    entered: dict[str, jax.Array]  # sums of the cotangents of what enters layers, over those that were gone through
    acc: Tree  # accumulators of the stage's layers


Pairs = list[dict[Path, Pair]]  # by place of a run's period, by path; with a dim over repetitions, if it has several


class Loops:
    """The layers of one stage. `policy`: which inner results of a layer are kept; None: all. `wanted`: the names of
    what enters layers of which a cotangent is wanted, among others. `splits`: gradients of weights are made by
    `gradients`, of what `backward` leaves for it, where they can be."""

    def __init__(
        self,
        module: Module,
        plan: StagePlan,
        parameters: Parameters,
        policy: Policy | None,
        wanted: frozenset[str],
        *,
        splits: bool,
    ) -> None:
        self.layers = module.definition.layers[plan.lo : plan.hi]
        self.runs = stacks.runs(self.layers, unroll=module.unroll)
        self.takes = sorted({name for part in self.layers for name in part.takes})
        self._wanted = [name for name in self.takes if name in wanted]
        self._axes, self._data, self._working, self._policy = plan.axes, plan.grid.data, parameters.working, policy
        self._trainable = parameters.trainable.get(LAYERS, {})
        self._spreads = parameters.spreads.get(LAYERS, {})
        self._splits = splits
        self._paired: dict[tuple[int, int], tuple[Paired, ...]] = {}  # by run and place; known behind the first forward

    def moves(self, run: Run) -> bool:
        """Whether a layer of the run trains, or is entered by what trains."""
        trains = any(self._rows(self._trainable, run, place) for place in range(len(run.period)))
        return trains or bool(self._entered(run))

    def nothing_entered(self, entering: Tree) -> dict[str, jax.Array]:
        """The sums of cotangents before any layer was gone through, in at least float32."""
        return {name: jnp.zeros_like(entering[name], wide(entering[name].dtype)) for name in self._wanted}

    def forward(
        self, run: Run, weights: Params, seen: Batch, entering: Tree, carry: Tree, *, keeps: bool
    ) -> tuple[Tree, list[Kept]]:
        """The carry behind a run; by place of the period what the layers keep, or nothing.

        `weights`: the stacks of the stage's layers. `seen`: what the layers are given of the batch. `entering`: what
        of other modules they take, which is no part of the carry: a layer that does not take it knows nothing of it,
        and none keeps it.
        """

        def body(now: tuple[Tree, Params], i: jax.Array | int) -> tuple[tuple[Tree, Params], list[Kept]]:
            (carry, gathered), kept = now, []
            for turn, following in _turns(run, i):
                if keeps and self._splits:
                    self._find_pairs(run, turn, weights, gathered, seen, entering, carry)
                layer, given, inputs = self._layer(run, turn, weights, gathered, seen, entering)
                gathered = self._gathered(run, following, weights)
                if keeps:
                    carry, of_layer = residuals.vjp(layer, given, carry, inputs)
                    kept.append(of_layer)
                else:
                    carry = layer(given, carry)
            return (carry, gathered), kept

        start = carry, self._gathered(run, Turn(0, 0), weights)
        once = run.times == 1
        (carry, _), kept = body(start, self._only(carry)) if once else lax.scan(body, start, _repetitions(run))
        return carry, kept

    def backward(
        self,
        run: Run,
        weights: Params,
        seen: Batch,
        entering: Tree,
        kept: list[Kept],
        behind: Back,
        first: jax.Array,
    ) -> tuple[Back, Pairs]:
        """What is in front of a run, from what is `behind` it, and what is left for `gradients`. `first`: whether this
        is the step's first microbatch."""

        def body(
            after: tuple[Back, Params], now: tuple[jax.Array | int, list[Kept]]
        ) -> tuple[tuple[Back, Params], Pairs]:
            ((g, entered, acc), gathered), (i, kept) = after, now
            pairs: Pairs = [{} for _ in run.period]
            for turn, following in _turns(run, i, back=True):
                _, _, inputs = self._layer(run, turn, weights, gathered, seen, entering)
                gathered = self._gathered(run, following, weights)
                (g_w, g_taken, pairs[turn.place]), g = residuals.put_together(kept[turn.place], inputs)(g)
                entered = {
                    name: entered[name] + g_taken[name] if name in g_taken else entered[name] for name in entered
                }
                acc = self._add(acc, run, turn, g_w, first)
            return (Back(g, entered, acc), gathered), pairs

        mine = {name: behind.entered[name] for name in self._entered(run)}
        last = self._gathered(run, Turn(len(run.period) - 1, run.times - 1), weights)
        start = behind._replace(entered=mine), last
        if run.times == 1:  # what it computes again depends on no loop of the layers behind it
            (front, _), pairs = body(start, (self._only(behind.g), in_turn.behind(kept, behind.g)))
        else:
            (front, _), pairs = lax.scan(body, start, (_repetitions(run), kept), reverse=True)
        return front._replace(entered={**behind.entered, **front.entered}), pairs

    def gradients(self, run: Run, pairs: Pairs, acc: Tree, first: jax.Array) -> Tree:
        """The accumulators of the stage's layers with the gradients that `backward` left for later."""

        def body(acc: Tree, now: tuple[jax.Array | int, Pairs]) -> tuple[Tree, None]:
            i, pairs = now
            for place, mine in enumerate(pairs):
                found: dict[Path, jax.Array] = {}
                for paired in self._paired_at(run, place):
                    found |= paired.gradients(mine[paired.path])
                whole = {path: sum_like(g, self._working.tap((LAYERS, *path))) for path, g in found.items()}
                acc = self._add(acc, run, Turn(place, i), nested(whole), first)
            return acc, None

        if run.times == 1:
            return body(acc, (0, in_turn.behind(pairs, acc)))[0]
        return lax.scan(body, acc, (_repetitions(run), pairs))[0]

    def no_pairs(self, run: Run) -> Pairs:
        """Zeros like those that `backward` leaves of a run."""
        lead = () if run.times == 1 else (run.times,)
        return [
            {paired.path: paired.zeros(*lead) for paired in self._paired_at(run, place)}
            for place in range(len(run.period))
        ]

    def _add(self, acc: Tree, run: Run, turn: Turn, g_w: Params, first: jax.Array) -> Tree:
        """The accumulators with some gradients of a layer added."""
        rows = flat(self._rows(self._trainable, run, turn.place))
        mine = accumulators.scatter(g_w, self._spreads, stacked=True)
        return accumulators.add_layer(acc, nested({path: rows[path] for path in flat(mine)}), turn.i, mine, first)

    def _only(self, before: Tree) -> jax.Array | int:
        """The number of a run's only repetition, whose weights are not taken until `before` are there."""
        return in_turn.zero_behind(before, self._data)

    def _paired_at(self, run: Run, place: int) -> tuple[Paired, ...]:
        return self._paired.get((run.lo, place), ())

    def _find_pairs(
        self, run: Run, turn: Turn, weights: Params, gathered: Params, seen: Batch, entering: Tree, carry: Tree
    ) -> None:
        if (run.lo, turn.place) not in self._paired:
            telling = Telling()
            layer, given, _ = self._layer(run, turn, weights, gathered, seen, entering, tell=telling.tell)
            self._paired[run.lo, turn.place] = telling.run(layer, given, carry)

    def _entered(self, run: Run) -> list[str]:
        """What enters layers of the run of which a cotangent is wanted."""
        return [name for name in self._wanted if any(name in part.takes for part in run.period)]

    def _rows(self, stacked: Params, run: Run, place: int) -> Params:
        return stacks.rows(stacked, self.layers, run, place)

    def _taken(self, run: Run, turn: Turn, weights: Params) -> Params:
        return stacks.take(weights, self._rows(weights, run, turn.place), turn.i)

    def _gathered(self, run: Run, turn: Turn | None, weights: Params) -> Params:
        """Those of a layer's weights that lie in shards, whole."""
        return {} if turn is None else self._working.gathered(LAYERS, self._taken(run, turn, weights))

    def _layer(
        self,
        run: Run,
        turn: Turn,
        weights: Params,
        gathered: Params,
        seen: Batch,
        entering: Tree,
        *,
        tell: Tell | None = None,
    ) -> tuple[Callable[[tuple[Params, Tree, Tree], Tree], Tree], tuple[Params, Tree, Tree], list[jax.Array]]:
        """A layer as a function of (what is differentiated, carry), the former, and what a VJP may refer to.

        Differentiated are weights, what enters, and pairs. `tell`: who hears of the products."""
        part = run.period[turn.place]
        taken = {name: entering[name] for name in part.takes}
        wanted = {name: x for name, x in taken.items() if name in self._wanted}
        # made outside of the VJP: it keeps nothing that it is given
        whole = optimizer.merge(gathered, self._taken(run, turn, weights))
        paired = self._paired_at(run, turn.place)
        later = {path for product in paired for path in product.paths}
        rows = flat(self._rows(self._trainable, run, turn.place))
        now = nested({path: row for path, row in rows.items() if path not in later})
        w = self._working.differentiated(LAYERS, whole, now)
        pairs = {product.path: product.zeros() for product in paired}

        def layer(given: tuple[Params, Tree, Tree], carry: Tree) -> Tree:
            w, wanted, pairs = given
            mine = self._working.given(LAYERS, whole, w, pairs, tell)
            return part.apply(mine, {**carry, **taken, **wanted}, seen, self._axes)

        inputs = jax.tree.leaves((whole, w, pairs, seen, taken))
        return remat.remat(layer, self._policy), (w, wanted, pairs), inputs


def _turns(run: Run, i: jax.Array | int, *, back: bool = False) -> list[tuple[Turn, Turn | None]]:
    """The layers of repetition `i`, in the order of their turns, and which one is next: behind the run's last one that
    one again, since a loop does the same in each repetition; None where there is no loop."""
    places = list(range(len(run.period)))
    if run.times == 1:
        return [(Turn(place, i), None) for place in places]
    after = jnp.maximum(i - 1, 0) if back else jnp.minimum(i + 1, run.times - 1)
    turns = [Turn(place, i) for place in (reversed(places) if back else places)]
    return list(zip(turns, [*turns[1:], turns[0]._replace(i=after)], strict=True))


def _repetitions(run: Run) -> jax.Array:
    return jnp.arange(run.times, dtype=jnp.int32)
