"""A state's arrays by the names that a checkpoint has for them, layers one by one, and the state from them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import stacks
from hetjax.core.alive import HOST, on_device
from hetjax.core.parameters import pad
from hetjax.core.stage import Stage
from hetjax.core.tasks import StageKey, Thing, What
from hetjax.core.trainer import State, Thunks, Trainer, is_stacked, path_parts
from hetjax.run.union import Union

Names = dict[str, Any]  # name -> array, abstract or not


def programs(trainer: Trainer) -> Thunks:
    """What a save runs, to be compiled with the rest; without it the first save compiles."""
    found: list[tuple[str, Callable[[], object]]] = [
        (f"{module}/{index} copy", functools.partial(_compile_copy, (module, index), stage))
        for (module, index), stage in _storing(trainer).items()
        if (module, index) in trainer.pipeline.mine
    ]
    if jax.process_count() > 1:
        for key, stage in _storing(trainer).items():
            found += [(f"{key[0]}/{key[1]} save {n}", c) for n, c in _union(trainer, _stored(key, stage)).programs()]
    return found


def _compile_copy(key: StageKey, stage: Stage) -> None:
    leaves = tuple(jax.tree.leaves((stage.parameters.params, stage.parameters.state)))
    compiled = _copies.lower(leaves, stored=_stored(key, stage)).compile()
    stage.memory["copy"] = compiled.memory_analysis()
    stage.programs["copy"] = compiled


class Stored(NamedTuple):
    """A leaf as a checkpoint has it: the arrays' names, one for each layer if it is stacked, and what each is like."""

    names: tuple[str, ...]
    array: jax.ShapeDtypeStruct  # without padding
    stacked: bool
    what: What


def to_names(trainer: Trainer, state: State) -> Names:
    """Copies of a state's arrays by name, layers one by one; the step may donate the originals at once."""
    names: Names = {}
    for key, stage in _storing(trainer).items():
        stored, copies = _stored(key, stage), None
        if key in trainer.pipeline.mine:
            copy = stage.programs.get("copy") or functools.partial(_copies, stored=stored)
            arrays = copy(tuple(jax.tree.leaves(on_device((state.params[key], state.optimizer[key])))))
            copies = dict(zip(_all_names(stored), arrays, strict=True))
        if jax.process_count() > 1:
            names |= _union(trainer, stored).to_all(copies)
        elif copies:
            names |= zip(copies, jax.device_put(list(copies.values()), _places(trainer, key, stored)), strict=True)
    return names


def abstract_names(trainer: Trainer) -> Names:
    """The abstract arrays, with shardings, that `from_names` takes."""
    names: Names = {}
    for key, stage in _storing(trainer).items():
        stored = _stored(key, stage)
        if jax.process_count() > 1:
            names |= _union(trainer, stored).spread
            continue
        for (name, a), place in zip(_abstract(stored).items(), _places(trainer, key, stored), strict=True):
            names[name] = jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    return names


def _storing(trainer: Trainer) -> dict[StageKey, Stage]:
    """The stages that have parameters of their own: not the replicas of others."""
    return {key: stage for key, stage in trainer.pipeline.stages.items() if not stage.parameters.is_replica}


def _places(trainer: Trainer, key: StageKey, stored: Sequence[Stored]) -> list[NamedSharding]:
    """Where the arrays of a stage's checkpoint are, name by name: on the host if that is where the state has them."""
    home = {leaf.what: Thing(leaf.what, key) in trainer.pipeline.schedule.home for leaf in stored}
    own = [leaf.array.sharding.with_memory_kind(HOST if home[leaf.what] else "device") for leaf in stored]
    return [place for leaf, place in zip(stored, own, strict=True) for _ in leaf.names]


