"""In which order each stage takes its microbatches, and what its tasks wait for beside what they are given.

Stages of one module on the same devices take turns there. Of `size` such lanes, a module of several stages a lane
(interleaved 1F1B, arXiv:2104.04473) takes `size` microbatches through its first stages, then the same through its
second ones, then the next `size`; four microbatches forward through the stages a b c d on two lanes:

    lane 0   a0 a1 c0 c1 a2 a3 c2 c3
    lane 1      b0 b1 d0 d1 b2 b3 d2 d3

and back the other way round. With one stage a lane both orders are that of the microbatches. So a stage's backwards
come in the order of the microbatches whatever the schedule, and its gradients have the same bits.

GPipe (arXiv:1811.06965) is forwards first. 1F1B (PipeDream-Flush, arXiv:2006.09503) is backwards first, with a bound on
the microbatches in flight: those that keep the stages from here to the loss busy. Modules that share devices with the
sink run in windows on the devices that both stand on: encode a window of microbatches, run the sink over them, then the
encoders' backwards (arXiv:2605.27678's three phases, when the window is the whole step). The replicas of a module, each
with its share of the microbatches, work in the holes of the others instead (`filling.py`), at most a window of
microbatches ahead.

What is waited for can be no circle: the earliest microbatch that is not through all stages can always go on.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from hetjax.core.simulation import Lane
from hetjax.core.tasks import Kind, Needs, StageKey, StageNode, Task


@dataclasses.dataclass(frozen=True)
class Turns:
    """The stages of a module on the same devices; they are number `place` of `size` such lanes."""

    stages: tuple[StageNode, ...]
    place: int
    size: int

    @property
    def module(self) -> str:
        """Theirs."""
        return self.stages[0].module

    @property
    def trained(self) -> list[StageKey]:
        """Those with a backward."""
        return [node.key for node in self.stages if node.backward]


class Orders:
    """The lanes of a step's tasks and what these need, under `kind` "1f1b" or "gpipe" and windows of so many
    microbatches.

    `bounds`: of each stage the microbatches that may be in flight: of which the forward is done and the backward is
    not; of a stage without a backward, which keeps nothing, those whose forward no consumer has taken yet.
    """

    def __init__(self, needs: Needs, num_microbatches: int, *, kind: str, window: int) -> None:
        self.graph, self.nodes, self.kind, self.num = needs, needs.nodes, kind, num_microbatches
        nodes = list(self.nodes.values())
        sink = needs.decide.stage[0]
        of_sink = frozenset().union(*(n.devices for n in nodes if n.module == sink))
        windowed = {n.module for n in nodes if n.module != sink and n.devices & of_sink and n.share.replicas == 1}
        self.sink = [n.key for n in nodes if n.module == sink]
        self.sharing = [n.key for n in nodes if n.module in windowed]
        in_phases = [n for n in nodes if n.module in windowed or n.module == sink]
        self._beside = {n.key: [m.key for m in in_phases if m.devices & n.devices] for n in in_phases}
        self.window, self.most = window if windowed else num_microbatches, window
        self.turns = _turns(nodes)
        self.bounds: dict[StageKey, int] = {}
        self._ahead: dict[StageKey, int] = {}  # by a lane's first stage: forwards without their backwards
        for module in reversed(dict.fromkeys(n.module for n in nodes)):
            self._bind([turns for turns in self.turns if turns.module == module])

    # -- orders --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def lanes(self) -> list[Lane]:
        """That nearest to the loss first."""
        found = []
        for turns in reversed(self.turns):
            forwards, backwards = self._forwards(turns), self._backwards(turns)
            fills = turns.stages[0].share.replicas > 1
            backwards_first = self.kind != "gpipe" and len(turns.stages) == 1 and not fills
            orders = (backwards, forwards) if backwards_first else (forwards, backwards)
            found.append(Lane(turns.stages[0].devices, orders, fills))
        return found

    def _forwards(self, turns: Turns) -> list[Task]:
        keys = [node.key for node in turns.stages]
        return self._tasks(Kind.FORWARD, turns, keys)

    def _backwards(self, turns: Turns) -> list[Task]:
        keys = turns.trained[::-1]
        return self._tasks(Kind.BACKWARD, turns, keys)

    def _tasks(self, kind: Kind, turns: Turns, keys: Sequence[StageKey]) -> list[Task]:
        groups = self._groups(turns)
        return [Task(kind, key, i) for group in groups for key in keys for i in group if self.nodes[key].share.takes(i)]

    def _groups(self, turns: Turns) -> Iterator[range]:
        """Microbatches that take their turn together: at least one for each lane where a window has so many."""
        for start in range(0, self.num, self.window):
            length = min(self.window, self.num - start)
            count = max(length // turns.size, 1)
            cuts = [start + length * n // count for n in range(count + 1)]
            yield from itertools.starmap(range, itertools.pairwise(cuts))

    def _last_of_window(self, microbatch: int) -> int:
        return min(microbatch - microbatch % self.window + self.window, self.num) - 1

    # -- bounds --------------------------------------------------------------------------------------------------

    def _bind(self, lanes: Sequence[Turns]) -> None:
        """Sets how far the lanes of a module may be ahead; the modules that take of it come before."""
        keys = sorted((node.key for turns in lanes for node in turns.stages), reverse=True)
        taken = lambda key: max((self.bounds[k] for k in self.graph.consumers[key] if k in self.bounds), default=0)
        outside = max(map(taken, keys))
        if self.nodes[keys[0]].share.replicas > 1:
            self._bind_replicas(keys, outside)
            return
        if self.kind == "gpipe" or keys[0] in self.sharing:
            most = self.window if keys[0] in (*self.sink, *self.sharing) else self.num
            self.bounds |= dict.fromkeys(keys, most)
            self._ahead |= {turns.stages[0].key: most * len(turns.trained) for turns in lanes}
            return
        for turns in lanes:
            if len(turns.stages) > 1:
                self._ahead[turns.stages[0].key] = ahead = self._far(turns, outside)
                self.bounds |= self._in_flight(turns, ahead)
        for key in keys:
            self._ahead.setdefault(key, self.bounds.setdefault(key, min(1 + taken(key), self.num)))

    def _bind_replicas(self, keys: Sequence[StageKey], least: int) -> None:
        """Raises ValueError for a window with fewer microbatches than the `least` in flight behind them."""
        replicas = len(keys)
        if self.most < least:
            raise ValueError(
                f"encoder_window={self.most} is less than the {least} microbatches in flight behind the replicas of "
                f"{keys[0][0]}; set at least {least}, or None"
            )
        for key in keys:
            self.bounds[key] = self._ahead[key] = min(-(-self.most // replicas), len(self.graph.microbatches(key)))

    def _far(self, turns: Turns, outside: int) -> int:
        """Forwards without their backwards that keep the devices of several stages busy, where `outside` microbatches
        may be on their way behind the module: until the first one is back from the last lane, and in all stages but the
        last."""
        group, trained = max(map(len, self._groups(turns))), len(turns.trained)
        there_and_back = 2 * (turns.size - turns.place - 1) + 1
        return there_and_back + (max(trained - 1, 0) + -(-outside // group) * trained) * group

    def _in_flight(self, turns: Turns, ahead: int) -> dict[StageKey, int]:
        """Most microbatches in flight of the trained stages of a lane that is so many forwards ahead."""
        counts, most = dict.fromkeys(turns.trained, 0), dict.fromkeys(turns.trained, 0)
        forwards = [task.stage for task in self._forwards(turns) if task.stage in counts]
        back = iter(self._backwards(turns))
        for n, key in enumerate(forwards):
            if n >= ahead:
                counts[next(back).stage] -= 1
            counts[key] += 1
            most[key] = max(most[key], counts[key])
        return most

    def ahead(self, lane: Turns) -> int:
        """Forwards without their backwards that a lane may have, of all its stages together."""
        return self._ahead[lane.stages[0].key]

    # -- needs ---------------------------------------------------------------------------------------------------

    def needs(self) -> dict[Task, list[Task]]:
        """Of every forward and backward, what must have ended."""
        tasks = [task for task in self.graph.of_microbatches() if task.kind is not Kind.WEIGHTS]
        found = {task: self.graph.computed(task) + self._rules(task) for task in tasks}
        for turns in (turns for turns in self.turns if len(turns.stages) > 1):
            forwards = [task for task in self._forwards(turns) if self.nodes[task.stage].backward]
            ahead = self.ahead(turns)
            for forward, backward in zip(forwards[ahead:], self._backwards(turns), strict=False):
                found[forward].append(backward)
        return {task: list(dict.fromkeys(before)) for task, before in found.items()}

    def _rules(self, task: Task) -> list[Task]:
        kind, key, i = task.kind, task.stage, task.microbatch
        found = []
        before = i - self.bounds[key] * self.nodes[key].share.replicas
        if kind is Kind.FORWARD and before >= 0:
            takers = self.graph.consumers[key]
            found += self._ends([key], before) if self.nodes[key].backward else [Task(kind, k, before) for k in takers]
        last = self._last_of_window(i)
        if kind is Kind.BACKWARD and self.kind == "gpipe" and self.nodes[key].share.replicas == 1:
            found.append(Task(Kind.FORWARD, key, last))
        beside = self._beside.get(key, ())
        if kind is Kind.FORWARD and key in self.sharing and i >= self.window:
            found += self._ends(beside, i - i % self.window - 1)
        if kind is Kind.BACKWARD and key in self.sharing:
            found += self._ends([k for k in beside if k in self.sink], last)
        if kind is Kind.FORWARD and key in self.sink:
            found += [Task(kind, k, last) for k in beside if k in self.sharing]
        return found

    def _ends(self, keys: Sequence[StageKey], microbatch: int) -> list[Task]:
        """The tasks with which stages are through with a microbatch, but for the weights' halves."""
        return [Task(Kind.BACKWARD if self.nodes[k].backward else Kind.FORWARD, k, microbatch) for k in keys]


def _turns(nodes: Sequence[StageNode]) -> list[Turns]:
    """By their first stages."""
    lanes: dict[tuple[str, frozenset[int]], list[StageNode]] = {}
    for node in nodes:
        lanes.setdefault((node.module, node.devices), []).append(node)
    of_module = lambda module: [key for key in lanes if key[0] == module]
    places = {key: (of_module(key[0]).index(key), len(of_module(key[0]))) for key in lanes}
    return [Turns(tuple(stages), *places[key]) for key, stages in lanes.items()]
