"""A vision-language model of chosen size on random microbatches: what the benchmarks time."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetjax.core import budget, memory
from hetjax.core.graph import Graph, Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.stage import Stage
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import State, Trainer
from hetjax.run import command
from models.contract import ModuleDef
from models.decoder import Decoder
from models.vit import ViT

Microbatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Models and the shape of a step."""

    llm: Decoder
    vision: ViT | None  # None: text alone
    samples: int  # rows of a microbatch
    seq_len: int
    pictures: int  # of a microbatch
    num_microbatches: int
    dtype: Any = jnp.float32
    remat: Remat = Remat.NONE
    optimizer: OptimizerConfig = OptimizerConfig(name="sgd", clip_norm=1.0)
    documents: int = 1  # of a row, of equal lengths
    unroll: bool = False  # of all modules

    def trainer(
        self,
        llm: Layout,
        vision: Layout | None = None,
        *,
        devices: list[jax.Device] | None = None,
        available: Mapping[int, int] | None = None,
        **options: Any,
    ) -> Trainer:
        """A compiled trainer under these layouts. `devices`: None for those of the process. `available`: bytes of each,
        for remat "auto"; None for what they say."""
        devices = devices or jax.devices()
        encoders = ()
        if self.vision is not None:
            encoder = self.vision.module(self.dtype)
            encoders = (Module("vision", encoder, vision or Layout(), self.remat, self.unroll),)
        decoder = self.llm.module(self.dtype, encoders=tuple(e.name for e in encoders), packed=self.documents > 1)
        graph = vlm(encoders, Module("llm", decoder, llm, self.remat, self.unroll))
        abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.microbatch(0).items()}
        spec = TrainSpec(
            graph=graph,
            devices=devices,
            batch=abstract,
            groups=self.samples,
            num_microbatches=self.num_microbatches,
            optimizer=self.optimizer,
            **options,
        )
        trainer = Trainer(spec)
        if self.remat is Remat.AUTO:
            chosen = budget.settle(trainer, memory.available(devices) if available is None else available)
            print("remat: " + ", ".join(f"{name}/{index} {keep}" for (name, index), keep in chosen.items()), flush=True)
        trainer.compile()
        return trainer

    def microbatch(self, seed: int) -> Microbatch:
        """Full rows, each with its share of the pictures at the front."""
        rng = np.random.default_rng(seed)
        shape = (self.samples, self.seq_len)
        tokens = rng.integers(0, self.llm.vocab_size, shape).astype(np.int32)
        place, length = np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), shape), self.seq_len // self.documents
        batch = {
            "tokens": tokens,
            "positions": place % length,
            "segment_ids": place // length + 1,
            "targets": np.roll(tokens, -1, 1),
            "weights": np.ones(shape, np.float32),
        }
        if self.vision is None:
            return batch
        each, rows, side = self.pictures // self.samples, self.vision.rows, self.vision.image_size
        index = np.full(shape, -1, np.int32)
        index[:, : each * rows] = np.arange(self.samples * each * rows).reshape(self.samples, -1)
        pixels = rng.normal(size=(self.pictures, side, side, 3)).astype(np.float32)
        return batch | {
            "weights": (index < 0).astype(np.float32),
            "vision.index": index,
            "vision.pixels": pixels,
        }

    def step(self) -> list[Microbatch]:
        """The microbatches of one step."""
        return [self.microbatch(i) for i in range(self.num_microbatches)]


def offloaded(trainer: Trainer, kinds: tuple[str, ...]) -> Trainer:
    """A compiled trainer whose modules all offload these kinds, which changes no program."""
    graph = trainer.spec.graph
    modules = tuple(
        dataclasses.replace(module, layout=dataclasses.replace(module.layout, offload=kinds))
        for module in graph.modules
    )
    other = Trainer(dataclasses.replace(trainer.spec, graph=Graph(modules, graph.edges)))
    for key, stage in other.pipeline.stages.items():
        same = trainer.pipeline.stages[key]
        stage.set_keep(same.keep)
        stage.programs, stage.memory, stage.kept = same.programs, same.memory, same.kept
    other.finish.decide, other.finish.add = trainer.finish.decide, trainer.finish.add
    return other


def one_row(definition: ModuleDef, layout: Layout, remat: Remat, tokens: int, devices: list[jax.Device]) -> Stage:
    """A language model as one stage, forward and backward compiled for one row of so many tokens."""
    row = {k: jax.ShapeDtypeStruct((1, tokens), jnp.int32) for k in ("tokens", "positions", "segment_ids", "targets")}
    row["weights"] = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    spec = TrainSpec(
        graph=vlm((), Module("llm", definition, layout, remat)),
        devices=devices,
        batch=row,
        groups=1,
        num_microbatches=1,
        optimizer=OptimizerConfig(),
    )
    stage = Trainer(spec).pipeline.stages["llm", 0]
    thunks = stage.thunks(evaluate=False)
    for name in ("forward", "backward"):
        thunks[name]()
    return stage


def emulate(devices: int) -> None:
    """Runs on emulated CPU devices. Call it before the first array."""
    command.ask_for_emulated(devices)


class Timed:
    """A trainer with its state, stepped and timed."""

    def __init__(self, trainer: Trainer, step: list[Microbatch]) -> None:
        self.trainer, self.microbatches = trainer, step
        self.state: State = trainer.init()

    def __call__(self) -> None:
        self.state, outcome = self.trainer.step(self.state, self.microbatches)
        jax.block_until_ready((self.state.params, outcome))


class Time(NamedTuple):
    """What a call costs. On a busy machine the CPU time is the figure: waiting for a core is not in it."""

    wall: float  # median seconds
    cpu: float  # seconds of all the process's threads, of the cheapest repeat


def measured(runs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, Time]:
    """The time of each run; they take turns, so that what else the machine does meets all of them."""
    for run in runs.values():  # warm up
        run()
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - before[0])
            cpu[name].append(time.process_time() - before[1])
    return {name: Time(float(np.median(wall[name])), min(cpu[name])) for name in runs}


def median_seconds(runs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median wall seconds of each run, in turns."""
    return {name: time.wall for name, time in measured(runs, repeats=repeats).items()}
