"""The things that are alive in a step, each on its devices or in the host's pinned memory, or with a copy in both."""

from collections.abc import Sequence
from typing import Any

import jax

from hetjax.core.tasks import Kind, Task, Thing

HOST = "pinned_host"
Tree = Any


def on_host(tree: Tree) -> Tree:
    """The same arrays, each device's shards in pinned memory of the host; returns before they have arrived."""
    return _put(tree, HOST)


def on_device(tree: Tree) -> Tree:
    """The same arrays in the devices' own memory; those that lie there are as they were."""
    return _put(tree, "device")


def _put(tree: Tree, memory: str) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    if all(leaf.sharding.memory_kind == memory for leaf in leaves):
        return tree
    if all(leaf.is_fully_addressable for leaf in leaves):
        return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(memory), tree))
    return jax.tree.unflatten(structure, _put_own(leaves, memory))


def _put_own(leaves: Sequence[jax.Array], memory: str) -> list[jax.Array]:
    """Arrays of which other processes have shards too: each process puts its own, where jax would have all of them run
    a program."""
    own = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
    moved = iter(jax.device_put(own, [data.sharding.with_memory_kind(memory) for data in own]))
    shards = [[next(moved) for _ in leaf.addressable_shards] for leaf in leaves]
    return [
        jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding.with_memory_kind(memory), mine, dtype=leaf.dtype
        )
        for leaf, mine in zip(leaves, shards, strict=True)
    ]


class Alive:
    """Things by name. What is read is on its devices; a copy on the host stays there until the thing changes.

    `home`: the things that lie on the host when a step begins and ends. `leaving`: what is on its way there, also from
    an earlier step."""

    def __init__(self, home: frozenset[Thing], leaving: dict[Thing, Tree]) -> None:
        self.home, self._leaving = home, leaving
        self._device: dict[Thing, Tree] = {}
        self._host: dict[Thing, Tree] = {}

    def begin(self, thing: Thing, tree: Tree) -> None:
        """What a step before has left."""
        (self._host if thing in self.home else self._device)[thing] = tree

    def left(self, thing: Thing) -> Tree:
        """What the next step begins with."""
        return (self._host if thing in self.home else self._device)[thing]

    def __getitem__(self, thing: Thing) -> Tree:
        return self._device[thing]

    def __setitem__(self, thing: Thing, tree: Tree) -> None:
        """The thing has changed; what the host has of it is consumed, as a program's donated arguments are."""
        for leaf in jax.tree.leaves(self._host.pop(thing, ())):
            leaf.delete()
        self._device[thing] = tree

    def pop(self, thing: Thing) -> Tree:
        """The thing, which nobody needs again."""
        self._host.pop(thing, None)
        return self._device.pop(thing)

    def move(self, task: Task) -> None:
        """Does one of the tasks that move things."""
        thing = task.thing
        assert thing is not None
        if task.kind is Kind.LEAVE:
            tree = self._device.pop(thing)
            if thing not in self._host:
                self._host[thing] = self._leaving[thing] = on_host(tree)
        elif task.kind is Kind.GONE:
            leaves = jax.tree.leaves(self._leaving.pop(thing, ()))
            jax.block_until_ready([leaf for leaf in leaves if not leaf.is_deleted()])  # of a state that was given up
        else:
            self._device[thing] = on_device(self._host[thing])
