"""A stage's parameters: their values at step 0, and how they, their gradients and the optimizer's state are sharded.

    leaves   the module's specs: cut over tp, repeated over the data replicas
    params   the same, but those with a working weight beside them (`working.py`) are cut over the data replicas too
    weights  what the programs are given: working weights, and the other parameters as they are; ZeRO-3 cuts them too
    acc      one gradient per data replica: a leading dim over them, where there is more than one; under ZeRO-2 and 3
             cut over the replicas that share one set of shards, and the leading dim is over such sets
    grads    their sum, cut over the data replicas too, like the optimizer's state; `acc` itself where it has no leading
             dim

A leaf that loads move (`balance.py`) is a parameter and a weight, and has none of the others.

Which replicas a leaf has, and over which of them it is cut, is its own (`Spread` in `mesh.py`). Where tp does not
divide a vocabulary, all of these are padded: zeros are behind the values, which are drawn at the true size, and stay
there, since their gradients are zero.

A leaf that two stages share (the head tied to the embedding under pp) is owned by the module's first stage, which lends
it; the last one borrows its working weight: it has gradients there, and neither parameter nor optimizer state. So the
first replica of a module owns all leaves, and the others borrow them.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import balance, optimizer, stacks
from hetjax.core.balance import Balance
from hetjax.core.graph import Module
from hetjax.core.mesh import Spread
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.plan import StagePlan
from hetjax.core.stacks import LAYERS
from hetjax.core.working import Working
from models.contract import Dims, ModuleDef, Params
from models.layers import wide
from models.paths import Path, at, flat, nested

Tree = Any
KeyPath = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it
FIRST_KEY, LAST_KEY = 1 << 20, (1 << 20) + 1  # beside the layers' keys, which are their indices


class Parameters:
    """Abstract trees (shape, dtype, sharding) of one stage, and the functions that make them concrete."""

    def __init__(self, module: Module, plan: StagePlan, config: OptimizerConfig, *, seed: int, dtype: Any) -> None:
        self._module, self._plan, self._seed, self.dtype = module, plan, seed, dtype
        self.config = config
        self.tied = dict(module.definition.tied) if plan.last else {}  # leaf of `last` -> leaf of `first`
        self.is_replica = plan.share.replica > 0
        self._from_first = frozenset(("last", leaf) for leaf in self.tied if not plan.first)
        self._dims = param_dims(module.definition, plan)
        if plan.first:  # one leaf serves both parts
            for leaf in self.tied:
                del self._dims["last", leaf]
        self.specs = nested({path: plan.grid.spec(dims) for path, dims in self._dims.items()})
        self.balanced = balance.paths(module.definition, plan.lo, plan.hi)
        self._true = _by_tail(jax.eval_shape(self._draw, jax.random.key(0)))
        self.leaves = jax.tree.map(self._at, jax.eval_shape(self._make, jax.random.key(0)), self.specs)
        self.trainable, self.frozen = self.split(self.leaves)
        self.borrowed: frozenset[Path] = frozenset(self._dims) if self.is_replica else self._from_first
        apart = {("last", module.definition.head), *self._from_first}
        whole = self.leaves, self.trainable
        self.working = Working(module.definition, plan, *whole, apart=frozenset(apart), copies=module.weight_copies)
        self.params = jax.tree_util.tree_map_with_path(self._master, self.owned(self.leaves))
        self.weights = self.working.abstract
        self.copies = self.working.abstract_copies(self.params)  # what of the weights are not parameters themselves
        self.moving = self.working.abstract_copies(self.params, moving=True)  # and change with each step
        kept = {path: leaf for path, leaf in flat(self.params).items() if not self.working.is_copied(path)}
        self._used_as_they_are = nested(kept)
        self.trains = bool(self.trainable)
        lends = plan.first and not plan.last
        self.lent: frozenset[Path] = frozenset(("first", source) for source in module.definition.tied.values() if lends)
        if plan.share.replicas > 1 and not self.is_replica:
            self.lent = frozenset(flat(self.trainable))
        self.balance = Balance.of(module.definition, plan, lambda path: config.trains("/".join((module.name, *path))))
        self.loads = self._abstract_loads()
        self.moves = not self.is_replica and (self.trains or bool(self.loads))
        self.spreads = nested({path: self.working.spreads[path] for path in flat(self.trainable)})
        self._several = nested({path: spread for path, spread in flat(self.spreads).items() if spread.count > 1})
        self.are_repeated = bool(self._several)
        self.grads = jax.tree.map(lambda a, spread: self._at(a, spread.cut), self.trainable, self.spreads)
        self.acc = jax.tree.map(self._accumulator, self.trainable, self.spreads)
        self.tx = optimizer.transformation(config, module.name)
        self.state = self._abstract_state() if self.has_state else ()

    def split(self, params: Params) -> tuple[Params, Params]:
        """(trainable, frozen) leaves; a borrowed leaf, if it is there, trains where its owner does."""
        own = _without(params, self._from_first)
        trainable, frozen = optimizer.split(self.config, self._module.name, own, apart=self.balanced)
        for part, leaf in self._from_first:
            if leaf not in params.get(part, {}):
                continue
            owner = f"{self._module.name}/first/{self.tied[leaf]}"
            side = trainable if self.config.trains(owner) else frozen
            side.setdefault(part, {})[leaf] = params[part][leaf]
        return trainable, frozen

    @property
    def has_state(self) -> bool:
        """Whether it is here that the optimizer's state of what trains is held."""
        return self.trains and not self.is_replica

    def moving_of(self, weights: Params) -> Params:
        """What of concrete working weights `moving` describes."""
        return _at_paths(weights, self.moving)

    def masters(self, params: Params) -> Params:
        """The parameters that have working weights beside them."""
        return nested({path: leaf for path, leaf in flat(params).items() if self.working.is_copied(path)})

    def all_of(self, masters: Params, weights: Params) -> Params:
        """The parameters: `masters`, and those working weights that are parameters themselves."""
        return optimizer.merge(_at_paths(weights, self._used_as_they_are), masters)

    def multipliers(self, params: Params) -> Tree:
        """Learning-rate multiplier of every leaf."""
        return optimizer.multipliers(self.config, self._module.name, params)

    def owned(self, tree: Tree) -> Tree:
        """Nested dicts of leaves without those that the stage borrows."""
        return _without(tree, self.borrowed)

    def complete(self, tree: Tree) -> Tree:
        """Of nested dicts of gradients, those to which no other stage adds: all owned leaves but the lent ones."""
        return _without(tree, self.borrowed | self.lent)

    def repeated(self, tree: Tree) -> Tree:
        """Of nested dicts with what belongs to trainable leaves, that of those which have several accumulators."""
        return _at_paths(tree, self._several)

    def layers_of(self, path: Sequence[str]) -> list[int]:
        """The module's layers whose rows the stacked leaf at `path` holds; `path` begins behind "layers"."""
        return stacks.holders(self._module.definition, path, self._plan.lo, self._plan.hi)

    def full_last(self, params: Params) -> Params:
        """Of all parameters or some of them: those of `last`, with the leaves that it shares with `first` where this
        stage has both."""
        first = params.get("first", {}) if self._plan.first else {}
        shared = {leaf: first[source] for leaf, source in self.tied.items() if source in first}
        return {**params.get("last", {}), **shared}

    def place_in_last(self, leaf: str) -> tuple[str, str]:
        """(part, name) under which the stage has the leaf that `full_last` calls `leaf`."""
        shared = self._plan.first and leaf in self.tied
        return ("first", self.tied[leaf]) if shared else ("last", leaf)

    def true_shape(self, path: KeyPath, leaf: Any) -> tuple[int, ...]:
        """The shape without padding of a leaf of parameters, gradients or optimizer state."""
        found = _at_tail(self._true, path)
        return found.shape if found is not None and leaf.ndim else leaf.shape

    def _make(self, key: jax.Array) -> Params:
        drawn = flat(self._draw(key))
        return nested({path: pad(a, self._plan.grid.padded(a.shape, self._dims[path])) for path, a in drawn.items()})

    def _draw(self, key: jax.Array) -> Params:
        definition, plan = self._module.definition, self._plan
        key = jax.random.fold_in(key, zlib.crc32(self._module.name.encode()) & 0x7FFFFFFF)
        part_key = lambda n: jax.random.fold_in(key, n)
        keys = jax.vmap(part_key)(jnp.arange(plan.lo, plan.hi))
        params: Params = {LAYERS: stacks.init(definition.layers[plan.lo : plan.hi], keys)}
        first = definition.first.init(part_key(FIRST_KEY)) if plan.first or self._from_first else {}
        if plan.first:
            params["first"] = first
        if plan.last:
            last = dict(definition.last.init(part_key(LAST_KEY)))
            for leaf in self.tied:
                del last[leaf]
            params["last"] = last | {leaf: first[self.tied[leaf]] for _, leaf in self._from_first}
        of = lambda path: wide(self.dtype) if path in self.balanced else self.dtype
        return nested({path: a.astype(of(path)) for path, a in flat(params).items()})

    def init(self) -> Params:
        """Fresh values: functions of seed, module name, part and global layer index alone."""
        make = lambda: self.owned(self._make(jax.random.key(self._seed)))
        return jax.jit(make, out_shardings=shardings(self.params))()

    def laid(self, params: Params) -> Params:
        """The parameters of another trainer of this stage, which may have cut others into ZeRO shards: other ones
        trained."""
        return jax.jit(lambda params: params, out_shardings=shardings(self.params))(params)

    def init_state(self, params: Params) -> Tree:
        """The optimizer's state before the first step."""
        if not self.has_state:
            return ()
        return jax.jit(self.tx.init, out_shardings=shardings(self.state))(self.split(params)[0])

    def zeros(self) -> Tree:
        """Gradient accumulators, in the parameters' precision; nobody reads what is in them."""
        make = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.acc)
        return jax.jit(make, out_shardings=shardings(self.acc))()

    def _abstract_loads(self) -> list[jax.ShapeDtypeStruct]:
        """All loads of the module's experts, [layers with experts, experts], where they move something; or none."""
        shapes = {(self.balance.layers, at(self.leaves, path).shape[-1]) for path in self.balance.rows}
        return [self._at(jax.ShapeDtypeStruct(shape, wide(self.dtype)), P()) for shape in shapes]

    def _abstract_state(self) -> Tree:
        """Moments lie as their gradients do: the tail of a moment's path is its parameter's; scalars are repeated."""
        grads = _by_tail(self.owned(self.grads))

        def place(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            grad = _at_tail(grads, path)
            return self._at(leaf, grad.sharding.spec if grad is not None and leaf.ndim else P())

        state = jax.eval_shape(self.tx.init, self.owned(self.trainable))
        return jax.tree_util.tree_map_with_path(place, state)

    def _master(self, path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.working.master(tuple(k.key for k in path)))

    def _accumulator(self, leaf: jax.ShapeDtypeStruct, spread: Spread) -> jax.ShapeDtypeStruct:
        if spread.count == 1:
            return self._at(leaf, spread.cut if spread.early else spread.where)
        return self._at(jax.ShapeDtypeStruct((spread.count, *leaf.shape), leaf.dtype), spread.accumulator)

    def _at(self, a: Any, where: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(self._plan.mesh, where))


def param_dims(definition: ModuleDef, plan: StagePlan) -> dict[Path, Dims]:
    """Logical dims of a stage's parameters: those of "first", "layers" and "last", as far as the stage has them."""
    found: dict[Path, Dims] = {}
    if plan.first:
        found |= flat({"first": definition.first.logical})
    if plan.hi > plan.lo:
        kinds = [part.logical for part in definition.layers[plan.lo : plan.hi]]
        of_layer = flat({LAYERS: stacks.join(kinds, lambda same: same[0])})
        found |= {path: (None, *dims) for path, dims in of_layer.items()}
    if plan.last:
        found |= flat({"last": definition.last.logical})
    return found


def pad(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`a` with zeros behind it, of this shape."""
    return jnp.pad(a, [(0, more - size) for size, more in zip(a.shape, shape, strict=True)]) if a.shape != shape else a


def _by_tail(params: Tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _at_tail(found: Mapping[str, Any], path: KeyPath) -> Any:
    """What belongs to the parameter of a leaf, whose path ends in that of its parameter; or None."""
    tails = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
    return next((found[tail] for tail in tails if tail in found), None)


def shardings(tree: Tree) -> Tree:
    """The shardings of abstract arrays."""
    return jax.tree.map(lambda a: a.sharding, tree)


def spec_tree(tree: Tree) -> Tree:
    """The partition specs of abstract arrays."""
    return jax.tree.map(lambda a: a.sharding.spec, tree)


def _without(tree: Tree, leaves: frozenset[Path]) -> Tree:
    """Nested dicts without the leaves at these paths, nor dicts that have no others."""
    if not leaves or not isinstance(tree, dict):
        return tree
    return nested({path: leaf for path, leaf in flat(tree).items() if path not in leaves})


def _at_paths(tree: Tree, like: Tree) -> Tree:
    """The part of nested dict `tree` at the paths of nested dict `like`."""
    return {k: _at_paths(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}
