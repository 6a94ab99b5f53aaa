"""A stage's model as one device runs it on its shards: what `stage.py` compiles into programs.

Working weights are cast to varying over the data axes before they meet an activation, and VJPs are taken here, inside
of the per-device program: so no data-parallel collective is inserted.

A stage is its start (a module's first part), its layers in runs (`loops.py`), and its end (a module's last part); each
has a VJP of its own. Where the end makes the loss, the forward stops before it: the backward, which has the
accumulators, computes loss and gradients in one pass.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hetjax.core import accumulators, loss, optimizer, residuals
from hetjax.core.graph import Module
from hetjax.core.loops import Back, Loops, Pairs
from hetjax.core.mesh import axes_of
from hetjax.core.parameters import Parameters
from hetjax.core.plan import StagePlan
from hetjax.core.remat import Policy, remat
from hetjax.core.residuals import Kept, vjp
from hetjax.core.settled import settle
from hetjax.core.stacks import LAYERS
from models.axes import sum_like, vary
from models.contract import AUXILIARY, ROUTED, Batch, Params
from models.layers import wide
from models.paths import at

Tree = Any


class Given(NamedTuple):
    """What a stage's programs are given, as its parts take it. Working weights vary over the data axes; under ZeRO-3
    those of the layers are still in shards."""

    weights: Params
    x: Tree
    batch: Batch
    seen: Batch  # by the layers
    entering: Tree  # what of other modules the layers take; it varies over the data axes

    @property
    def to_layers(self) -> tuple[Params, Batch, Tree]:
        """The stacks of their weights, what they see, and what enters them."""
        return self.weights.get(LAYERS, {}), self.seen, self.entering

    def inputs(self, differentiated: Params) -> list[jax.Array]:
        """What the VJPs of start and end may refer to, those with respect to `differentiated`."""
        return jax.tree.leaves((self.weights, differentiated, self.x, self.batch))


class Residuals(NamedTuple):
    """What the forward keeps for the backward; None where nothing in it or before it trains."""

    start: Kept | None
    runs: list[list[Kept] | None]  # of each run, by place of its period; with a dim over repetitions, if it has several
    end: Kept | Tree  # where the stage ends in the loss: the carry behind the layers


class Local:
    """The layers of one stage, and its module's first and last parts as far as it has them.

    `x_wanted`: the inputs whose producers train. `ends_in_loss`: the stage's last part yields it. `policy`: which inner
    results of a layer are kept; None: all. `splits`: the backward leaves gradients of the layers' weights for later.
    """

    def __init__(
        self,
        module: Module,
        plan: StagePlan,
        parameters: Parameters,
        *,
        x_wanted: frozenset[str],
        ends_in_loss: bool,
        policy: Policy | None,
        splits: bool = False,
    ) -> None:
        self.module, self.plan, self.parameters, self.working = module, plan, parameters, parameters.working
        self.trainable = parameters.trainable
        self.x_wanted, self.ends_in_loss, self.policy = x_wanted, ends_in_loss, policy
        self.chunk = self._chunk() if ends_in_loss else 0
        self.loops = Loops(module, plan, parameters, policy, x_wanted, splits=splits)
        self.starts_from = module.definition.first.takes if plan.first else tuple(module.definition.carry)

    @property
    def dims(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical dims of what leaves a stage that does not end in the loss."""
        return self.module.definition.output if self.plan.last else self.module.definition.carry

    # -- the programs --------------------------------------------------------------------------------------------

    def outputs(self, weights: Params, x: Tree, batch: Batch) -> dict[str, jax.Array]:
        """What leaves the stage; of one that ends in the loss, scores as in `backward`, and every likeliest next id."""
        given = self._given(weights, x, batch)
        first = self.working.given("first", given.weights.get("first", {}), {})
        carry = self._start(first, {k: x[k] for k in self.starts_from}, batch)
        for run in self.loops.runs:
            carry, _ = self.loops.forward(run, *given.to_layers, carry, keeps=False)
        last = self.working.given("last", self.parameters.full_last(given.weights), {})
        if not self.ends_in_loss:
            return self._end(last, carry, batch)
        y = self.module.definition.last.apply(last, carry, batch, self.plan.axes)
        tokens = y["x"], y["head"], batch["targets"], batch["weights"]
        ids = self.module.definition.vocab
        total, likely = loss.token_scores(*tokens, ids=ids, axes=self.plan.axes, chunk=self.chunk)
        tokens_cut = frozenset(self.plan.grid.tokens)
        found = {k: settle(v, tokens_cut) for k, v in {"loss": total, "likeliest": likely}.items()}
        return found | {k: y[k] for k in (AUXILIARY, ROUTED) if k in y}

    def forward(self, weights: Params, x: Tree, batch: Batch) -> tuple[dict[str, jax.Array], Residuals]:
        """What leaves the stage, but for a loss, and what `backward` needs beside the same arguments."""
        given = self._given(weights, x, batch)
        mine = {k: x[k] for k in self.starts_from}
        wanted = {k: v for k, v in mine.items() if k in self.x_wanted}

        def start(w: Params, wanted: Tree) -> Tree:
            first = self.working.given("first", given.weights.get("first", {}), w)
            return self._start(first, {**mine, **wanted}, batch)

        def end(w: Params, carry: Tree) -> dict[str, jax.Array]:
            return self._end(self.working.given("last", self.parameters.full_last(given.weights), w), carry, batch)

        first = self._first(given)
        moves = bool(first or wanted)
        carry, of_start = vjp(start, first, wanted, given.inputs(first)) if moves else (start(first, wanted), None)
        of_runs: list[list[Kept] | None] = []
        for run in self.loops.runs:
            moves = moves or self.loops.moves(run)
            carry, kept = self.loops.forward(run, *given.to_layers, carry, keeps=moves)
            of_runs.append(kept if moves else None)
        if self.ends_in_loss:
            return {}, Residuals(of_start, of_runs, carry)
        last = self._last(given)
        y, of_end = vjp(end, last, carry, given.inputs(last))
        return y, Residuals(of_start, of_runs, of_end)

    def backward(
        self, weights: Params, x: Tree, batch: Batch, kept: Residuals, returned: list[Tree], acc: Tree, first: jax.Array
    ) -> tuple[Tree, Tree, dict[str, jax.Array], list[Pairs]]:
        """(cotangents of the wanted inputs, accumulators with the gradients added, scores, by run what is left for
        `gradients`) from those of the outputs, which each stage that takes some of them `returned`.

        `first`: whether this is the step's first microbatch (see `accumulators.py`). Scores are, where the stage ends
        in the loss: "loss", this device's part of the sum; and what of AUXILIARY and ROUTED the last part returns.
        Cotangents of the first two are given by their names.
        """
        given, acc, g = self._given(weights, x, batch), dict(acc), _added(returned)
        scores: dict[str, jax.Array] = {}
        if self.ends_in_loss:
            scores, g_last, g, acc = self._loss_back(given, kept.end, g, acc, first)
        else:
            g_last, g = residuals.put_together(kept.end, given.inputs(self._last(given)))(g)
        if g_last:
            acc["last"] = accumulators.add(acc["last"], g_last, self.parameters.spreads["last"], first)
        of_layers = acc.get(LAYERS, {})
        entered = self.loops.nothing_entered(given.entering)
        pairs = self.no_pairs()
        for n, (run, of_run) in reversed(list(enumerate(zip(self.loops.runs, kept.runs, strict=True)))):
            if of_run is not None:
                behind = Back(g, entered, of_layers)
                (g, entered, of_layers), pairs[n] = self.loops.backward(run, *given.to_layers, of_run, behind, first)
        acc |= {LAYERS: of_layers} if of_layers else {}
        g_x = {k: sum_like(total, x[k]) for k, total in entered.items()}
        if kept.start is not None:
            g_start, acc = self._start_back(given, kept.start, g, acc, first)
            g_x |= {k: g + g_x[k] if k in g_x else g for k, g in g_start.items()}
        return {k: g.astype(x[k].dtype) for k, g in g_x.items()}, acc, scores, pairs

    def gradients(self, pairs: list[Pairs], acc: Tree, first: jax.Array) -> Tree:
        """The accumulators with the gradients added that `backward` left for later."""
        of_layers = acc[LAYERS]
        for run, of_run in reversed(list(zip(self.loops.runs, pairs, strict=True))):
            if any(of_run):
                of_layers = self.loops.gradients(run, of_run, of_layers, first)
        return {**acc, LAYERS: of_layers}

    def no_pairs(self) -> list[Pairs]:
        """Zeros like what `backward` leaves for `gradients`; known behind the first `forward`."""
        return [self.loops.no_pairs(run) for run in self.loops.runs]

    # -- their parts ---------------------------------------------------------------------------------------------

    def _start_back(self, given: Given, kept: Kept, g: Tree, acc: Tree, first: jax.Array) -> tuple[Tree, Tree]:
        """(cotangents of the wanted inputs, accumulators) from the cotangent of the carry in front of the layers."""
        table, taps = self.module.definition.table, self._first(given)
        mine, spreads, of_table = acc.get("first", {}), self.parameters.spreads.get("first", {}), first
        if table in taps:  # its gradient is added to its tap, row by row, and the accumulator takes the tap's place
            if self.ends_in_loss and ("first", table) == self.parameters.place_in_last(self.module.definition.head):
                of_table = jnp.zeros_like(first)  # the head has written
            taps = {**taps, table: accumulators.opened(mine[table], spreads[table], taps[table], of_table)}
        g_first, g_x = residuals.put_together(kept, given.inputs(taps))(g)
        if table in taps:
            mine = {**mine, table: accumulators.closed(mine[table], spreads[table], g_first.pop(table), of_table)}
        return g_x, {**acc, "first": accumulators.add(mine, g_first, spreads, first)} if mine else acc

    def _loss_back(
        self, given: Given, carry: Tree, seeds: Tree, acc: Tree, first: jax.Array
    ) -> tuple[dict[str, jax.Array], Params, Tree, Tree]:
        """(scores, gradients of the last part's trainable parameters but the head's, cotangent of the carry,
        accumulators with the head's gradient added), of the carry behind the layers."""
        definition, name = self.module.definition, self.module.definition.head
        weights, w = self.parameters.full_last(given.weights), self._last(given)
        tap = w.pop(name, None)

        def features(w: Params, carry: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
            last = self.working.given("last", weights, w)
            y = definition.last.apply(last, carry, given.batch, self.plan.axes)
            varies = axes_of(self.plan.grid.spec(definition.output["x"])) | set(self.plan.axes.sp.names)
            only = lambda key: {key: y[key]} if key in y else {}
            return (settle(y["x"], varies), only(AUXILIARY)), only(ROUTED)

        (x, auxiliary), pull, routed = jax.vjp(features, w, carry, has_aux=True)
        head = loss.Head(weights[name], definition.last.logical[name].index("vocab"), definition.vocab)
        part, leaf = self.parameters.place_in_last(name)
        mine, spread = at(acc, (part, leaf)), at(self.parameters.spreads, (part, leaf))
        opened = None if tap is None else accumulators.opened(mine, spread, tap, first)
        tokens = given.batch["targets"], given.batch["weights"]
        chunk = loss.training_chunk(self._platform, self.chunk, x.size // x.shape[-1])
        total, g_x, found = loss.add_gradients(
            x, head, *tokens, opened, seed=seeds["loss"], axes=self.plan.axes, chunk=chunk
        )
        if found is not None:
            acc = {**acc, part: {**acc[part], leaf: accumulators.closed(mine, spread, found, first)}}
        g_w, g_carry = pull((g_x, {key: seeds[key] for key in auxiliary}))
        return {"loss": total, **auxiliary, **routed}, g_w, g_carry, acc

    def _chunk(self) -> int:
        """Tokens whose logits exist at a time."""
        name = self.module.definition.head
        head = self.parameters.full_last(self.parameters.leaves)[name]
        ids = head.sharding.shard_shape(head.shape)[self.module.definition.last.logical[name].index("vocab")]
        return loss.chunk_size(self._platform, ids)

    @property
    def _platform(self) -> str:
        return self.plan.mesh.devices.flat[0].platform

    def _given(self, weights: Params, x: Tree, batch: Batch) -> Given:
        weights = jax.tree.map(self._vary_weight, weights, self.parameters.weights)
        ends = {part: self.working.gathered(part, weights[part]) for part in weights if part != LAYERS}
        weights = optimizer.merge(ends, weights)
        entering = {k: self._vary(x[k]) for k in self.loops.takes}
        return Given(weights, x, batch, self.module.definition.prepare(batch, self.plan.axes), entering)

    def _first(self, given: Given) -> Params:
        """What of the first part is differentiated."""
        return self.working.differentiated("first", given.weights.get("first", {}), self.trainable.get("first", {}))

    def _last(self, given: Given) -> Params:
        """What of the last part is differentiated."""
        weights, trainable = (self.parameters.full_last(params) for params in (given.weights, self.trainable))
        return self.working.differentiated("last", weights, trainable)

    def _start(self, w: Params, x: Tree, batch: Batch) -> Tree:
        """The carry in front of the layers."""
        first = remat(lambda w, x: self.module.definition.first.apply(w, x, batch, self.plan.axes), self.policy)
        carry = jax.tree.map(self._vary, first(w, x) if self.plan.first else x)  # as what meets parameters is
        for name, c in carry.items():
            if not jnp.issubdtype(c.dtype, jnp.floating):
                raise ValueError(
                    f"{self.module.name}: the carry's {name!r} is {c.dtype}; it must be of floating-point numbers, "
                    "which the backward can differentiate"
                )
        return carry

    def _end(self, w: Params, carry: Tree, batch: Batch) -> dict[str, jax.Array]:
        """What leaves a stage that does not end in the loss; `w` are the parameters of `last`."""
        last = remat(lambda w, carry: self.module.definition.last.apply(w, carry, batch, self.plan.axes), self.policy)
        y = last(w, carry) if self.plan.last else carry
        return {k: settle(v, axes_of(self.plan.grid.spec(self.dims[k]))) for k, v in y.items()}

    def _vary_weight(self, x: jax.Array, struct: jax.ShapeDtypeStruct) -> jax.Array:
        return vary(x, self.plan.grid.meets(struct.sharding.spec))

    def _vary(self, x: jax.Array) -> jax.Array:
        return vary(x, self.plan.grid.data)


def _added(returned: list[Tree]) -> Tree:
    """The cotangents of all outputs, each the sum of what the stages that take it return, in their order."""
    found: dict[str, list[jax.Array]] = {}
    for name, g in itertools.chain.from_iterable(tree.items() for tree in returned):
        found.setdefault(name, []).append(g)
    total = lambda g: g[0] if len(g) == 1 else sum(a.astype(wide(a.dtype)) for a in g).astype(g[0].dtype)
    return {name: total(g) for name, g in found.items()}
