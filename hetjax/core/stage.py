"""One pipeline stage: a range of a module's layers on one mesh, as compiled programs.

    forward   (weights, x, packed)                       -> (y, residuals, done) no y where the stage ends in the loss
    backward  (weights, x, packed, residuals, g, acc, first) -> (acc, gx, done, pairs)  acc is donated; done: scores
    weights   (pairs, acc, first)                        -> (acc, done)          the rest of a backward that is split
    evaluate  (weights, x, packed)                       -> y                    nothing kept; the sink: scores, ids
    reduce    (acc)                                      -> (grads, squares)     once a step, where leaves have replicas
    measure   (acc)                                      -> squares              once a step, where none has
    update    (params, state, copies, grads, decision, loads) -> (params, state, copies)   the first three are donated
    cast      (params)                                   -> copies               before the first step

All but the last two are per-device programs, ONE `jax.shard_map` over all axes, of the model in `local.py`. Each data
replica accumulates its own gradient in `acc` until `reduce` scatters their sum over the replicas (ZeRO-1); under ZeRO-2
and 3 `acc` lies in shards. `squares` are the sums of squares of the gradients that are complete, by leaf. `packed` is
what the stage reads of the microbatch (`packing.py`); `done` a number that is there when the program is through, or all
scores where it makes the loss (`Local.backward`); `pairs` what is left for `weights` (`pairs.py`); `copies` are the
working weights that are no parameters (`working.py`); `decision` is [scale, 1 if the step counts, rate]; `loads` those
that move a parameter (`balance.py`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import accumulators, optimizer, packing
from hetjax.core.graph import Module
from hetjax.core.local import Local
from hetjax.core.parameters import Parameters, shardings, spec_tree
from hetjax.core.plan import StagePlan
from hetjax.core.remat import Keep, Policy, Remat
from hetjax.core.residuals import Crossing
from models.contract import AUXILIARY, ROUTED, Params
from models.layers import wide

SCORES = ("loss", AUXILIARY, ROUTED)
Tree = Any
Abstract = Mapping[str, jax.ShapeDtypeStruct]


class Stage:
    """The programs of one stage.

    `x`: the abstract inputs that boundaries bring (empty for the first stage of an encoder). `x_wanted`: those whose
    producers train. `batch`: the abstract global microbatch, of which the stage takes what its code reads. `splits`: a
    backward is two programs, if anything of it can be left for the second.
    """

    def __init__(
        self,
        module: Module,
        plan: StagePlan,
        parameters: Parameters,
        *,
        is_sink: bool,
        x: Abstract,
        x_wanted: frozenset[str],
        batch: Abstract,
        splits: bool = False,
    ) -> None:
        self.module, self.plan, self.parameters = module, plan, parameters
        self.ends_in_loss = is_sink and plan.last
        self.has_backward = bool(x_wanted) or parameters.trains
        self.x, self.x_wanted, self._asked_to_split = dict(x), x_wanted, splits
        self.keep = Keep(Remat.NONE if module.remat is Remat.AUTO else module.remat)  # until `budget.py` has chosen
        self.local = self.local_with(self.keep.policy)
        reads = module.definition.reads
        self.batch = {k: _at(batch[k], plan.grid.sharding(reads[k])) for k in self._find_reads(batch)}
        zigzags = {k: reads[k].index("seq") for k in self.batch if plan.axes.cp.size > 1 and "seq" in reads[k]}
        self.packings = packing.packings(self.batch, zigzags)
        self.packed = [p.struct for p in self.packings]
        self.scores: dict[str, jax.ShapeDtypeStruct] = {}  # what a module's last stage says of a microbatch to the step
        self.pairs: list[jax.ShapeDtypeStruct] = []  # what a backward leaves of one microbatch for the second program
        self.y, self.ends = self._find_outputs()
        self.splits = bool(self.pairs)  # whether a backward is two programs
        self.consumers: list[tuple[str, ...]] = []  # keys of `y` that each stage takes which takes some, in their order
        self.kept: list[jax.ShapeDtypeStruct] = []  # residuals of one microbatch; known once `thunks` has run
        self.programs: dict[str, Callable[..., Any]] = {}  # filled by `thunks`
        self.memory: dict[str, Any] = {}  # program -> XLA's memory analysis, per device

    def local_with(self, policy: Policy | None) -> Local:
        """The stage's model, whose layers keep what the policy says."""
        return Local(
            self.module,
            self.plan,
            self.parameters,
            x_wanted=self.x_wanted,
            ends_in_loss=self.ends_in_loss,
            policy=policy,
            splits=self._asked_to_split,
        )

    def set_keep(self, keep: Keep) -> None:
        """What the layers keep from now on; the programs are not compiled yet."""
        self.keep, self.local = keep, self.local_with(keep.policy)
        self.y, self.ends = self._find_outputs()

    def _find_reads(self, batch: Abstract) -> list[str]:
        """The arrays of the microbatch that the stage's code looks at: one abstract run, on recorded dicts."""
        reads = self.module.definition.reads
        located = {k: _at(batch[k], self.plan.grid.sharding(reads[k])) for k in reads}
        found: set[str] = set()

        def probe(weights: Params, x: Tree, batch: Tree) -> jax.Array:
            recording = packing.Recording(batch)
            self.local.outputs(weights, dict(x), recording)
            found.update(recording.read)
            return jnp.zeros(())

        self.trace(probe, P(), located)
        return sorted(found)

    def _find_outputs(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """Abstract (outputs of `forward`, what `backward` takes the cotangents of); where the stage has a backward, how
        each residual varies over the mesh is found too, and what is left for a second half."""
        self.evaluated = {k: self.plan.grid.spec(d) for k, d in self.local.dims.items()}
        if self.ends_in_loss:
            output = self.module.definition.output
            found_too = {k: self.plan.grid.spec(output[k]) for k in (AUXILIARY, ROUTED) if k in output}
            self.evaluated = {"loss": P(), "likeliest": self.plan.grid.spec(("batch", "seq")), **found_too}
        found = self.trace(self._scores, self.evaluated, self.batch)
        if self.has_backward:

            def probe(weights: Params, x: Tree, batch: Tree) -> jax.Array:
                self._crossing = Crossing.of(self.local.forward(weights, dict(x), batch)[1])
                self._leaves = Crossing.of(self.local.no_pairs())
                return jnp.zeros(())

            self.trace(probe, P(), self.batch)
            pairs = self.trace(lambda *_: self._leaves.out(self.local.no_pairs()), self._leaves.specs, self.batch)
            where = (NamedSharding(self.plan.mesh, spec) for spec in self._leaves.specs)
            self.pairs = [*map(_at, pairs, where)]
        found = {k: _at(v, NamedSharding(self.plan.mesh, self.evaluated[k])) for k, v in found.items()}
        self.scores = {k: v for k, v in found.items() if self.plan.last and k in SCORES}
        self.crosses = {k: v for k, v in found.items() if k not in self.scores}  # to other stages
        if not self.ends_in_loss:
            return found, found
        return {}, {k: v for k, v in self.scores.items() if k != ROUTED}

    def trace(self, function: Callable[..., Tree], out_specs: Tree, batch: Abstract) -> Tree:
        """What a per-device function of (weights, inputs, batch) gives, abstractly."""
        inputs = (self.parameters.weights, self.x, dict(batch))
        return jax.eval_shape(self._on_devices(function, spec_tree(inputs), out_specs), *inputs)

    def _on_devices(self, function: Callable[..., Tree], in_specs: Tree, out_specs: Tree) -> Callable[..., Tree]:
        return jax.shard_map(function, mesh=self.plan.mesh, in_specs=in_specs, out_specs=out_specs)

    def _forward(self, weights: Params, x: Tree, packed: list[jax.Array]) -> tuple[Tree, list[jax.Array], jax.Array]:
        batch = packing.unpack(self.packings, packed)
        if not self.has_backward:
            return self.local.outputs(weights, x, batch), [], _done()
        y, kept = self.local.forward(weights, x, batch)
        return y, self._crossing.out(kept), _done()

    def _backward(
        self,
        weights: Params,
        x: Tree,
        packed: list[jax.Array],
        kept: list[jax.Array],
        g: list[Tree],
        acc: Tree,
        first: jax.Array,
    ) -> tuple[Tree, Tree, Tree, list[jax.Array]]:
        batch = packing.unpack(self.packings, packed)
        g_x, acc, scores, pairs = self.local.backward(weights, x, batch, self._crossing.back(kept), g, acc, first)
        return acc, g_x, self._summed(scores) if scores else _done(), self._leaves.out(pairs)

    def _weights(self, pairs: list[jax.Array], acc: Tree, first: jax.Array) -> tuple[Tree, jax.Array]:
        return self.local.gradients(self._leaves.back(pairs), acc, first), _done()

    def _evaluate(self, weights: Params, x: Tree, packed: list[jax.Array]) -> Tree:
        return self._scores(weights, x, packing.unpack(self.packings, packed))

    def _scores(self, weights: Params, x: Tree, batch: Tree) -> Tree:
        y = self.local.outputs(weights, x, batch)
        return self._summed(y) if self.ends_in_loss else y

    def _summed(self, scores: Tree) -> Tree:
        return {**scores, "loss": lax.psum(scores["loss"], self.plan.grid.tokens)}

    def _reduce(self, acc: Tree) -> tuple[Tree, jax.Array]:
        mine = self.parameters
        grads = accumulators.reduce(mine.repeated(acc), mine.repeated(mine.spreads))
        return grads, self._measure(optimizer.merge(grads, acc))

    def _measure(self, grads: Tree) -> jax.Array:
        return accumulators.squares(self.parameters.complete(grads), wide(self.parameters.dtype))

    def _update(
        self, params: Params, state: Tree, old: Params, grads: Tree, decision: jax.Array, loads: list[jax.Array]
    ) -> tuple[Params, Tree, Params]:
        """`old` are the copies, whose memory the new ones take."""
        scale, ok, rate = decision[0], decision[1] > 0, decision[2]
        mine = self.parameters
        params = mine.balance.moved(params, *loads, ok=ok)
        if not mine.trains:
            return params, state, old
        moving = mine.split(params)[0]
        shards = jax.tree.map(lax.with_sharding_constraint, moving, shardings(mine.owned(mine.grads)))
        shards, state = optimizer.apply_update(
            mine.tx,
            shards,
            state,
            mine.owned(grads),
            learning_rate=rate,
            multipliers=mine.multipliers(shards),
            scale=scale,
            ok=ok,
        )
        params = optimizer.merge(shards, params)
        return params, state, mine.working.copies(params, moving=True)

    def thunks(self, *, evaluate: bool) -> dict[str, Callable[[], None]]:
        """Name -> function that compiles one program, callable afterwards as `programs[name]`."""
        mine = self.parameters
        inputs = (mine.weights, self.x, self.packed)
        specs = spec_tree(inputs)
        kept_specs = self._crossing.specs if self.has_backward else []
        forward = self._on_devices(self._forward, specs, (spec_tree(self.y), kept_specs, P()))
        args: tuple[Any, ...]
        found: dict[str, Callable[[], None]] = {"forward": functools.partial(self._compile, "forward", forward, inputs)}
        if evaluate and not mine.is_replica:
            program = self._on_devices(self._evaluate, specs, self.evaluated)
            found["evaluate"] = functools.partial(self._compile, "evaluate", program, inputs)
        if self.has_backward:
            kept = jax.eval_shape(forward, *inputs)[1]
            self.kept = [_at(a, NamedSharding(self.plan.mesh, s)) for a, s in zip(kept, kept_specs, strict=True)]
            returned = [{k: self.ends[k] for k in keys} for keys in self.consumers]
            returned += [told] if (told := {k: v for k, v in self.ends.items() if k in self.scores}) else []
            g_x = {k: v.sharding.spec for k, v in self.x.items() if k in self.x_wanted}
            out = g_x, P(), self._leaves.specs
            args = (*inputs, self.kept, returned, mine.acc, self._whole((), jnp.bool_))
            found["backward"] = self._adding("backward", self._backward, args, out)
        if self.splits:
            args = (self.pairs, mine.acc, self._whole((), jnp.bool_))
            found["weights"] = self._adding("weights", self._weights, args, (P(),))
        if mine.trains:
            acc_specs, grad_specs = spec_tree(mine.acc), spec_tree(mine.repeated(mine.grads))
            if mine.are_repeated:
                reduce = self._on_devices(self._reduce, (acc_specs,), (grad_specs, P()))
                found["reduce"] = functools.partial(self._compile, "reduce", reduce, (mine.acc,))
            else:
                measure = self._on_devices(self._measure, (acc_specs,), P())
                found["measure"] = functools.partial(self._compile, "measure", measure, (mine.acc,))
        if mine.moves:
            args = (mine.params, mine.state, mine.moving, mine.grads, self._whole((3,), wide(mine.dtype)), mine.loads)
            out = shardings(args[:3])
            found["update"] = functools.partial(self._compile, "update", self._update, args, donate=(0, 1, 2), out=out)
        if mine.copies:
            found["cast"] = self._compile_cast
        return found

    def weights(self, params: Params) -> Params:
        """The working weights of these parameters, but for a borrowed one."""
        mine = self.parameters
        if mine.copies and "cast" not in self.programs:
            self._compile_cast()
        return mine.working.assemble(params, self.programs["cast"](params) if mine.copies else {})

    def _compile_cast(self) -> None:
        mine = self.parameters
        self._compile("cast", mine.working.copies, (mine.params,), out=shardings(mine.copies))

    def _adding(self, name: str, program: Callable[..., tuple], args: tuple, out: tuple) -> Callable[[], None]:
        """Compiles a program that adds to accumulators, the last but one of its arguments and its first result."""
        spreads, at = self.parameters.spreads, len(args) - 2
        acc_specs = jax.tree.map(lambda spread: spread.accumulator, spreads)
        specs = tuple(acc_specs if n == at else spec_tree(given) for n, given in enumerate(args))
        whole = accumulators.in_global_view(self._on_devices(program, specs, (acc_specs, *out)))
        return functools.partial(self._compile, name, whole, args, donate=(at,))

    def _whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.plan.mesh, P()))

    def _compile(
        self, name: str, function: Callable[..., Tree], args: tuple, *, donate: tuple[int, ...] = (), out: Tree = None
    ) -> None:
        options = {} if out is None else {"out_shardings": out}
        program = lambda *given: function(*given)
        program.__name__ = "/".join((*map(str, self.plan.key), name))  # by which a profile tells it from others
        compiled = jax.jit(program, donate_argnums=donate, keep_unused=True, **options).lower(*args).compile()
        self.memory[name] = compiled.memory_analysis()
        self.programs[name] = compiled


def _done() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _at(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
