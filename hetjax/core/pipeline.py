"""The host loop: walks a schedule's tasks over the stages of all modules; `step.py` does what each of them is.

One Python thread hands each task to its devices and goes on; arrays are futures. The order is the schedule's and
nothing else's: it asks no device what is ready, so every process that runs it issues the same tasks in the same order,
and takes part in those of its own devices.
Before a stage's task goes out, the one `IN_FLIGHT` before it is waited for: beyond about 32 the runtime blocks the host
thread, and every idle mesh would starve behind one busy mesh.
"""

import collections
import functools
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import processes
from hetjax.core.alive import Alive, on_device, on_host
from hetjax.core.costs import costs
from hetjax.core.evaluated import Evaluated
from hetjax.core.finish import Finish, Outcome, Reduced, Scores
from hetjax.core.layout import zigzag
from hetjax.core.packing import Prepared, prepare
from hetjax.core.progress import Progress, told
from hetjax.core.schedule import build_schedule
from hetjax.core.step import Act, Doing, Gradients, Tree, Trees, Update, lent
from hetjax.core.tasks import Cost, HostTimes, Kind, StageKey, Task, Thing, What
from hetjax.core.timeline import Recorder
from hetjax.core.train_spec import TrainSpec
from hetjax.core.wiring import Wiring

IN_FLIGHT = 8
Microbatch = Mapping[str, np.ndarray]


