"""A decoder and its encoders on devices, generating: three programs, each ONE `jax.shard_map`.

    encode   (params, items)                          -> rows       per encoder, its items cut over all devices
    prefill  (params, rows, prompts)                  -> logits, memory
    decode   (params, logits, memory, lengths, ...)   -> tokens     a `lax.while_loop`, until every row has ended

The decoder stands under dp x tp; a boundary takes the encoders' rows to it. Shapes come from few buckets, and each
bucket compiles once.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import processes, stacks
from hetjax.core.boundary import Boundary
from hetjax.core.graph import Edge, Graph, Module
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.parameters import Parameters
from hetjax.core.plan import plan_stages
from hetjax.generate import cached
from hetjax.generate.cached import Memory
from hetjax.generate.defaults import Penalties
from hetjax.generate.sample import Draw, Rules, Sampling, penalised, pick, remembered
from models.axes import Axis, vary_like
from models.contract import AUXILIARY, ROUTED, Dims, ModuleDef, Params

Tree = Any
Arrays = Mapping[str, np.ndarray]
ENDED = -1  # behind a row's last token
FROZEN = OptimizerConfig(frozen=("*",))


class Placed:
    """A module on its devices, whole: one stage. `parameters.params` are abstract until someone reads them."""

    def __init__(self, module: Module, devices: Sequence[jax.Device], dtype: Any) -> None:
        self.name, self.definition = module.name, module.definition
        (self.plan,) = plan_stages(module.name, module.definition, module.layout, devices)
        self.axes = dataclasses.replace(self.plan.axes, cp=Axis())  # no sequence is cut
        whole = dataclasses.replace(module, weight_copies=False)  # else masters would lie in ZeRO shards
        self.parameters = Parameters(whole, self.plan, FROZEN, seed=0, dtype=dtype)

    def whole(self, params: Params) -> Params:
        """The parameters with the leaf that two parts share in both."""
        return {**params, "last": self.parameters.full_last(params)}

    def uncut(self, dims: Dims) -> P:
        """The partition spec of a tensor with these logical dims, of which no mesh here cuts the sequence."""
        return self.plan.grid.spec(tuple(None if dim in ("seq", "stream") else dim for dim in dims))

    def put(self, batch: Arrays) -> dict[str, jax.Array]:
        """What of the batch the module reads, on its devices."""
        reads = self.definition.reads
        places = {name: NamedSharding(self.plan.mesh, self.uncut(reads[name])) for name in reads if name in batch}
        return {name: processes.placed(batch[name], where) for name, where in places.items()}


class Engine:
    """Generates with `graph`, whose modules each have one stage. `alone` is the sink's definition without encoders: its
    first part embeds new tokens."""

    def __init__(
        self,
        graph: Graph,
        alone: ModuleDef,
        *,
        devices: Sequence[jax.Device],
        dtypes: Mapping[str, Any],
        stops: Sequence[int],
        penalties: Penalties = Penalties(),  # noqa: B008
    ) -> None:
        self.graph, self.stops, self.penalties = graph, tuple(stops), penalties
        self.placed = {m.name: Placed(m, devices, dtypes[m.name]) for m in graph.modules}
        self.sink = self.placed[graph.sink.name]
        self.alone = dataclasses.replace(self.sink.definition, first=alone.first)
        dims: tuple[Dims, ...] = ("batch",), ("vocab",), ("batch", "vocab")
        self._by_row, self._by_id, self._by_both = map(self.sink.plan.grid.spec, dims)
        self.params: dict[str, Params] = {}  # by module; set before the first call
        self._encode = {e.name: self._encoder(self.placed[e.name]) for e in graph.encoders}
        self._boundaries: dict[tuple[Any, ...], Boundary] = {}
        self._prefill = functools.cache(self._prefill_program)
        self._decode = functools.cache(self._decode_program)
        self._everywhere = jax.jit(lambda tokens: tokens, out_shardings=NamedSharding(self.sink.plan.mesh, P()))

    def generate(self, batch: Arrays, *, prompts: np.ndarray, limit: int, room: int, sampling: Sampling) -> np.ndarray:
        """The tokens that follow each row, int32 [b, at most limit], `ENDED` behind a row's end.

        `batch`: tokens, positions, segment_ids [b, s], lengths [b], and each encoder's arrays. `prompts` [b] numbers
        the rows for sampling. `room`: slots of the memory behind the prompts, at least `limit`. A row of length 0 is
        padding and has ended.
        """
        rows = {name: a for edge in self.graph.edges for name, a in self._rows(edge, batch).items()}
        on = self.sink.put(batch) | {"lengths": self._put(batch["lengths"], self._by_row)}
        logits, memory = self._prefill(room)(self.params[self.sink.name], rows, on)
        draw = None
        if not sampling.greedy:
            vocab = self.sink.definition.vocab
            top_k = min(sampling.top_k or vocab, vocab)
            numbers = (np.float32(sampling.temperature), np.int32(top_k), np.float32(sampling.top_p))
            draw = Draw(*numbers, np.int32(sampling.seed), self._put(prompts, self._by_row))
        stops, rules = np.asarray(self.stops, np.int32), self._rules(batch, logits.shape[1])
        program = self._decode(room, sampling.greedy, rules is not None)
        out, count, _ = program(
            self.params[self.sink.name], logits, memory, on["lengths"], draw, rules, np.int32(limit), stops
        )
        return np.asarray(self._everywhere(out))[:, : int(count)]

    def _put(self, array: np.ndarray, where: P) -> jax.Array:
        return processes.placed(array, NamedSharding(self.sink.plan.mesh, where))

    def _rules(self, batch: Arrays, vocab: int) -> Rules | None:
        """The penalties for a batch whose prompts have all been read; None: there are none."""
        if self.penalties == Penalties():
            return None
        never, first = np.zeros(vocab, bool), np.zeros(vocab, bool)
        for mask, ids in ((never, self.penalties.suppressed), (first, self.penalties.suppressed_first)):
            mask[[id for id in ids if id < vocab]] = True
        seen = np.zeros((len(batch["lengths"]), vocab), bool)
        rows, places = np.nonzero((batch["segment_ids"] > 0) & (batch["tokens"] < vocab))
        seen[rows, batch["tokens"][rows, places]] = True
        repetition, put = np.float32(self.penalties.repetition), self._put
        return Rules(repetition, put(never, self._by_id), put(first, self._by_id), put(seen, self._by_both))

    def _encoder(self, placed: Placed) -> Any:
        def run(params: Params, batch: Tree) -> Tree:
            y = cached.encode(placed.definition, placed.whole(params), batch, placed.axes)
            return {k: y[k] for k in out}

        reads = {name: placed.uncut(dims) for name, dims in placed.definition.reads.items()}
        told = (AUXILIARY, ROUTED)  # to a training alone
        out = {k: placed.uncut(dims) for k, dims in placed.definition.output.items() if k not in told}
        return jax.jit(
            jax.shard_map(run, mesh=placed.plan.mesh, in_specs=(placed.parameters.specs, reads), out_specs=out)
        )

    def _rows(self, edge: Edge, batch: Arrays) -> dict[str, jax.Array]:
        """What enters the decoder of an encoder's output for the batch's items, on the decoder's devices."""
        name = edge.producer
        placed = self.placed[name]
        y = self._encode[name](self.params[name], placed.put(batch))
        key = (name, *((k, v.shape) for k, v in y.items()))
        if key not in self._boundaries:
            source = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in y.items()}
            where = {k: NamedSharding(self.sink.plan.mesh, self._by_row) for k, v in y.items()}
            self._boundaries[key] = Boundary(source, where)
        return {edge.name(k): a for k, a in self._boundaries[key].forward(y).items()}

    def _on_devices(self, function: Any, in_specs: Tree, out_specs: Tree) -> Any:
        return jax.shard_map(function, mesh=self.sink.plan.mesh, in_specs=in_specs, out_specs=out_specs)

    @property
    def _memory_specs(self) -> Memory:
        caches = {k: P(None, *self.sink.plan.grid.spec(("batch", None, *c.dims))) for k, c in self.alone.cache.items()}
        recalls = frozenset(self.alone.recalls)
        of_runs = [
            [{} if recalls & {*part.takes} else caches for part in run.period] for run in stacks.runs(self.alone.layers)
        ]
        recalled = dict.fromkeys([*self.alone.recalls, *cached.indices(self.alone)], self._by_row)
        return Memory(of_runs, self._by_row, self._by_row, recalled)

    def _prefill_program(self, room: int) -> Any:
        sink = self.sink

        def run(params: Params, rows: Tree, batch: Tree) -> tuple[jax.Array, Memory]:
            return cached.prefill(sink.definition, sink.whole(params), rows, batch, sink.axes, room)

        names = ("tokens", "positions", "segment_ids", *(f"{e}.index" for e in self._encode))
        batch = {name: sink.uncut(sink.definition.reads[name]) for name in names} | {"lengths": self._by_row}
        rows = sink.definition.takes(0, sink.definition.num_layers)
        specs = (sink.parameters.specs, dict.fromkeys(sorted(rows), self._by_row), batch)
        return jax.jit(self._on_devices(run, specs, (self._by_both, self._memory_specs)))

    def _decode_program(self, room: int, greedy: bool, ruled: bool) -> Any:
        axes, ids = self.sink.axes, self.sink.definition.vocab

        def run(
            params: Params,
            logits: jax.Array,
            memory: Memory,
            lengths: jax.Array,
            draw: Draw | None,
            rules: Rules | None,
            limit: jax.Array,
            stops: jax.Array,
        ) -> tuple[jax.Array, jax.Array, Memory]:
            params = self.sink.whole(params)
            prompt_slots = memory.positions.shape[1] - room
            tokens = pick(penalised(logits, rules, 0), ids, axes, draw, 0)
            rules = remembered(rules, tokens, axes)
            done = lengths == 0
            out = vary_like(jnp.full((len(tokens), room), ENDED, jnp.int32), tokens)
            out = out.at[:, 0].set(jnp.where(done, ENDED, tokens))
            done = done | jnp.isin(tokens, stops)
            waiting = lambda done: axes.dp.psum((~done).sum())

            def more(state: tuple[Any, ...]) -> jax.Array:
                count, left = state[:2]
                return (count < limit) & (left > 0)

            def once(state: tuple[Any, ...]) -> tuple[Any, ...]:
                count, _, tokens, done, memory, out, rules = state
                positions = lengths + count - 1
                logits, memory = cached.step(
                    self.alone, params, memory, tokens, positions, prompt_slots + count - 1, axes
                )
                tokens = pick(penalised(logits, rules, count), ids, axes, draw, count)
                column = jnp.where(done, ENDED, tokens)[:, None]
                out = lax.dynamic_update_slice_in_dim(out, column, count, 1)
                done = done | jnp.isin(tokens, stops)
                return count + 1, waiting(done), tokens, done, memory, out, remembered(rules, tokens, axes)

            count, *_, memory, out, _ = lax.while_loop(
                more, once, (jnp.int32(1), waiting(done), tokens, done, memory, out, rules)
            )
            return out, count, memory

        draws = None if greedy else Draw(P(), P(), P(), P(), self._by_row)
        rules = Rules(P(), self._by_id, self._by_id, self._by_both) if ruled else None
        specs = (self.sink.parameters.specs, self._by_both, self._memory_specs, self._by_row, draws, rules, P(), P())
        # the memory is given back so that the loop can work in the buffers that it was given
        return jax.jit(self._on_devices(run, specs, (self._by_row, P(), self._memory_specs)), donate_argnums=(2,))
