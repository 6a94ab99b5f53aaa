"""One pipeline stage: a range of a module's layers on one mesh, as compiled programs.

    forward   (params, x, batch)                         -> (y, residuals)
    backward  (params, x, batch, residuals, g, acc)      -> (gx, acc, done)      acc is donated
    evaluate  (params, x, batch)                         -> y                    nothing kept; the sink adds ids
    reduce    (acc)                                      -> (grads, acc)         once a step; acc is donated and zeroed
    update    (params, state, grads, scale, ok, rate)    -> (params, state)      the first two are donated

All but `update` are per-device programs, ONE `jax.shard_map` over all axes. The VJP is taken inside, of parameters cast
to varying over the data axes: so no data-parallel collective is inserted, and each data replica accumulates its own
gradient in `acc` until `reduce` scatters their sum over the replicas (ZeRO-1).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax import loss, optimizer, residuals, stacks
from hetjax.graph import Module, Remat
from hetjax.layout import AXES, DATA_AXES, StagePlan, sharding, spec
from hetjax.parameters import Parameters, shardings, spec_tree
from hetjax.stacks import LAYERS
from models import moe
from models.axes import vary, varying_axes
from models.contract import Params, Part

Tree = Any
Abstract = Mapping[str, jax.ShapeDtypeStruct]
POLICIES = {
    Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, moe.is_grouped_product
    ),
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


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
        self.layers = module.definition.layers[plan.lo : plan.hi]
        self.ends_in_loss = is_sink and plan.last
        self.has_backward = bool(x_wanted) or parameters.trains
        self.x, self.x_wanted = dict(x), x_wanted
        reads = module.definition.reads
        self.batch = {k: _at(batch[k], sharding(plan.mesh, reads[k])) for k in self._find_reads(batch)}
        self.y = self._find_outputs()
        self.kept: list[jax.ShapeDtypeStruct] = []  # residuals of one microbatch; known once `thunks` has run
        self.programs: dict[str, Callable[..., Any]] = {}  # filled by `thunks`
        self.memory: dict[str, Any] = {}  # program -> XLA's memory analysis, per device

    # -- the model on one device ---------------------------------------------------------------------------------

    def _run(self, params: Params, x: Tree, batch: Mapping[str, jax.Array], end: Callable[..., Tree]) -> Tree:
        """The carry behind the layers; for a module's last stage, what `end(last parameters, carry)` makes of it.

        `params` are those of `_opened`."""
        definition, plan = self.module.definition, self.plan
        first = self._remat(lambda w, x: definition.first.apply(w, x, batch, plan.axes))
        carry = first(params["first"], x) if plan.first else x
        carry = jax.tree.map(lambda c: vary(c, DATA_AXES), carry)  # as what meets parameters is
        for number, (lo, _) in enumerate(stacks.runs(self.layers)):
            carry = lax.scan(self._layer(self.layers[lo], batch), carry, params[LAYERS][number])[0]
        return self._remat(end)(self.parameters.full_last(params), carry) if plan.last else carry

    def _layer(self, part: Part, batch: Mapping[str, jax.Array]) -> Callable[..., tuple[Tree, None]]:
        """What a scan over layers of one part does with the carry and a layer's parameters."""
        layer = self._remat(lambda w, c: part.apply(w, c, batch, self.plan.axes))
        return lambda c, w: (layer(w, c), None)

    def _remat(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        """`function`, of whose inner results the backward keeps what the module's setting says."""
        if self.module.remat is Remat.NONE:
            return function
        return jax.checkpoint(function, policy=POLICIES[self.module.remat], prevent_cse=False)

    def _outputs(self, params: Params, x: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What leaves the stage; the loss as this device's part of the sum."""

        def end(last: Params, carry: Tree) -> Tree:
            y = self.module.definition.last.apply(last, carry, batch, self.plan.axes)
            if not self.ends_in_loss:
                return y
            return {"loss": loss.token_sum(y["x"], y["head"], batch["targets"], batch["weights"], axes=self.plan.axes)}

        y = self._run(params, x, batch, end)
        wanted = {k: frozenset(DATA_AXES) if self.ends_in_loss else _axes_of(spec(self._dims[k])) for k in y}
        return {k: _settle(v, wanted[k]) for k, v in y.items()}

    @property
    def _dims(self) -> Mapping[str, tuple[str | None, ...]]:
        return self.module.definition.output if self.plan.last else self.module.definition.carry

    def _vjp(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, Callable[..., Tree], list[jax.Array]]:
        """Outputs, VJP in (trainable parameters, wanted inputs), and the flat inputs that the VJP may refer to."""
        trainable, frozen = self._split(params)
        wanted = {k: v for k, v in x.items() if k in self.x_wanted}

        def function(trainable: Params, wanted: Tree) -> Tree:
            return self._outputs(optimizer.merge(trainable, frozen), {**x, **wanted}, batch)

        y, pull = jax.vjp(function, trainable, wanted)
        return y, pull, jax.tree.leaves((trainable, frozen, x, batch))

    def _opened(self, params: Params) -> Params:
        """Parameters as `_run` takes them, or some of them: varying over the data axes, layers cut into runs.

        It stands outside of the VJP. Inside, each run's rows would be residuals: a copy per microbatch in flight."""
        params = jax.tree.map(lambda p: vary(p, DATA_AXES), params)
        return params | {LAYERS: stacks.cut(params.get(LAYERS, {}), self.layers)}

    def _split(self, params: Params) -> tuple[Params, Params]:
        """(trainable, frozen) parameters, opened."""
        trainable, frozen = self.parameters.split(params)
        return self._opened(trainable), self._opened(frozen)

    # -- what the stage reads and yields -------------------------------------------------------------------------

    def _find_reads(self, batch: Abstract) -> list[str]:
        """The arrays of the microbatch that the stage's code looks at: one abstract run, on recorded dicts."""
        reads = self.module.definition.reads
        located = {k: _at(batch[k], sharding(self.plan.mesh, reads[k])) for k in reads}
        found: set[str] = set()

        def probe(params: Params, x: Tree, batch: Tree) -> jax.Array:
            recording = _Recording(batch)
            self._outputs(self._opened(params), dict(x), recording)
            found.update(recording.read)
            return jnp.zeros(())

        self._trace(probe, P(), located)
        return sorted(found)

    def _find_outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract outputs; and, where the stage has a backward, how each residual varies over the mesh."""
        self.y_specs = {"loss": P()} if self.ends_in_loss else {k: spec(d) for k, d in self._dims.items()}
        outputs = lambda p, x, b: self._summed(self._outputs(self._opened(p), dict(x), b))
        y = self._trace(outputs, self.y_specs, self.batch)
        if self.has_backward:

            def probe(params: Params, x: Tree, batch: Tree) -> jax.Array:
                _, pull, inputs = self._vjp(params, dict(x), batch)
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
        return {"loss": lax.psum(y["loss"], DATA_AXES)} if self.ends_in_loss else y

    # -- the programs --------------------------------------------------------------------------------------------

    def _forward(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, list[jax.Array]]:
        if not self.has_backward:
            return self._summed(self._outputs(self._opened(params), x, batch)), []
        y, pull, inputs = self._vjp(params, x, batch)
        return self._summed(y), residuals.take_apart(pull, inputs, AXES)[1]

    def _backward(
        self, params: Params, x: Tree, batch: Tree, kept: list[jax.Array], g: Tree, acc: Tree
    ) -> tuple[Tree, Tree, jax.Array]:
        inputs = jax.tree.leaves((*self._split(params), x, batch))
        pull = residuals.put_together(self._recipe, inputs, kept)
        g_params, g_x = pull({"loss": vary(g["loss"], DATA_AXES)} if self.ends_in_loss else g)
        acc = jax.tree.map(lambda total, new: total + new[None], acc, _closed(g_params))
        return g_x, acc, jnp.zeros((), jnp.int32)

    def _evaluate(self, params: Params, x: Tree, batch: Tree) -> Tree:
        params = self._opened(params)
        if not self.ends_in_loss:
            return self._outputs(params, x, batch)

        def end(last: Params, carry: Tree) -> Tree:
            y = self.module.definition.last.apply(last, carry, batch, self.plan.axes)
            return {
                "loss": loss.token_sum(y["x"], y["head"], batch["targets"], batch["weights"], axes=self.plan.axes),
                "likeliest": loss.token_likeliest(y["x"], y["head"], axes=self.plan.axes),
            }

        y = {k: _settle(v, frozenset(DATA_AXES)) for k, v in self._run(params, x, batch, end).items()}
        return {"loss": lax.psum(y["loss"], DATA_AXES), "likeliest": y["likeliest"]}

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


def _closed(opened: Params) -> Params:
    """What `Stage._opened` cut, joined."""
    layers = stacks.join(list(opened[LAYERS].values()))
    rest = {part: tree for part, tree in opened.items() if part != LAYERS}
    return rest | {LAYERS: layers} if layers else rest


def _settle(y: jax.Array, names: frozenset[str]) -> jax.Array:
    """`y`, typed as varying over exactly the axes `names`.

    Raises ValueError if the model left it different along another axis of size > 1, which would lose values.
    """
    y = vary(y, names)
    extra = tuple(a for a in AXES if a in varying_axes(y) - names)
    for axis in extra:
        if lax.axis_size(axis) > 1:
            raise ValueError(
                f"a model output of shape {y.shape} differs along {axis}; it may differ along {sorted(names)}"
            )
    return lax.psum(y, extra) if extra else y


def _axes_of(where: P) -> frozenset[str]:
    return frozenset(a for part in where if part for a in ((part,) if isinstance(part, str) else part))


def _at(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
