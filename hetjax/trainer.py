"""A built run: initialise, compile, step, evaluate, and turn the state into layout-free arrays and back."""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetjax import optimizer
from hetjax.finish import Finish, Outcome
from hetjax.graph import Graph
from hetjax.pipeline import Pipeline, StageKey

Tree = Any
Path = tuple[Any, ...]  # key path of a leaf, as jax.tree_util gives it
Microbatches = Sequence[Mapping[str, np.ndarray]]


class State(NamedTuple):
    """All that a step changes. Arrays are per stage, under that stage's layout."""

    params: dict[StageKey, Tree]
    optimizer: dict[StageKey, Tree]
    acc: dict[StageKey, Tree]  # empty gradient accumulators, reused by every step
    step: int


class Trainer:
    """Pipeline, end of step and optimizer of one graph under its layouts.

    `batch`: abstract global microbatch (shape and dtype of each array).
    """

    def __init__(
        self,
        graph: Graph,
        *,
        devices: Sequence[jax.Device],
        batch: Mapping[str, jax.ShapeDtypeStruct],
        num_microbatches: int,
        config: optimizer.OptimizerConfig,
        schedule: str = "1f1b",
        encoder_window: int | None = None,
        seed: int = 0,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.graph, self.config = graph, config
        self.pipeline = Pipeline(
            graph,
            devices=devices,
            batch=batch,
            num_microbatches=num_microbatches,
            optimizer=config,
            schedule=schedule,
            encoder_window=encoder_window,
            seed=seed,
            param_dtype=param_dtype,
        )
        self.finish = Finish(self.pipeline)

    def compile(self, report: Callable[[str, int, int], None] = lambda name, done, total: None) -> None:
        """Compiles every program, in parallel threads; `report(name, done, total)` after each."""
        programs = self.pipeline.programs() + self.finish.programs()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            names = {pool.submit(thunk): name for name, thunk in programs}
            for done, future in enumerate(concurrent.futures.as_completed(names), 1):
                future.result()
                report(names[future], done, len(programs))

    def init(self) -> State:
        """Step 0. Values depend on the seed, module, part and global layer index alone, never on the layout."""
        both = {key: stage.init() for key, stage in self.pipeline.stages.items()}
        params, states = ({k: pair[i] for k, pair in both.items()} for i in (0, 1))
        return State(params, states, self.pipeline.zeros(), 0)

    def step(self, state: State, microbatches: Microbatches) -> tuple[State, Outcome]:
        """One training step over `num_microbatches` global microbatches. `state` is consumed; returns without waiting."""
        grads, losses, acc, count = self.gradients(state, microbatches)
        return self.update(state, grads, losses, acc, count)

    def gradients(self, state: State, microbatches: Microbatches) -> tuple[dict[StageKey, Tree], list[jax.Array], dict[StageKey, Tree], float]:
        """(gradients, loss sums, emptied accumulators, target count) of a step. The state's accumulators are consumed."""
        if len(microbatches) != self.pipeline.num_microbatches:
            raise ValueError(f"step: got {len(microbatches)} microbatches, the run was built for {self.pipeline.num_microbatches}")
        count = float(sum(m["weights"].sum(dtype=np.float64) for m in microbatches))
        done = self.pipeline.run(state.params, microbatches, state.acc, count)
        grads, acc = self.finish.reduce(done.acc)
        return grads, done.losses, acc, count

    def update(self, state: State, grads: dict[StageKey, Tree], losses: list[jax.Array], acc: dict[StageKey, Tree], count: float) -> tuple[State, Outcome]:
        """The state after the step whose gradients these are. `state` is consumed."""
        rate = optimizer.learning_rate(self.config, state.step)
        params, states, outcome = self.finish.apply(state.params, state.optimizer, grads, losses, count=count, learning_rate=rate)
        return State(params, states, acc, state.step + 1), outcome

    def flat(self, trees: Mapping[StageKey, Tree]) -> dict[str, dict[Path, np.ndarray]]:
        """Per-stage trees as whole modules on the host: module -> path -> array, layers of all stages concatenated."""
        modules: dict[str, dict[Path, np.ndarray]] = {}
        for (name, index), tree in sorted(trees.items()):
            whole = modules.setdefault(name, {})
            leaves = jax.tree_util.tree_leaves_with_path(self.pipeline.stages[name, index].owned(tree))
            for path, leaf in leaves:
                array = np.asarray(leaf)
                stacked = any(isinstance(k, jax.tree_util.DictKey) and k.key == "layers" for k in path)
                whole[path] = np.concatenate([whole[path], array]) if stacked and path in whole else array
        return modules

    def whole(self, trees: Mapping[StageKey, Tree]) -> dict[str, Tree]:
        """Per-stage parameters or gradients as whole modules on the host, as one device would hold them."""
        modules: dict[str, Tree] = {}
        for name, leaves in self.flat(trees).items():
            module = modules.setdefault(name, {})
            for path, leaf in leaves.items():
                node = module
                for part in path[:-1]:
                    node = node.setdefault(part.key, {})
                node[path[-1].key] = leaf
        return modules
