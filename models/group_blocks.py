"""Blocks of rows of one group each, where rows are sorted by group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Form(NamedTuple):
    """Blocks of `rows` rows. `every`: the loop visits as many as there can be, not as many as there are."""

    rows: int
    every: bool


class Block(NamedTuple):
    """The rows from `start` on, of which those of the group `group` are `mine` [rows, 1]."""

    group: jax.Array
    start: jax.Array
    mine: jax.Array


class Blocks:
    """Those of all groups, one behind another: group i has the `counts[i]` blocks from `begins[i]` on."""

    def __init__(self, form: Form, n: int, sizes: jax.Array) -> None:
        self.rows, groups = form.rows, len(sizes)
        filled = min(n, groups)  # groups that can have rows
        most = (n + filled * (self.rows - 1)) // self.rows
        ends, counts = jnp.cumsum(sizes), -(-sizes // self.rows)
        last = jnp.cumsum(counts)
        number = jnp.arange(most, dtype=jnp.int32)
        group = jnp.searchsorted(last, number, side="right", method="compare_all").astype(jnp.int32)
        self.counts, self.begins = counts, last - counts
        self.starts, self.ends = ends - sizes, ends  # rows of groups
        self.group = jnp.minimum(group, groups - 1)  # of numbers behind the last block: then no row is within
        self.first = self.starts[self.group] + (number - self.begins[self.group]) * self.rows
        self.end = ends[self.group]
        self.start = jnp.minimum(self.first, n - self.rows)
        self.count = most if form.every else last[-1]

    def __getitem__(self, number: jax.Array) -> Block:
        start = self.start[number]
        row = start + jnp.arange(self.rows, dtype=jnp.int32)
        mine = (row >= self.first[number]) & (row < self.end[number])
        return Block(self.group[number], start, mine[:, None])

    def of(self, x: jax.Array, block: Block) -> jax.Array:
        """The rows of `x` in a block."""
        return lax.dynamic_slice_in_dim(x, block.start, self.rows)

    def apart(self, x: jax.Array) -> jax.Array:
        """The rows of `x`, each block's by themselves, with zeros where it is not full."""
        row = self.first[:, None] + jnp.arange(self.rows, dtype=jnp.int32)[None]
        row = jnp.where(row < self.end[:, None], row, len(x)).reshape(-1)
        return x.at[row].get(mode="fill", fill_value=0)

    def together(self, y: jax.Array, n: int) -> jax.Array:
        """The rows of blocks by themselves, as they were in an array of `n`; 0 in those of no group."""
        row, groups = jnp.arange(n, dtype=jnp.int32), len(self.ends)
        group = jnp.searchsorted(self.ends, row, side="right", method="compare_all").astype(jnp.int32)
        own = jnp.minimum(group, groups - 1)
        place = self.begins[own] * self.rows + row - self.starts[own]
        return y.at[jnp.where(group < groups, place, len(y))].get(mode="fill", fill_value=0)
