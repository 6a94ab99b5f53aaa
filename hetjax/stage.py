"""One pipeline stage: a range of a module's layers on one mesh, as four compiled programs.

    forward   (params, x, batch)                       -> (y, residuals)
    backward  (params, x, batch, residuals, g, acc)    -> (gx, acc, done)     acc is donated
    reduce    (acc)                                    -> (grads, acc)        once a step; acc is donated and zeroed
    update    (params, state, grads, scale, ok, rates) -> (params, state)     params, state and grads are donated

Forward and backward are per-device programs, ONE `jax.shard_map` over all axes. The VJP is taken inside, of parameters
cast to varying over the data axes: so no data-parallel collective is inserted, and each data replica accumulates its own
gradient in `acc` (a leading replica dim) until `reduce` scatters the sum over the replicas (ZeRO-1).
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from hetjax import loss, optimizer, residuals
from hetjax.graph import Module, Remat
from hetjax.layout import AXES, DATA_AXES, StagePlan, param_specs, sharding, spec, zero_spec
from models.axes import vary, varying_axes
from models.contract import Params

Tree = Any
POLICIES = {
    Remat.NONE: None,
    Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


class Shapes(NamedTuple):
    """What enters and leaves a stage, as abstract arrays with shardings."""

    x: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    y: dict[str, jax.ShapeDtypeStruct]


class _Recording(dict):
    """A batch that remembers which of its arrays a model read."""

    def __init__(self, items: Mapping[str, jax.Array]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> jax.Array:
        self.read.add(key)
        return super().__getitem__(key)


def settle(y: jax.Array, wanted: P) -> jax.Array:
    """`y`, typed as varying over exactly the axes that `wanted` names.

    Raises ValueError if the model left it different along another axis of size > 1, which would lose values.
    """
    names = _axes_of(wanted)
    y = vary(y, names)
    extra = tuple(a for a in AXES if a in varying_axes(y) - names)
    for axis in extra:
        if lax.axis_size(axis) > 1:
            raise ValueError(f"a model output of shape {y.shape} differs along {axis}, but its dims say {wanted}")
    return lax.psum(y, extra) if extra else y


def _axes_of(wanted: P) -> frozenset[str]:
    return frozenset(a for part in wanted if part for a in ((part,) if isinstance(part, str) else part))


class Stage:
    """The programs of one stage. `x_wanted`: the keys of x whose producers train; empty means no input gradient.

    `shapes_x` are the abstract inputs (empty for the first stage of an encoder); `batch` the abstract microbatch.
    """

    def __init__(
        self,
        module: Module,
        plan: StagePlan,
        config: optimizer.OptimizerConfig,
        *,
        is_sink: bool,
        x: dict[str, jax.ShapeDtypeStruct],
        x_wanted: frozenset[str],
        batch: Mapping[str, jax.ShapeDtypeStruct],
        seed: int,
        param_dtype: jnp.dtype,
    ) -> None:
        self.module, self.plan, self.is_sink = module, plan, is_sink
        self.mesh, self.axes = plan.mesh, plan.axes
        self._config, self._seed, self._param_dtype = config, seed, param_dtype
        definition = module.definition
        self.specs = param_specs(definition, plan)
        self.tied = {a: b for a, b in definition.tied.items() if plan.last}
        if plan.first and self.tied:  # one leaf serves both parts
            for path in self.tied:
                del self.specs["last"][path]
        abstract = jax.eval_shape(self._init, jax.random.key(0))
        self.params = jax.tree.map(lambda a, s: _abstract(a, self._named(s)), abstract, self.specs)
        self.trainable, self.frozen = optimizer.split(config, module.name, self.params)
        self.x_wanted = x_wanted
        self.has_backward = bool(x_wanted) or bool(jax.tree.leaves(self.trainable))
        self.x_specs = {k: v.sharding.spec for k, v in x.items()}
        self.shapes = self._trace(x, batch)
        self.num_replicas = plan.mesh.shape["dp"] * plan.mesh.shape["cp"]
        trainable_specs = _matching(self.specs, self.trainable)
        self.acc_specs = jax.tree.map(lambda s: P(DATA_AXES, *s), trainable_specs)
        self.acc = jax.tree.map(
            lambda a, s: _abstract(jax.ShapeDtypeStruct((self.num_replicas, *a.shape), a.dtype), self._named(s)),
            self.trainable,
            self.acc_specs,
        )
        zero = jax.tree.map(lambda a, s: zero_spec(a.shape, s, plan.mesh), self.trainable, trainable_specs)
        is_pair = lambda z: isinstance(z, tuple) and not isinstance(z, P)
        self.zero_specs = jax.tree.map(lambda z: z[0], zero, is_leaf=is_pair)
        self.zero_dims = jax.tree.map(lambda z: -1 if z[1] is None else z[1], zero, is_leaf=is_pair)
        self.grads = jax.tree.map(lambda a, s: _abstract(a, self._named(s)), self.trainable, self.zero_specs)
        self.tx = optimizer.transformation(config, module.name, self.owned(self.trainable))
        self.state = self._abstract_state()

    # -- parameters ----------------------------------------------------------------------------------------------

    def owned(self, tree: Tree) -> Tree:
        """`tree` of trainable leaves without those that another stage owns (the head tied to the embedding under pp)."""
        if not self.borrowed or not isinstance(tree, dict):
            return tree
        return {part: {k: v for k, v in leaves.items() if (part, k) not in self.borrowed} for part, leaves in tree.items()}

    @property
    def borrowed(self) -> frozenset[tuple[str, str]]:
        """Leaves of `last` that are copies of leaves of the module's first stage."""
        return frozenset(("last", a) for a in self.tied) if not self.plan.first else frozenset()

    def _init(self, key: jax.Array) -> Params:
        definition, plan = self.module.definition, self.plan
        key = jax.random.fold_in(key, zlib.crc32(self.module.name.encode()) & 0x7FFFFFFF)
        part_key = lambda n: jax.random.fold_in(key, n)
        params: Params = {}
        first = definition.first.init(part_key(1 << 20)) if plan.first or self.tied else {}
        if plan.first:
            params["first"] = first
        if plan.hi > plan.lo:
            keys = jax.vmap(part_key)(jnp.arange(plan.lo, plan.hi))
            params["layers"] = jax.vmap(definition.layer.init)(keys)
        if plan.last:
            params["last"] = dict(definition.last.init(part_key((1 << 20) + 1)))
            for path, source in self.tied.items():
                if plan.first:
                    del params["last"][path]
                else:
                    params["last"][path] = first[source]
        return jax.tree.map(lambda a: a.astype(self._param_dtype), params)

    def init(self) -> tuple[Params, Tree]:
        """Fresh parameters and optimizer state: functions of seed, module name, part and global layer index alone."""
        shardings = jax.tree.map(lambda a: a.sharding, self.params)
        params = jax.jit(self._init, out_shardings=shardings)(jax.random.key(self._seed))
        return params, self.init_state(params)

    def init_state(self, params: Params) -> Tree:
        """The optimizer's state before the first step, sharded over the data replicas."""
        owned = self.owned(optimizer.split(self._config, self.module.name, params)[0])
        return jax.jit(self.tx.init, out_shardings=jax.tree.map(lambda a: a.sharding, self.state))(owned)

    def _abstract_state(self) -> Tree:
        owned, grads = self.owned(self.trainable), self.owned(self.grads)
        state = jax.eval_shape(self.tx.init, owned)
        by_path = {jax.tree_util.keystr(k): g.sharding for k, g in jax.tree_util.tree_leaves_with_path(grads)}

        def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            tail = next((by_path[t] for i in range(len(path)) if (t := jax.tree_util.keystr(path[i:])) in by_path), None)
            return _abstract(leaf, tail if tail is not None and leaf.ndim else self._named(P()))

        return jax.tree_util.tree_map_with_path(place, state)

    def _named(self, spec_: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec_)

    # -- the model on one device ---------------------------------------------------------------------------------

    def _run(self, params: Params, x: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        definition, plan = self.module.definition, self.plan
        carry = definition.first.apply(params["first"], x, batch, self.axes) if plan.first else x
        if plan.hi > plan.lo:
            layer = lambda w, c: definition.layer.apply(w, c, batch, self.axes)
            if self.module.remat is not Remat.NONE:
                layer = jax.checkpoint(layer, policy=POLICIES[self.module.remat], prevent_cse=False)
            carry = lax.scan(lambda c, w: (layer(w, c), None), carry, params["layers"])[0]
        if not plan.last:
            return {k: settle(v, spec(definition.carry[k])) for k, v in carry.items()}
        last = dict(params["last"])
        if plan.first:
            last |= {path: params["first"][source] for path, source in self.tied.items()}
        y = definition.last.apply(last, carry, batch, self.axes)
        if self.is_sink:
            total = loss.token_sum(y["x"], y["head"], batch["targets"], batch["weights"], axes=self.axes)
            return {"loss": settle(total, P(DATA_AXES))}
        return {k: settle(v, spec(definition.output[k])) for k, v in y.items()}

    def _vjp(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, Callable[..., Tree], list[jax.Array]]:
        """Outputs, VJP in (trainable parameters, wanted inputs), and the flat inputs that the VJP may refer to."""
        trainable, frozen, x, batch = self._inputs(params, x, batch)
        wanted = {k: v for k, v in x.items() if k in self.x_wanted}

        def function(trainable: Params, wanted: Tree) -> Tree:
            return self._run(optimizer.merge(trainable, frozen), x | wanted, batch)

        y, pull = jax.vjp(function, trainable, wanted)
        return y, pull, jax.tree.leaves((trainable, frozen, x, batch))

    def _inputs(self, params: Params, x: Tree, batch: Tree) -> tuple[Params, Params, Tree, Tree]:
        params = jax.tree.map(lambda p: vary(p, DATA_AXES), params)
        return *optimizer.split(self._config, self.module.name, params), dict(x), dict(batch)

    def _shard_map(self, function: Callable[..., Tree], in_specs: Tree, out_specs: Tree) -> Callable[..., Tree]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def _trace(self, x: dict[str, jax.ShapeDtypeStruct], batch: Mapping[str, jax.ShapeDtypeStruct]) -> Shapes:
        """One abstract run: finds what the stage reads, what it yields, and how each residual varies over the mesh."""
        reads = self.module.definition.reads
        batch = {k: _abstract(batch[k], sharding(self.mesh, reads[k])) for k in reads}
        specs_in = (self.specs, self.x_specs, {k: v.sharding.spec for k, v in batch.items()})
        held: dict[str, Any] = {}

        def probe(params: Params, x: Tree, batch: Tree) -> Tree:
            recording = _Recording(batch)
            held["y"] = self._run(jax.tree.map(lambda p: vary(p, DATA_AXES), params), x, recording)
            held["read"] = recording.read
            return held["y"]

        if self.plan.last and self.is_sink:
            y_specs = {"loss": P()}
        else:
            dims = self.module.definition.output if self.plan.last else self.module.definition.carry
            y_specs = {k: spec(d) for k, d in dims.items()}
        self.y_specs = y_specs
        on_edge = self._close_loss(probe)
        y = jax.eval_shape(self._shard_map(on_edge, specs_in, y_specs), self.params, x, batch)
        batch = {k: v for k, v in batch.items() if k in held["read"]}
        y = {k: _abstract(v, self._named(y_specs[k])) for k, v in y.items()}
        self._batch_specs = {k: v.sharding.spec for k, v in batch.items()}
        if self.has_backward:
            self._probe_residuals(x, batch)
        return Shapes(x, batch, y)

    def _close_loss(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        """The loss is summed over the data axes where it leaves the stage, outside of the VJP."""
        if not (self.plan.last and self.is_sink):
            return function
        return lambda *args: {"loss": lax.psum(function(*args)["loss"], DATA_AXES)}

    def _probe_residuals(self, x: Tree, batch: Tree) -> None:
        def probe(params: Params, x: Tree, batch: Tree) -> jax.Array:
            _, pull, inputs = self._vjp(params, x, batch)
            self.recipe, _ = residuals.take_apart(pull, inputs, AXES)
            return jnp.zeros(())

        jax.eval_shape(self._shard_map(probe, (self.specs, self.x_specs, self._batch_specs), P()), self.params, x, batch)

    # -- the programs --------------------------------------------------------------------------------------------

    def _forward(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, list[jax.Array]]:
        if not self.has_backward:
            y, kept = self._run(jax.tree.map(lambda p: vary(p, DATA_AXES), params), x, batch), []
        else:
            y, pull, inputs = self._vjp(params, x, batch)
            kept = residuals.take_apart(pull, inputs, AXES)[1]
        if self.plan.last and self.is_sink:
            y = {"loss": lax.psum(y["loss"], DATA_AXES)}
        return y, kept

    def _backward(self, params: Params, x: Tree, batch: Tree, kept: list, g: Tree, acc: Tree) -> tuple[Tree, Tree, jax.Array]:
        inputs = jax.tree.leaves(self._inputs(params, x, batch))
        pull = residuals.put_together(self.recipe, inputs, kept)
        if self.plan.last and self.is_sink:
            g = {"loss": vary(g["loss"], DATA_AXES)}
        g_params, g_x = pull(g)
        acc = jax.tree.map(lambda total, new: total + new[None], acc, g_params)
        return g_x, acc, jnp.zeros((), jnp.int32)

    def _reduce(self, acc: Tree) -> tuple[Tree, Tree]:
        def reduce_leaf(leaf: jax.Array, dim: int) -> jax.Array:
            if dim < 0:
                return lax.psum(leaf[0], DATA_AXES)
            return lax.psum_scatter(leaf[0], DATA_AXES, scatter_dimension=dim, tiled=True)

        return jax.tree.map(reduce_leaf, acc, self.zero_dims), jax.tree.map(jnp.zeros_like, acc)

    def _update(self, params: Params, state: Tree, grads: Tree, scale: jax.Array, ok: jax.Array, rate: jax.Array) -> tuple[Params, Tree]:
        trainable, frozen = optimizer.split(self._config, self.module.name, params)
        owned, grads = self.owned(trainable), self.owned(grads)
        zero = jax.tree.map(lambda a: a.sharding, self.owned(self.grads))
        shards = jax.tree.map(lax.with_sharding_constraint, owned, zero)
        multipliers = optimizer.multipliers(self._config, self.module.name, owned)
        shards, state = optimizer.apply_update(
            self.tx, shards, state, grads, learning_rate=rate, multipliers=multipliers, scale=scale, ok=ok
        )
        return optimizer.merge(optimizer.merge(shards, trainable), frozen), state

    def compile(self) -> dict[str, Callable[[], None]]:
        """Name -> thunk that compiles one program. `forward`, `backward`, `reduce`, `update` are callable afterwards."""
        shapes, edge = self.shapes, self._shard_map
        inputs = (self.specs, self.x_specs, self._batch_specs)
        kept_specs = residuals.specs(self.recipe) if self.has_backward else []
        forward = edge(self._forward, inputs, (self.y_specs, kept_specs))
        thunks = {"forward": functools.partial(self._build, "forward", forward, (self.params, shapes.x, shapes.batch))}
        if self.has_backward:
            kept = jax.eval_shape(forward, self.params, shapes.x, shapes.batch)[1]
            kept = [_abstract(a, self._named(s)) for a, s in zip(kept, kept_specs, strict=True)]
            self.kept = kept
            g_x = {k: self.x_specs[k] for k in self.x_specs if k in self.x_wanted}
            backward = edge(self._backward, (*inputs, kept_specs, self.y_specs, self.acc_specs), (g_x, self.acc_specs, P()))
            args = (self.params, shapes.x, shapes.batch, kept, shapes.y, self.acc)
            thunks["backward"] = functools.partial(self._build, "backward", backward, args, donate=(5,))
        if jax.tree.leaves(self.trainable):
            reduce = edge(self._reduce, (self.acc_specs,), (self.zero_specs, self.acc_specs))
            thunks["reduce"] = functools.partial(self._build, "reduce", reduce, (self.acc,), donate=(0,))
            scalar = lambda dtype: _abstract(jax.ShapeDtypeStruct((), dtype), self._named(P()))
            wide = jnp.promote_types(self._param_dtype, jnp.float32)
            args = (self.params, self.state, self.grads, scalar(wide), scalar(jnp.bool_), scalar(wide))
            out = jax.tree.map(lambda a: a.sharding, (self.params, self.state))
            thunks["update"] = functools.partial(self._build, "update", self._update, args, donate=(0, 1), out_shardings=out)
        return thunks

    def _build(self, name: str, function: Callable[..., Tree], args: tuple, *, donate: tuple[int, ...] = (), out_shardings: Tree = None) -> None:
        options = {} if out_shardings is None else {"out_shardings": out_shardings}
        compiled = jax.jit(function, donate_argnums=donate, **options).lower(*args).compile()
        setattr(self, name, compiled)

    def zeros(self) -> Tree:
        """Empty gradient accumulators: one per data replica, in the parameters' precision."""
        make = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.acc)
        return jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, self.acc))()


def _abstract(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)


def _matching(tree: Tree, like: Tree) -> Tree:
    """The part of nested dict `tree` at the paths of nested dict `like`."""
    return {k: _matching(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}
