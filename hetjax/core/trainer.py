"""A built run: initialise, compile, step, evaluate, and turn the state into layout-free arrays and back."""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from hetjax.core import flops, optimizer, processes
from hetjax.core.alive import on_device
from hetjax.core.costs import forwards, num_items
from hetjax.core.finish import Outcome, Reduced, Scores
from hetjax.core.hosts import on_hosts
from hetjax.core.layout import check_batch, check_replicas
from hetjax.core.packing import Prepared, prepare
from hetjax.core.pipeline import Pipeline
from hetjax.core.plan import picture
from hetjax.core.stacks import LAYERS
from hetjax.core.tasks import HostTimes, Kind, Needs, StageKey, What
from hetjax.core.timeline import Recorder, Timeline
from hetjax.core.train_spec import TrainSpec

Tree = Any
Path = tuple[Any, ...]  # key path of a leaf, as jax.tree_util gives it
Thunks = Sequence[tuple[str, Callable[[], object]]]  # (name of a program, function that compiles it)
Like = Literal["params", "grads", "state"]  # the attribute of `Parameters` that says what they are
Microbatches = Sequence[Mapping[str, np.ndarray]]


class State(NamedTuple):
    """All that a step changes. Arrays are per stage, under that stage's layout; those that it offloads in the host's
    memory."""

    params: dict[StageKey, Tree]
    weights: dict[StageKey, Tree]  # what the programs are given of them
    optimizer: dict[StageKey, Tree]
    acc: dict[StageKey, Tree]  # gradient accumulators: a step overwrites what is in them
    step: int


class StepGradients(NamedTuple):
    """What `Trainer.gradients` leaves for `Trainer.update`."""

    reduced: Reduced
    scores: list[Scores]  # of each microbatch
    target_count: float
    host: HostTimes

    @property
    def grads(self) -> dict[StageKey, Tree]:
        """By stage; they last until the next step's gradients."""
        return self.reduced.grads


