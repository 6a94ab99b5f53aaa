"""Working weights: what a stage's programs multiply with, made of the parameters once a step and not in every program.

A weight that only ever enters products (`Part.uses`) is given to the programs in the precision of the products; those
that share an input lie side by side in one array, for one product. Its parameter, the master, then lives in its
ZeRO shard, and the working weight alone is whole. A weight whose working form would be its parameter as it is, and
whatever else a part has (norms, biases, tables of positions), has no copy: the parameter is whole, and serves as both.

Under ZeRO-3 the working weights lie in shards too, and so do parameters that serve as both. The programs gather them in
the precision of the products (`gathered`): a layer's when it is that layer's turn, those of first and last part once.

    params    llm/layers/attention/q, k, v    float32, cut over tp and over the data replicas
    weights   llm/layers/attention/q          bfloat16 [layers, d, columns of q, k, v], cut over tp: each device's own

Programs differentiate no working weight, but a tap beside it (`models/weight.py`): so its gradient keeps the master's
precision.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import optimizer
from hetjax.core.mesh import Spread, axis_names
from hetjax.core.plan import StagePlan
from hetjax.core.stacks import LAYERS
from models.axes import vary
from models.contract import ModuleDef, Params, Part
from models.paths import Path, at, flat, nested
from models.weight import Pair, Tell, Told, Use, Weight

Tree = Any


class Group(NamedTuple):
    """Weights of one input, by path ("layers", "attention", "q"), that are one working weight, at the first's path."""

    members: tuple[Path, ...]
    lead: int  # dims of the members' common input, layers included
    where: P  # of the working weight
    dim: int | None  # along which it lies in shards (ZeRO-3), None: whole
    inside: tuple[str, ...]  # the mesh axes over which these lie
    copied: bool  # False: it is the parameter itself
    trains: bool

    @property
    def path(self) -> Path:
        """Where the working weight is."""
        return self.members[0]


