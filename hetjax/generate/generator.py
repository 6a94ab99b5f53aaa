"""A model that answers prompts: a Hugging Face folder, a converted checkpoint or a training run, on devices.

model = load("runs/quickstart", dp=2)
answers = model([ask("Which colour is it?", image="a.png"), "Hello"], max_new_tokens=16)
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetjax.core import processes
from hetjax.core.graph import Module, deepstack, vlm
from hetjax.core.layout import Layout
from hetjax.data.items import Item
from hetjax.data.tokens import load_tokenizer
from hetjax.generate import beside, defaults
from hetjax.generate.chat import Chat, Ids, RunChat
from hetjax.generate.defaults import Defaults
from hetjax.generate.engine import ENDED, Engine
from hetjax.generate.prompt import Prompt, ask, read_items
from hetjax.generate.sample import Sampling
from hetjax.hf import initial
from hetjax.hf.errors import ConvertError
from hetjax.hf.initial import Start
from hetjax.hf.source import Source
from hetjax.hf.stored import Workdir, open_source

LOG = logging.getLogger(__name__)
LEAST = 16  # positions; shapes are this times a power of two, so that few are compiled
GREEDY = Sampling()
DTYPES = ("bfloat16", "float32", "float64")


class Answer(NamedTuple):
    """What the model says."""

    text: str
    tokens: list[int]  # without the one that ends it
    ended: bool  # False: it was cut at max_new_tokens
    prompt_tokens: int


class Read(NamedTuple):
    """A prompt with its positions and items."""

    number: int
    ids: Ids
    items: Mapping[str, Sequence[Item]]


class Generator:
    """An engine with the chat that belongs to it. Made by `load`."""

    def __init__(self, engine: Engine, chat: Chat, defaults: Defaults, longest: int | None) -> None:
        self.engine, self.chat, self.defaults, self.longest = engine, chat, defaults, longest

    def __call__(
        self,
        prompts: Sequence[str | Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        batch_size: int = 8,
    ) -> list[Answer]:
        """The answers, in the prompts' order. Raises ValueError for a prompt that the model cannot take."""
        return list(self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size))

    def stream(
        self,
        prompts: Sequence[str | Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        batch_size: int = 8,
    ) -> Iterator[Answer]:
        """As a call, `batch_size` prompts after the other: the first ones come before the last are begun."""
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")
        asked = [ask(p) if isinstance(p, str) else p for p in prompts]
        read = [self._read(number, prompt, max_new_tokens) for number, prompt in enumerate(asked)]
        room = bucket(max_new_tokens)
        for first in range(0, len(read), batch_size):
            part = read[first : first + batch_size]
            batch, rows = self._batch(part, batch_size if len(read) > batch_size else len(part))
            numbers = np.zeros(len(batch["lengths"]), np.int32)
            numbers[rows] = [r.number for r in part]
            found = self.engine.generate(batch, prompts=numbers, limit=max_new_tokens, room=room, sampling=sampling)
            for row, one in zip(rows, part, strict=True):
                yield self._answer(found[row], len(one.ids.tokens))

    def _answer(self, row: np.ndarray, prompt_tokens: int) -> Answer:
        tokens = row[row != ENDED].tolist()
        ended = bool(tokens) and tokens[-1] in self.engine.stops
        tokens = tokens[: len(tokens) - ended]
        return Answer(self.chat.tokenizer.decode(tokens, skip_special_tokens=True), tokens, ended, prompt_tokens)

    def _read(self, number: int, prompt: Prompt, max_new_tokens: int) -> Read:
        items = read_items(prompt, self.chat.items)
        ids = self.chat.encode(prompt, items)
        count = len(ids.tokens)
        if not count:
            raise ValueError(f"prompt {prompt.id or number!r} is empty; write a question")
        if self.longest is not None and count + max_new_tokens > self.longest:
            raise ValueError(
                f"prompt {prompt.id or number!r} has {count} tokens, and with max_new_tokens={max_new_tokens} it "
                f"exceeds the model's {self.longest} positions; shorten it, or lower max_new_tokens"
            )
        return Read(number, ids, items)

    def _batch(self, part: Sequence[Read], rows: int) -> tuple[dict[str, np.ndarray], list[int]]:
        """(the engine's batch, the row of each prompt). Prompts are dealt out over the data replicas."""
        layout = self.engine.graph.sink.layout
        per_replica = bucket(-(-rows // layout.dp), 1)
        place = lambda i: i % layout.dp * per_replica + i // layout.dp
        where = [place(i) for i in range(len(part))]
        shape = per_replica * layout.dp, bucket(max(len(r.ids.tokens) for r in part))
        batch: dict[str, np.ndarray] = {
            name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")
        }
        batch["lengths"] = np.zeros(shape[0], np.int32)
        for row, read in zip(where, part, strict=True):
            count = len(read.ids.tokens)
            batch["lengths"][row] = count
            batch["tokens"][row, :count] = read.ids.tokens
            batch["positions"][row, :count] = np.arange(count)
            batch["segment_ids"][row, :count] = 1
        for item in self.chat.items:
            batch |= self._slots(item, part, where, per_replica, shape)
        return batch, where

    def _slots(
        self, item: Any, part: Sequence[Read], where: Sequence[int], per_replica: int, shape: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """An encoder's arrays: an item's slot lies in the replica of its prompt."""
        layout = self.engine.graph.sink.layout
        used = [0] * layout.dp
        for row, read in zip(where, part, strict=True):
            used[row // per_replica] += len(read.items[item.name])
        slots = bucket(-(-max(used) // layout.tp), 1) * layout.tp  # the encoder cuts them over tp too
        index, taken = np.full(shape, -1, np.int32), np.zeros(slots * layout.dp, np.int32)
        arrays = {
            f"{item.name}.{array}": np.zeros((slots * layout.dp, *sizes), dtype)
            for array, (sizes, dtype) in item.reader.arrays.items()
        }
        free = [replica * slots for replica in range(layout.dp)]
        for row, read in zip(where, part, strict=True):
            for start, found in zip(read.ids.starts[item.name], read.items[item.name], strict=True):
                slot = free[row // per_replica]
                free[row // per_replica] += 1
                taken[slot] = 1
                index[row, start : start + found.rows] = slot * item.rows + np.arange(found.rows)
                for array, values in found.values.items():
                    arrays[f"{item.name}.{array}"][slot] = values
        return arrays | {f"{item.name}.index": index, f"{item.name}.used": taken}


def bucket(count: int, least: int = LEAST) -> int:
    """The smallest power of two times `least` that holds `count`."""
    return least * 2 ** max(0, -(-count // least) - 1).bit_length()


def load(path: str | Path, *, tp: int = 1, dp: int = 1, dtype: str | None = None, date: str | None = None) -> Generator:
    """The model at `path` on the first tp x dp devices, in `dtype` (None: a run's own, else as stored).

    `date`, such as "2026-11-27": what a folder's chat template writes as today (None: today); a run has its own.

    The decoder is cut over tp, prompts over dp; encoders hold all of theirs on every device and share the items.
    float64 turns jax's on for the whole process: without that jax computes in float32. Raises ValueError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; it must be one of {', '.join(DTYPES)}")
    _check_processes(tp, dp)
    source = open_source(path)
    decoders = [name for name, model in source.models.items() if hasattr(model, "vocab_size")]
    if len(decoders) != 1:
        raise ConvertError(
            f"{path} holds no language model, and only one can answer; its modules are {list(source.models)}"
        )
    (llm,) = decoders
    computed, stored = _dtypes(source, dtype)
    if "float64" in (*computed.values(), *stored.values()):
        jax.config.update("jax_enable_x64", True)
    encoders = tuple(name for name in source.models if name != llm)
    model = source.models[llm]
    towers = tuple(
        Module(name, source.models[name].module(jnp.dtype(computed[name]), name=name), Layout(dp=dp * tp))
        for name in encoders
    )
    definition = model.module(jnp.dtype(computed[llm]), encoders=encoders, deepstack=deepstack(towers))
    chat, told, longest = _chat(source, llm, date)
    engine = Engine(
        vlm(towers, Module(llm, definition, Layout(dp=dp, tp=tp))),
        model.module(jnp.dtype(computed[llm])),
        devices=jax.devices(),
        dtypes=stored,
        stops=told.stops,
        penalties=told.penalties,
    )
    for name, placed in engine.placed.items():
        engine.params[name] = initial.read(placed.parameters, Start(source, name))
    return Generator(engine, chat, told, longest)


def _check_processes(tp: int, dp: int) -> None:
    used = len(processes.firsts(jax.devices()[: max(1, tp * dp)]))
    if used < jax.process_count():
        raise ValueError(
            f"tp={tp} x dp={dp} takes devices of {used} of {jax.process_count()} processes; start {used}, or raise dp"
        )


def _chat(source: Source, llm: str, date: str | None) -> tuple[Chat, Defaults, int | None]:
    """(chat, generation settings, longest conversation)."""
    if isinstance(source, Workdir):
        data = source.run.data
        if date is not None:
            raise ConvertError(
                f"date={date!r}: {source.path} is a run, whose date is that of its training; leave it out"
            )
        items = source.run.items
        tokenizer = load_tokenizer(data, items)
        end = tokenizer.token_to_id(data.template.end_token)
        assert end is not None  # `load_tokenizer` looked for it
        return RunChat(tokenizer, data.template, items), Defaults((end,)), None
    extras = source.extras[llm]
    found = defaults.read(extras)
    if found.ignored:
        LOG.warning("%s: not done, unlike in transformers: %s", source.path, ", ".join(found.ignored))
    if not found.sampling.greedy:
        LOG.warning(
            "%s: its settings draw (%s); answers are greedy unless asked otherwise", source.path, found.sampling
        )
    if found.length:
        LOG.warning("%s: its settings say %s; max_new_tokens is 128 unless asked otherwise", source.path, found.length)
    return beside.chat(source, extras, date), found, beside.longest(extras)


def _dtypes(source: Source, dtype: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Module -> precision of its activations, and of its parameters."""
    if dtype is not None:
        return dict.fromkeys(source.models, dtype), dict.fromkeys(source.models, dtype)
    stored = {name: _stored(source, name) for name in source.models}
    if not isinstance(source, Workdir):
        return stored, stored
    run = source.run
    return {run.llm.name: run.llm.compute_dtype, **{e.name: e.compute_dtype for e in run.encoders}}, stored


def _stored(source: Source, module: str) -> str:
    """The widest precision that a module is stored in; float16 is computed in float32."""
    dtypes = {array.dtype for name, array in source.arrays.items() if name.startswith(f"{module}/")}
    widest = str(functools.reduce(jnp.promote_types, dtypes))
    return "float32" if widest == "float16" else widest