class Trainer:
    """Pipeline, end of step and optimizer of one graph under its layouts.

    Raises ValueError for a layout that the devices, the modules or the microbatch do not allow.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self.spec, self.graph = spec, spec.graph
        for module in spec.graph.modules:
            items, seq = num_items(module.definition, spec.batch), spec.batch["tokens"].shape[1]
            is_sink = module is spec.graph.sink
            check_batch(module.name, module.layout, is_sink=is_sink, items=items, seq=seq, groups=spec.groups)
            num = spec.num_microbatches
            check_replicas(module.name, module.layout, is_sink=is_sink, num_microbatches=num)
        self.pipeline = Pipeline(spec)
        optimizer.check(spec.optimizer, self._paths(), apart=self._balanced())
        self.finish = self.pipeline.finish

    def _paths(self) -> list[str]:
        stages = self.pipeline.stages.items()
        trees = [(name, stage.parameters.params) for (name, _), stage in stages]
        found = [
            optimizer.path_of(n, path) for n, tree in trees for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return list(dict.fromkeys(found))

    def _balanced(self) -> set[str]:
        stages = self.pipeline.stages.items()
        return {"/".join((name, *path)) for (name, _), stage in stages for path in stage.parameters.balanced}

    def picture(self) -> str:
        """Which device holds which part of which module."""
        plans = [plan for stages in self.pipeline.plans.values() for plan in stages]
        return picture(plans, 1 + max(i for plan in plans for i in plan.device_ids))

    def step_flops(self) -> dict[str, float]:
        """Model FLOPs of a step by module, causal attention counted as half; modules of unknown kind are left out."""
        trainable: dict[str, set[str]] = {module.name: set() for module in self.graph.modules}
        for (name, _), stage in self.pipeline.stages.items():
            trainable[name].update(stage.parameters.trainable)
        found = {}
        for name, parts in forwards(self.graph, self.spec.batch).items():
            upstream = name == self.graph.sink.name and any(trainable[e.name] for e in self.graph.encoders)
            per_microbatch = flops.module_training(parts, trainable=trainable[name], upstream=upstream)
            found[name] = per_microbatch.total * self.spec.num_microbatches
        return found

    def compile(
        self,
        report: Callable[[str, int, int], None] = lambda name, done, total: None,
        *,
        evaluate: bool = False,
        others: Thunks = (),
    ) -> None:
        """Compiles every program, and `others`, in parallel threads; `report(name, done, total)` after each."""
        thunks = [*self.pipeline.thunks(evaluate=evaluate), *self.finish.thunks(), *others]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            names = {pool.submit(thunk): name for name, thunk in thunks}
            for done, future in enumerate(concurrent.futures.as_completed(names), 1):
                future.result()
                report(names[future], done, len(thunks))

    def init(self) -> State:
        """The first step's state. Values depend on seed, module, part and global layer index, never on the layout."""
        return self.start(self.initial_params())

    def initial_params(self) -> dict[StageKey, Tree]:
        """The parameters of `init`."""
        return self._of_stages(What.MASTERS, lambda key: self.pipeline.stages[key].parameters.init())

    def _of_stages(self, what: What, make: Callable[[StageKey], Tree]) -> dict[StageKey, Tree]:
        """What `make` gives for each stage, which compiles its own, where it lies between steps."""
        stages = self.pipeline.stages_here
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda key: self.pipeline.at_home(what, key, make(key)), stages)
            return dict(zip(stages, found, strict=True))

    def start(self, params: dict[StageKey, Tree]) -> State:
        """The first step's state with these parameters, which it takes."""
        stages = self.pipeline.stages
        states = self._of_stages(What.STATE, lambda key: stages[key].parameters.init_state(on_device(params[key])))
        return self.state(params, states, self.spec.first_step)

    def state(self, params: dict[StageKey, Tree], states: dict[StageKey, Tree], step: int) -> State:
        """The state behind `step` with these parameters and optimizer states, which it takes."""
        weights = self.pipeline.weights(params)
        for key, stage in self.pipeline.stages_here.items():
            mine = stage.parameters
            masters = self.pipeline.at_home(What.MASTERS, key, mine.masters(params[key]))
            params = params | {key: mine.all_of(masters, weights[key])}
        states = {key: self.pipeline.at_home(What.STATE, key, tree) for key, tree in states.items()}
        return State(params, weights, states, self.pipeline.zeros(), step)

    def begin(self, state: State) -> State:
        """The first step's state with the parameters of `state`, which another trainer left; it is consumed."""
        drop = lambda trees: jax.tree.map(lambda leaf: leaf.delete(), trees)
        drop((state.optimizer, state.acc))
        stages, old = self.pipeline.stages, state.params
        params = self._of_stages(What.MASTERS, lambda key: stages[key].parameters.laid(on_device(old[key])))
        drop((state.params, state.weights))  # whoever else holds the state would keep a second copy alive
        return self.start(params)

    def learning_rate(self, step: int) -> float:
        """The rate with which step `step` of the run, counted from 1, is made."""
        return optimizer.learning_rate(self.spec.optimizer, step - 1 - self.spec.first_step)

    def prepare(self, microbatch: Mapping[str, np.ndarray]) -> Prepared:
        """`microbatch`, ready for this trainer's devices: what a data thread can do ahead, for `step` to find done."""
        return prepare(microbatch, self.pipeline.packings)

    def step(self, state: State, microbatches: Microbatches) -> tuple[State, Outcome]:
        """One step over `num_microbatches` global microbatches. `state` is consumed; returns without waiting."""
        return self.update(state, self.gradients(state, microbatches))

    def recorded(self, state: State, microbatches: Microbatches) -> tuple[State, Outcome, Timeline]:
        """A step as `step` does it, between two moments at which this process's devices have nothing to do."""
        pipeline = self.pipeline
        jax.block_until_ready(state.weights)
        pipeline.recorder = Recorder()
        try:
            state, outcome = self.step(state, microbatches)
            for task in (t for t in pipeline.tasks[1] if t.kind is Kind.UPDATE):
                pipeline.recorder.see(task, jax.tree.leaves(state.params[task.stage])[0])
            jax.block_until_ready(state.weights)
            needs = Needs(pipeline.nodes, self.spec.num_microbatches)
            own, of_stages = processes.own(self.spec.devices), pipeline.schedule.forecast.devices
            return state, outcome, pipeline.recorder.timeline(needs, {key: ids & own for key, ids in of_stages.items()})
        finally:
            pipeline.recorder.close()
            pipeline.recorder = None

    def gradients(self, state: State, microbatches: Microbatches) -> StepGradients:
        """The step's gradients, before clipping. The state's accumulators are consumed."""
        if len(microbatches) != self.spec.num_microbatches:
            raise ValueError(
                f"step: got {len(microbatches)} microbatches, the run was built for {self.spec.num_microbatches}"
            )
        prepared = [self.prepare(m) for m in microbatches]
        count = sum(m.target_count for m in prepared)
        reduced, scores, host = self.pipeline.gradients(state.weights, prepared, state.acc, count)
        return StepGradients(reduced, scores, count, host)

    def update(self, state: State, done: StepGradients) -> tuple[State, Outcome]:
        """The state after the step whose gradients these are. `state` is consumed."""
        params, weights, states, outcome = self.pipeline.update(
            state.params,
            state.optimizer,
            done.reduced,
            done.scores,
            count=done.target_count,
            learning_rate=self.learning_rate(state.step + 1),
            host=done.host,
        )
        return State(params, weights, states, done.reduced.acc, state.step + 1), outcome

    def evaluate(self, state: State, microbatch: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
        """(sum of token losses, int32 [batch, seq]: the likeliest next id at every position).

        Needs `compile(evaluate=True)`."""
        loss, likeliest = self.pipeline.evaluate(state.weights, microbatch)
        return float(loss), likeliest

    def flat(self, trees: Mapping[StageKey, Tree], like: Like = "params") -> dict[str, dict[Path, np.ndarray]]:
        """Per-stage trees as whole modules on the host: module -> path -> array, layers of all stages
        concatenated, without padding. `like`: of which kind they are.

        All processes call it alike, each with its stages."""
        modules: dict[str, dict[Path, np.ndarray]] = {}
        every = {key: stage.parameters for key, stage in self.pipeline.stages.items()}
        owned = {key: every[key].owned(tree) for key, tree in trees.items()}
        held = {key: mine for key, mine in every.items() if mine.trains or like != "grads"}
        abstract = {key: mine.owned(getattr(mine, like)) for key, mine in held.items()}
        for (name, index), tree in sorted(on_hosts(owned, abstract, self.spec.devices).items()):
            whole = modules.setdefault(name, {})
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                array = leaf[tuple(map(slice, every[name, index].true_shape(path, leaf)))]
                whole[path] = np.concatenate([whole[path], array]) if is_stacked(path) and path in whole else array
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


def path_parts(path: Path) -> list[str]:
    """The path in words."""
    return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path]


def is_stacked(path: Path) -> bool:
    """Whether the leaf at `path` holds all layers of a stage on its first dim."""
    return any(isinstance(key, jax.tree_util.DictKey) and key.key == LAYERS for key in path)