def from_names(trainer: Trainer, names: Names, step: int) -> State:
    """A state from arrays by name."""
    params: dict[StageKey, Any] = {key: {} for key in trainer.pipeline.stages_here}
    states: dict[StageKey, Any] = dict.fromkeys(params, ())
    for key, stage in _storing(trainer).items():
        abstract = (stage.parameters.params, stage.parameters.state)
        leaves, stored = tuple(jax.tree.leaves(abstract)), _stored(key, stage)
        rows = _on_stage(trainer, stored, names)
        if key not in trainer.pipeline.mine:
            continue
        where = [leaf.sharding for leaf in leaves]
        joined = jax.jit(functools.partial(_join, stored, leaves), out_shardings=where)(rows)
        mine, state = jax.tree.unflatten(jax.tree.structure(abstract), joined)
        params[key] = trainer.pipeline.at_home(What.MASTERS, key, mine)
        states[key] = trainer.pipeline.at_home(What.STATE, key, state)
    return trainer.state(params, states, step)


def _on_stage(trainer: Trainer, stored: tuple[Stored, ...], names: Names) -> list[jax.Array]:
    """A stage's arrays, on its devices."""
    wanted = _abstract(stored)
    if jax.process_count() == 1:
        return jax.device_put([names[name] for name in wanted], [a.sharding for a in wanted.values()])
    moved = _union(trainer, stored).to_stage({name: names[name] for name in wanted})
    return [moved[name] for name in wanted]


def _union(trainer: Trainer, stored: tuple[Stored, ...]) -> Union:
    return _make_union(stored, tuple(trainer.spec.devices))


@functools.cache
def _make_union(stored: tuple[Stored, ...], devices: tuple[jax.Device, ...]) -> Union:
    return Union(_abstract(stored), devices)


def _stored(key: StageKey, stage: Stage) -> tuple[Stored, ...]:
    """All that a stage stores, in the order of the leaves of (parameters, state)."""
    mine, found = stage.parameters, []
    for kind, what, tree in (("params", What.MASTERS, mine.params), ("optimizer", What.STATE, mine.state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            parts, stacked = path_parts(path), is_stacked(path)
            names = stacks.names(parts, mine.layers_of) if stacked else ["/".join(parts)]
            shape, spec = mine.true_shape(path, leaf), tuple(leaf.sharding.spec)
            shape, where = (shape[1:], P(*spec[1:])) if stacked else (shape, P(*spec))
            place = NamedSharding(leaf.sharding.mesh, stage.plan.grid.fitting(shape, where))
            array = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
            found.append(Stored(tuple(f"{kind}/{key[0]}/{name}" for name in names), array, stacked, what))
    return tuple(found)


def _abstract(stored: tuple[Stored, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: leaf.array for leaf in stored for name in leaf.names}


def _all_names(stored: tuple[Stored, ...]) -> list[str]:
    return [name for leaf in stored for name in leaf.names]


@functools.partial(jax.jit, static_argnames="stored")
def _copies(leaves: tuple[jax.Array, ...], stored: tuple[Stored, ...]) -> list[jax.Array]:
    found = []
    for leaf, how in zip(leaves, stored, strict=True):
        rows = [leaf[i] for i in range(len(how.names))] if how.stacked else [jnp.copy(leaf)]
        found += [_as_stored(row, how.array) for row in rows]
    return found


def _as_stored(row: jax.Array, array: jax.ShapeDtypeStruct) -> jax.Array:
    """`row` without padding, where `array` says that it lies: what is sent to other processes must."""
    uncut = lax.with_sharding_constraint(row, array.sharding)  # first: so that no device has the whole of it
    if row.shape == array.shape:
        return uncut
    return lax.with_sharding_constraint(uncut[tuple(map(slice, array.shape))], array.sharding)


def _join(stored: tuple[Stored, ...], leaves: tuple[jax.ShapeDtypeStruct, ...], rows: list[jax.Array]) -> list:
    """The leaves that `_copies` took apart."""
    rest, found = iter(rows), []
    for how, leaf in zip(stored, leaves, strict=True):
        mine = [pad(next(rest), leaf.shape[how.stacked :]) for _ in how.names]
        found.append(jnp.stack(mine) if how.stacked else mine[0])
    return found
