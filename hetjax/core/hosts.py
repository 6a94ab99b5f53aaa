"""Stages' arrays whole on the host, in every process, whoever drives their devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import processes
from hetjax.core.alive import on_device
from hetjax.core.boundary import Boundary
from hetjax.core.tasks import StageKey

Tree = Any


def on_hosts(
    trees: Mapping[StageKey, Tree], abstract: Mapping[StageKey, Tree], devices: Sequence[jax.Device]
) -> dict[StageKey, Tree]:
    """The trees of all stages as NumPy arrays, from those of this process's. `abstract` has all of them.

    Of several processes the first device of each takes a stage whole for a moment."""
    if jax.process_count() == 1:
        return {key: jax.tree.map(np.asarray, tree) for key, tree in trees.items()}
    everywhere = NamedSharding(Mesh(np.array(processes.firsts(devices)), ["processes"]), P())
    found = {}
    for key, tree in abstract.items():
        leaves, structure = jax.tree.flatten(tree)
        mine = jax.tree.leaves(on_device(trees[key])) if key in trees else None
        found[key] = jax.tree.unflatten(structure, _moved(leaves, mine, everywhere) if leaves else [])
    return found


def _moved(
    leaves: Sequence[jax.ShapeDtypeStruct], mine: Sequence[jax.Array] | None, where: NamedSharding
) -> list[np.ndarray]:
    named = {str(n): leaf for n, leaf in enumerate(leaves)}
    boundary = Boundary(named, dict.fromkeys(named, where))
    moved = boundary.forward(None if mine is None else dict(zip(named, mine, strict=True)))
    return [np.asarray(moved[name]) for name in named]