class Pipeline(Wiring):
    """The stages of a graph, what joins them, and the schedule by which they work."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__(spec)
        self.reschedule(costs(self.graph, self.stages, spec.batch))
        self.progress = Progress(self)
        self._leaving: dict[Thing, Tree] = {}  # across steps
        self.recorder: Recorder | None = None  # of the step that is recorded
        self.annotates = False  # tasks have their names in a profile

    @functools.cached_property
    def in_flight(self) -> dict[StageKey, int]:
        """Tasks of each stage that may be handed out before they are through; stages on the same devices share them."""
        return {key: max(IN_FLIGHT // stage.module.layout.vpp, 1) for key, stage in self.stages.items()}

    def reschedule(self, costs: Mapping[StageKey, Cost]) -> None:
        """Orders the tasks by what the stages cost. Where a state's arrays lie between steps may change."""
        self.schedule = build_schedule(
            self.nodes,
            self.spec.num_microbatches,
            kind=self.spec.schedule,
            encoder_window=self.spec.encoder_window,
            ties=list(dict.fromkeys((tie.copy, tie.owner) for tie in self.ties if tie.gradients is not None)),
            costs=costs,
        )
        mine = lambda tasks: tuple(filter(self.is_mine, tasks))
        # those in which this process takes part: up to the finished gradients, and behind them
        self.tasks = mine(self.schedule.gradients), mine(self.schedule.update)

    def promise(self) -> str:
        """A line with what the schedule promises."""
        spec = self.spec
        return f"schedule {spec.schedule}, {spec.num_microbatches} microbatches, simulated: {self.schedule.forecast}"

    @functools.cached_property
    def finish(self) -> Finish:
        """The programs of the step's end."""
        return Finish(self)

    @functools.cached_property
    def evaluated(self) -> Evaluated:
        """Brings what the last stage's evaluation gives to the host."""
        return Evaluated(self.stages[self.last], self.spec.devices)

    @functools.cached_property
    def flags(self) -> dict[StageKey, tuple[jax.Array, jax.Array]]:
        """False and True on each stage's devices: whether a microbatch is the step's first."""
        everywhere = {key: NamedSharding(stage.plan.mesh, P()) for key, stage in self.stages_here.items()}
        put = processes.placed
        return {key: (put(np.False_, where), put(np.True_, where)) for key, where in everywhere.items()}

    def zeros(self) -> Trees:
        """Gradient accumulators of every stage that trains."""
        return {key: stage.parameters.zeros() for key, stage in self.stages_here.items() if stage.parameters.trains}

    def gradients(
        self, weights: Trees, microbatches: Sequence[Prepared], acc: Trees, count: float
    ) -> tuple[Reduced, list[Scores], HostTimes]:
        """Gradients of (sum of token losses) / `count` + mean of the microbatches' auxiliary losses, the scores of each
        microbatch, and where time went.

        `acc` is consumed. Returns before the devices are done.
        """
        alive = Alive(self.schedule.home, self._leaving)
        for key, tree in weights.items():
            alive.begin(Thing(What.WEIGHTS, key), tree)
        step = Gradients(self.finish, self.flags, alive, microbatches, dict(acc), count)
        host = self._walk(self.tasks[0], step.doing)
        return step.reduced(), [step.scores[i] for i in range(len(microbatches))], host

    def update(
        self,
        params: Trees,
        states: Trees,
        reduced: Reduced,
        scores: list[Scores],
        *,
        count: float,
        learning_rate: float,
        host: HostTimes,
    ) -> tuple[Trees, Trees, Trees, Outcome]:
        """New (params, working weights, optimizer states) and the outcome. The first two arguments are consumed.

        `scores` are the microbatches', `count` the step's target tokens.
        """
        here = {key: stage for key, stage in self.finish.moved.items() if key in self.mine}
        alive, trains = reduced.alive, {key: stage.parameters for key, stage in here.items()}
        for key, mine in trains.items():
            alive.begin(Thing(What.MASTERS, key), mine.masters(params[key]))
            alive.begin(Thing(What.STATE, key), states[key])
        step = Update(self.finish, alive, reduced, scores, count, learning_rate)
        self._walk(self.tasks[1], step.doing)
        weights = {key: alive.left(Thing(What.WEIGHTS, key)) for key in self.stages_here}
        made = {key: mine.all_of(alive.left(Thing(What.MASTERS, key)), weights[key]) for key, mine in trains.items()}
        states = states | {key: alive.left(Thing(What.STATE, key)) for key in trains}
        return params | made, weights, states, self.finish.outcome(step.told, host)

    def at_home(self, what: What, key: StageKey, tree: Tree) -> Tree:
        """What a stage holds from step to step, in the memory where it lies between steps."""
        return on_host(tree) if Thing(what, key) in self.schedule.home else tree

    def weights(self, params: Trees) -> Trees:
        """The working weights of these parameters, where they lie between steps."""
        found = {
            key: self.at_home(What.WEIGHTS, key, s.weights(on_device(params[key])))
            for key, s in self.stages_here.items()
        }
        for tie in self.ties:
            owner, copy = (on_device(found[key]) if key in found else None for key in (tie.owner, tie.copy))
            if (weights := lent(tie, owner, copy)) is not None:
                found[tie.copy] = self.at_home(What.WEIGHTS, tie.copy, weights)
        return found

    def evaluate(self, weights: Mapping[StageKey, Tree], microbatch: Microbatch) -> tuple[jax.Array, np.ndarray]:
        """(sum of token losses, int32 [batch, seq]: the likeliest next id at every position)."""
        prepared = prepare(microbatch, self.packings)
        inputs: dict[StageKey, Tree] = collections.defaultdict(dict)
        stages = {key: stage for key, stage in self.stages.items() if stage.plan.share.replica == 0}
        self.progress.begin([Task(Kind.FORWARD, key) for key in stages])
        for key, stage in stages.items():  # producers come before their consumers
            y: Tree | None = None
            try:
                if key in self.mine:
                    given = on_device(weights[key]), inputs.pop(key, {}), self.place(key, prepared)
                    y = stage.programs["evaluate"](*given)
                for link in self.links[key]:
                    inputs[link.target] |= link.forward(y)
            except Exception as error:
                error.add_note(f"in the evaluation of {key[0]}/{key[1]}")
                raise
            self.progress.handed_out()
        loss, likeliest = self.evaluated(y)
        cp = self.graph.sink.layout.cp
        return loss, likeliest if cp == 1 else likeliest[:, np.argsort(zigzag(likeliest.shape[1], cp))]

    def _walk(self, tasks: Sequence[Task], doing: Doing) -> HostTimes:
        """Dispatches `tasks` in their order."""
        working = crossing = waiting = 0.0
        if self.annotates:
            doing = {kind: _annotated(act) for kind, act in doing.items()}
        self.progress.begin(tasks)
        for task in tasks:
            start = time.perf_counter()
            given = self.progress.given[task.stage]
            at = given[0][0] if len(given) == self.in_flight[task.stage] else None
            try:
                if at is not None:
                    given[0][1].block_until_ready()
                    given.popleft()
                begun, at = time.perf_counter(), task
                done = doing[task.kind](task)
            except Exception as error:
                assert at is not None
                error.add_note(f"in the {told(at)}")
                raise
            if done is not None and task.kind is not Kind.BOUNDARY:
                given.append((task, done))
            if done is not None and self.recorder is not None:
                self.recorder.see(task, done)
            self.progress.handed_out()
            seconds = time.perf_counter() - begun
            waits = task.kind is Kind.GONE
            waiting, working = waiting + begun - start + seconds * waits, working + seconds * (not waits)
            crossing += seconds if task.kind is Kind.BOUNDARY else 0.0
        return HostTimes(len(tasks), working, crossing, waiting)


def _annotated(act: Act) -> Act:
    def annotated(task: Task) -> jax.Array | None:
        with jax.profiler.TraceAnnotation(told(task)):
            return act(task)

    return annotated