class Working:
    """How the parameters of one stage become its working weights.

    `leaves`: its abstract parameters, whole, borrowed ones included; `trainable`: those that train. `apart`: leaves
    that no part is given as a `Weight`, because the trainer multiplies with them. `copies` False: products take the
    parameters as they are, and cast them each time.
    """

    def __init__(
        self,
        definition: ModuleDef,
        plan: StagePlan,
        leaves: Tree,
        trainable: Tree,
        *,
        apart: frozenset[Path],
        copies: bool,
    ) -> None:
        self._grid, self._leaves, self._trainable = plan.grid, flat(leaves), flat(trainable)
        self._apart, self._copies, self._dtype = apart, copies, definition.compute_dtype
        uses = _uses(definition, plan)
        self.spreads = {path: self._spread(path, multiplies=path in uses) for path in self._leaves}
        self.groups = tuple(self._group(members, lead) for members, lead in self._sharing(uses))
        self._group_of = {path: group for group in self.groups for path in group.members}
        self.abstract = nested(self._abstract())

    # -- which weights make one ----------------------------------------------------------------------------------

    def _spread(self, path: Path, *, multiplies: bool) -> Spread:
        leaf = self._leaves[path]
        return self._grid.spread(leaf.shape, leaf.sharding.spec, stacked=_stacked(path), multiplies=multiplies)

    def _sharing(self, uses: Mapping[Path, Use]) -> list[tuple[tuple[Path, ...], int]]:
        """The members of each group, and how many dims they share."""
        found: dict[Any, list[Path]] = {}
        for path, leaf in self._leaves.items():
            if path in uses:
                use, shards = uses[path], self._shards(path)
                lead = use.lead + _stacked(path)
                alone = not self._copies or path in self._apart or path not in self._trainable
                alone = alone or (shards is not None and shards >= lead)  # each would be cut inside of its columns
                cut = frozenset(_axes_behind(leaf.sharding.spec, lead))
                key = path if alone else (path[:-1], use, cut, shards)
                found.setdefault(key, []).append(path)
        return [(tuple(paths), uses[paths[0]].lead + _stacked(paths[0])) for paths in found.values()]

    def _shards(self, path: Path) -> int | None:
        """The dim along which the programs are given the parameter at `path` in shards."""
        return self.spreads[path].dim if self._grid.zero == 3 and self.spreads[path].early else None

    def _group(self, members: tuple[Path, ...], lead: int) -> Group:
        first, spread, shards = self._leaves[members[0]], self.spreads[members[0]], self._shards(members[0])
        where = self._given_as(members[0])
        if len(members) > 1:
            axes = _axes_behind(where, lead)
            where = P(*[*where, *[None] * lead][:lead], axes or None)
        copied = len(members) > 1 or self._precision(first) != first.dtype
        inside = () if shards is None else spread.inside
        return Group(members, lead, where, shards, inside, copied, members[0] in self._trainable)

    def _precision(self, leaf: jax.ShapeDtypeStruct | jax.Array) -> Any:
        return self._dtype if self._copies and self._dtype is not None else leaf.dtype

    def _abstract(self) -> dict[Path, jax.ShapeDtypeStruct]:
        found = {path: leaf for path, leaf in self._leaves.items() if path not in self._group_of}
        for group in self.groups:
            shapes = [self._leaves[path].shape for path in group.members]
            shape = shapes[0]
            if len(shapes) > 1:
                shape = (*shape[: group.lead], sum(math.prod(s[group.lead :]) for s in shapes))
            where = NamedSharding(self._grid.mesh, group.where)
            found[group.path] = jax.ShapeDtypeStruct(shape, self._precision(self._leaves[group.path]), sharding=where)
        return found

    def is_copied(self, path: Path) -> bool:
        """Whether the parameter at `path` has a working weight beside it."""
        return path in self._group_of and self._group_of[path].copied

    def master(self, path: Path) -> NamedSharding:
        """Where the parameter at `path` is: whole, or in its ZeRO shard where it has a working weight beside it, or is
        one that lies in shards."""
        spread = self.spreads[path]
        in_shards = self.is_copied(path) or self._shards(path) is not None
        return NamedSharding(self._grid.mesh, spread.cut if in_shards else spread.where)

    # -- from parameters to working weights ----------------------------------------------------------------------

    def copies(self, params: Params, *, moving: bool = False) -> Params:
        """The working weights that are copies, in global view; with `moving` only those of parameters that train."""
        mine = flat(params)
        return nested(
            {
                group.path: self._copy(group, [mine[path] for path in group.members])
                for group in self._made(moving)
                if group.path in mine
            }
        )

    def abstract_copies(self, params: Params, *, moving: bool = False) -> Params:
        """What `copies` makes, as abstract arrays."""
        mine = flat(params)
        return nested({g.path: at(self.abstract, g.path) for g in self._made(moving) if g.path in mine})

    def _made(self, moving: bool) -> list[Group]:
        return [group for group in self.groups if group.copied and (group.trains or not moving)]

    def assemble(self, params: Params, copies: Params) -> Params:
        """The working weights, of the parameters and of what `copies` made of them."""
        own = {path: leaf for path, leaf in flat(params).items() if not self.is_copied(path)}
        return optimizer.merge(nested(own), copies)

    def _copy(self, group: Group, masters: Sequence[jax.Array]) -> jax.Array:
        specs = tuple(self._given_as(path) for path in group.members)
        cast = [self._cast(*each) for each in zip(group.members, masters, specs, strict=True)]
        if len(cast) == 1:
            return cast[0]

        def side_by_side(*shards: jax.Array) -> jax.Array:
            return jnp.concatenate([a.reshape(*a.shape[: group.lead], -1) for a in shards], -1)

        return jax.shard_map(side_by_side, mesh=self._grid.mesh, in_specs=specs, out_specs=group.where)(*cast)

    def _given_as(self, path: Path) -> P:
        """Where the programs take the weight of the parameter at `path`."""
        spread = self.spreads[path]
        return spread.where if self._shards(path) is None else spread.cut

    def _cast(self, path: Path, master: jax.Array, where: P) -> jax.Array:
        # in its shard first: what is gathered then is of the narrower type
        cast = lax.with_sharding_constraint(master.astype(self._precision(master)), self.master(path))
        return lax.with_sharding_constraint(cast, NamedSharding(self._grid.mesh, where))

    # -- from working weights to what a part is given, per device --------------------------------------------------

    def gathered(self, place: str, weights: Params) -> Params:
        """Of a part's working weights (of one layer) those that lie in shards, gathered from the replicas."""
        found = {}
        for group in self.groups:
            value = at(weights, group.path[1:]) if group.path[0] == place else None
            if value is not None and group.dim is not None:
                value = value.astype(self._dtype or value.dtype)  # else what travels would be wider than the products
                dim = group.dim - _stacked(group.path)
                found[group.path[1:]] = lax.all_gather(value, group.inside, axis=dim, tiled=True)
        return nested(found)

    def gathered_bytes(self, place: str) -> int:
        """Bytes on each device of what `gathered` makes for a part, or for one layer that has all kinds of leaves."""
        groups = [group for group in self.groups if group.path[0] == place and group.dim is not None]
        paths = [path for group in groups for path in group.members]
        return sum(self._bytes(path, self._dtype or self._leaves[path].dtype) for path in paths)

    def scattered_bytes(self, place: str) -> int:
        """Bytes on each device of the gradients of a part, or of one such layer, that are scattered together."""
        paths = [path for path in self._trainable if path[0] == place and self.spreads[path].early]
        return sum(self._bytes(path, self._leaves[path].dtype) for path in paths)

    def _bytes(self, path: Path, dtype: Any) -> int:
        return math.prod(self._local(path)) * jnp.dtype(dtype).itemsize

    def differentiated(self, place: str, weights: Params, trainable: Mapping) -> Params:
        """What a part's VJP is taken of: taps, and the parameters that are not only multiplied with.

        `weights`: the part's working weights (of one layer); `trainable`: nested dicts with the leaves that train."""
        tapped = {
            path: (place, *path) in self._group_of and (place, *path) not in self._apart for path in flat(trainable)
        }
        return nested({path: self.tap((place, *path)) if tapped[path] else at(weights, path) for path in tapped})

    def tap(self, path: Path) -> jax.Array:
        """Zeros like the parameter at `path` on one device."""
        leaf = self._leaves[path]
        return vary(jnp.zeros(self._local(path), leaf.dtype), self._grid.meets(leaf.sharding.spec))

    def _local(self, path: Path) -> tuple[int, ...]:
        """One device's shape of the leaf at `path`, of one layer."""
        leaf = self._leaves[path]
        return leaf.sharding.shard_shape(leaf.shape)[_stacked(path) :]

    def given(
        self,
        place: str,
        weights: Params,
        differentiated: Params,
        pairs: Mapping[Path, Pair] = MappingProxyType({}),
        tell: Tell | None = None,
    ) -> Params:
        """The parameters that a part is applied to, of what `differentiated` made, and of the `pairs` that stand in
        place of some taps, by path in the part. `tell`: who hears of the products (see `Told`)."""
        found = {}
        for group in self.groups:
            if group.path[0] != place or group.path in self._apart or (value := at(weights, group.path[1:])) is None:
                continue
            column, lead = 0, group.lead - _stacked(group.path)
            for path in group.members:
                shape, alone = self._local(path), len(group.members) == 1
                tap = pairs.get(path[1:], at(differentiated, path[1:]))
                told = None if tell is None or tap is None else Told(path[1:], tell)
                found[path[1:]] = weight = Weight(value, tap, shape, None if alone else column, lead, told)
                column += weight.columns
        return optimizer.merge(nested(found), optimizer.merge(differentiated, weights))


def _uses(definition: ModuleDef, plan: StagePlan) -> dict[Path, Use]:
    parts: list[tuple[str, Part]] = [(LAYERS, part) for part in definition.layers[plan.lo : plan.hi]]
    parts += [("first", definition.first)] * plan.first + [("last", definition.last)] * plan.last
    return {(place, *path): use for place, part in parts for path, use in part.uses.items()}


def _axes_behind(where: P, dim: int) -> tuple[str, ...]:
    """The mesh axes that cut the dims from `dim` on."""
    return tuple(axis for entry in tuple(where)[dim:] for axis in axis_names(entry))


def _stacked(path: Path) -> bool:
    """Whether the leaf at `path` is stacked over layers."""
    return path[0] == LAYERS
