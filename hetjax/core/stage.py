"""One pipeline stage: a range of a module's layers on one mesh, as compiled programs.

    forward   (params, x, batch)                         -> (y, residuals)
    backward  (params, x, batch, residuals, g, acc)      -> (gx, acc, done)      acc is donated
    evaluate  (params, x, batch)                         -> y                    nothing kept; the sink adds ids
    reduce    (acc)                                      -> (grads, acc)         once a step; acc is donated and zeroed
    update    (params, state, grads, scale, ok, rate)    -> (params, state)      the first two are donated

All but `update` are per-device programs, ONE `jax.shard_map` over all axes, of the model in `local.py`. Each data
replica accumulates its own gradient in `acc` until `reduce` scatters their sum over the replicas (ZeRO-1).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import optimizer, residuals
from hetjax.core.graph import Module
from hetjax.core.layout import AXES, DATA_AXES, StagePlan, sharding, spec
from hetjax.core.local import Local, closed
from hetjax.core.parameters import Parameters, shardings, spec_tree
from models.axes import vary
from models.contract import Params

Tree = Any
Abstract = Mapping[str, jax.ShapeDtypeStruct]


class Stage:
    """The programs of one stage.

    `x`: the abstract inputs that boundaries bring (empty for the first stage of an encoder). `x_wanted`: those whose
    producers train. `batch`: the abstract global microbatch, of which the stage takes what its code reads.
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
    ) -> None:
        self.module, self.plan, self.parameters = module, plan, parameters
        self.ends_in_loss = is_sink and plan.last
        self.local = Local(module, plan, parameters, x_wanted=x_wanted, ends_in_loss=self.ends_in_loss)
        self.has_backward = bool(x_wanted) or parameters.trains
        self.x, self.x_wanted = dict(x), x_wanted
        reads = module.definition.reads
        self.batch = {k: _at(batch[k], sharding(plan.mesh, reads[k])) for k in self._find_reads(batch)}
        self.y = self._find_outputs()
        self.kept: list[jax.ShapeDtypeStruct] = []  # residuals of one microbatch; known once `thunks` has run
        self.programs: dict[str, Callable[..., Any]] = {}  # filled by `thunks`
        self.memory: dict[str, Any] = {}  # program -> XLA's memory analysis, per device

    # -- what the stage reads and yields -------------------------------------------------------------------------

    def _find_reads(self, batch: Abstract) -> list[str]:
        """The arrays of the microbatch that the stage's code looks at: one abstract run, on recorded dicts."""
        reads = self.module.definition.reads
        located = {k: _at(batch[k], sharding(self.plan.mesh, reads[k])) for k in reads}
        found: set[str] = set()

        def probe(params: Params, x: Tree, batch: Tree) -> jax.Array:
            recording = _Recording(batch)
            self.local.outputs(self.local.opened(params), dict(x), recording)
            found.update(recording.read)
            return jnp.zeros(())

        self._trace(probe, P(), located)
        return sorted(found)

    def _find_outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract outputs; and, where the stage has a backward, how each residual varies over the mesh."""
        self.y_specs = {"loss": P()} if self.ends_in_loss else {k: spec(d) for k, d in self.local.dims.items()}
        outputs = lambda p, x, b: self._summed(self.local.outputs(self.local.opened(p), dict(x), b))
        y = self._trace(outputs, self.y_specs, self.batch)
        if self.has_backward:

            def probe(params: Params, x: Tree, batch: Tree) -> jax.Array:
                _, pull, inputs = self.local.vjp(params, dict(x), batch)
                self._recipe, _ = residuals.take_apart(pull, inputs, AXES)
                return jnp.zeros(())

            self._trace(probe, P(), self.batch)
        return {k: _at(v, NamedSharding(self.plan.mesh, self.y_specs[k])) for k, v in y.items()}

    def _trace(self, function: Callable[..., Tree], out_specs: Tree, batch: Abstract) -> Tree:
        specs = (self.parameters.specs, spec_tree(self.x), spec_tree(dict(batch)))
        return jax.eval_shape(self._on_devices(function, specs, out_specs), self.parameters.params, self.x, dict(batch))

    def _on_devices(self, function: Callable[..., Tree], in_specs: Tree, out_specs: Tree) -> Callable[..., Tree]:
        return jax.shard_map(function, mesh=self.plan.mesh, in_specs=in_specs, out_specs=out_specs)

    def _summed(self, y: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The loss is summed over the data replicas where it leaves the stage, outside of the VJP."""
        return {**y, "loss": lax.psum(y["loss"], DATA_AXES)} if self.ends_in_loss else y

    # -- the programs --------------------------------------------------------------------------------------------

    def _forward(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, list[jax.Array]]:
        if not self.has_backward:
            return self._summed(self.local.outputs(self.local.opened(params), x, batch)), []
        y, pull, inputs = self.local.vjp(params, x, batch)
        return self._summed(y), residuals.take_apart(pull, inputs, AXES)[1]

    def _backward(
        self, params: Params, x: Tree, batch: Tree, kept: list[jax.Array], g: Tree, acc: Tree
    ) -> tuple[Tree, Tree, jax.Array]:
        inputs = jax.tree.leaves((*self.local.split(params), x, batch))
        pull = residuals.put_together(self._recipe, inputs, kept)
        g_params, g_x = pull({"loss": vary(g["loss"], DATA_AXES)} if self.ends_in_loss else g)
        acc = jax.tree.map(lambda total, new: total + new[None], acc, closed(g_params))
        return g_x, acc, jnp.zeros((), jnp.int32)

    def _evaluate(self, params: Params, x: Tree, batch: Tree) -> Tree:
        params = self.local.opened(params)
        return self._summed((self.local.scores if self.ends_in_loss else self.local.outputs)(params, x, batch))

    def _reduce(self, acc: Tree) -> tuple[Tree, Tree]:
        def reduce_leaf(leaf: jax.Array, dim: int) -> jax.Array:
            if dim < 0:
                return lax.psum(leaf[0], DATA_AXES)
            return lax.psum_scatter(leaf[0], DATA_AXES, scatter_dimension=dim, tiled=True)

        return jax.tree.map(reduce_leaf, acc, self.parameters.zero_dims), jax.tree.map(jnp.zeros_like, acc)

    def _update(
        self, params: Params, state: Tree, grads: Tree, scale: jax.Array, ok: jax.Array, rate: jax.Array
    ) -> tuple[Params, Tree]:
        mine = self.parameters
        owned = mine.owned(mine.split(params)[0])
        shards = jax.tree.map(lax.with_sharding_constraint, owned, shardings(mine.owned(mine.grads)))
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
        return optimizer.merge(shards, params), state

    def thunks(self, *, evaluate: bool) -> dict[str, Callable[[], None]]:
        """Name -> function that compiles one program, callable afterwards as `programs[name]`."""
        mine = self.parameters
        inputs, specs = (mine.params, self.x, self.batch), (mine.specs, spec_tree(self.x), spec_tree(self.batch))
        kept_specs = residuals.specs(self._recipe) if self.has_backward else []
        forward = self._on_devices(self._forward, specs, (self.y_specs, kept_specs))
        found: dict[str, Callable[[], None]] = {"forward": functools.partial(self._compile, "forward", forward, inputs)}
        if evaluate:
            ids = {"likeliest": P(*DATA_AXES)} if self.ends_in_loss else {}
            program = self._on_devices(self._evaluate, specs, {**self.y_specs, **ids})
            found["evaluate"] = functools.partial(self._compile, "evaluate", program, inputs)
        if self.has_backward:
            kept = jax.eval_shape(forward, *inputs)[1]
            self.kept = [_at(a, NamedSharding(self.plan.mesh, s)) for a, s in zip(kept, kept_specs, strict=True)]
            g_x = {k: v.sharding.spec for k, v in self.x.items() if k in self.x_wanted}
            acc_specs = spec_tree(mine.acc)
            backward = self._on_devices(
                self._backward, (*specs, kept_specs, self.y_specs, acc_specs), (g_x, acc_specs, P())
            )
            args: tuple[Any, ...] = (*inputs, self.kept, self.y, mine.acc)
            found["backward"] = functools.partial(self._compile, "backward", backward, args, donate=(5,))
        if mine.trains:
            acc_specs = spec_tree(mine.acc)
            reduce = self._on_devices(self._reduce, (acc_specs,), (spec_tree(mine.grads), acc_specs))
            found["reduce"] = functools.partial(self._compile, "reduce", reduce, (mine.acc,), donate=(0,))
            everywhere = NamedSharding(self.plan.mesh, P())
            scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
            wide = jnp.promote_types(mine.dtype, jnp.float32)
            args = (mine.params, mine.state, mine.grads, scalar(wide), scalar(jnp.bool_), scalar(wide))
            out = shardings((mine.params, mine.state))
            found["update"] = functools.partial(self._compile, "update", self._update, args, donate=(0, 1), out=out)
        return found

    def _compile(
        self, name: str, function: Callable[..., Tree], args: tuple, *, donate: tuple[int, ...] = (), out: Tree = None
    ) -> None:
        options = {} if out is None else {"out_shardings": out}
        compiled = jax.jit(function, donate_argnums=donate, **options).lower(*args).compile()
        self.memory[name] = compiled.memory_analysis()
        self.programs[name] = compiled


class _Recording(dict):
    """A batch that remembers which of its arrays a model read."""

    def __init__(self, items: Mapping[str, jax.Array]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> jax.Array:
        self.read.add(key)
        return super().__getitem__(key)


def _at(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
