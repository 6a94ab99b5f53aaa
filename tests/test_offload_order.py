"""Where things leave and return: in hundreds of random schedules each use has its thing, and nothing stays for long."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
from test_schedule import random_nodes, vlm

from hetjax.core.schedule import Schedule, build_schedule
from hetjax.core.tasks import COMPUTING, OF_STAGES, OFFLOADS, Kind, Needs, StageKey, StageNode, Task, Thing, What

MOVES = (Kind.LEAVE, Kind.GONE, Kind.RETURN)
OFFLOADED = frozenset().union(*OFFLOADS.values())
USED_WITHIN = OFFLOADED - {What.MASTERS, What.STATE}  # by microbatches
USED_AHEAD = (Kind.FORWARD, Kind.BACKWARD)  # what they use may return one task before


def offloaded(nodes: Sequence[StageNode], rng: random.Random) -> list[StageNode]:
    """Each module with some kinds of things."""
    kinds = {
        node.module: frozenset(what for what in What if what in OFFLOADED and rng.random() < 0.7) for node in nodes
    }
    return [dataclasses.replace(node, offload=kinds[node.module]) for node in nodes]


class Walk:
    """Two steps, task by task, judged by what the tasks say that they use and by nothing else."""

    def __init__(self, schedule: Schedule, nodes: Sequence[StageNode], needs: Needs) -> None:
        self.nodes, self.needs = {n.key: n for n in nodes}, needs
        self.tasks = [(step, task) for step in (0, 1) for task in schedule.order]
        self.there = {Thing(what, n.key) for n in nodes for what in OF_STAGES} - schedule.home
        first = {task.thing: task.kind for task in reversed(schedule.order) if task.thing}
        self.leaving = {thing for thing in schedule.home if first.get(thing) is Kind.GONE}
        self.gone = set(schedule.home - self.leaving)

    def uses(self, task: Task) -> list[Thing]:
        return [] if task.thing else [*self.needs.reads(task), *self.needs.writes(task)]

    def shares(self, task: Task, thing: Thing) -> bool:
        """Whether a task computes on devices of a thing's stage."""
        return task.kind in COMPUTING and bool(self.nodes[task.stage].devices & self.nodes[thing.stage].devices)

    def between(self, start: int, thing: Thing) -> tuple[list[Task], Task | None]:
        """From a place on to the next use of a thing: the tasks that compute on its devices, and the use."""
        step, found = self.tasks[start][0], []
        for at, task in self.tasks[start:]:
            if thing in self.uses(task) and (at == step or thing.what in OF_STAGES):
                return found, task
            found += [task] if self.shares(task, thing) else []
        return found, None

    def run(self) -> None:
        for n, (_, task) in enumerate(self.tasks):
            if task.thing:
                self.move(n, task, task.thing)
                continue
            for thing in self.needs.writes(task):
                if thing.what not in OF_STAGES and thing.what is not What.COTANGENTS:
                    assert thing not in self.there, "it is made once"
                if thing.what not in OF_STAGES:
                    self.there.add(thing)
            for thing in self.uses(task):
                assert thing in self.there, (task, thing)
            self.judge(n, task)
            for thing in self.uses(task):
                if thing.what not in OF_STAGES and self.between(n + 1, thing)[1] is None:
                    self.there.remove(thing)

    def move(self, n: int, task: Task, thing: Thing) -> None:
        assert thing.what in self.nodes[thing.stage].offload
        if task.kind is Kind.LEAVE:
            self.there.remove(thing)  # it does not leave twice
            self.leaving.add(thing)
        elif task.kind is Kind.GONE:
            self.leaving.remove(thing)
            self.gone.add(thing)
        else:
            self.there.add(thing)
            self.gone.remove(thing)
            behind, use = self.between(n, thing)
            ahead = [t for t in behind if t.stage[0] == thing.stage[0]]
            assert use is None or behind == ahead, "another module works, and it is back"
            assert use is None or len(behind) <= (use.kind in USED_AHEAD), "so early nobody needs it"
            if thing.what not in USED_WITHIN and use is not None:
                start = next(i for i, (_, t) in enumerate(self.tasks[n:], n) if t is use)
                assert all(t.kind is not Kind.DECIDE for _, t in self.tasks[n:start]), "the step may be undecided"

    def judge(self, n: int, task: Task) -> None:
        """While another module works on its devices, whatever can be away is away."""
        if task.kind not in COMPUTING:
            return
        for thing in self.leaving:
            assert thing.stage[0] == task.stage[0] or not self.shares(task, thing), "its memory may not be free yet"
        for thing in self.there:
            may_go = thing.what in self.nodes[thing.stage].offload and self.shares(task, thing)
            assert not may_go or thing.what in USED_WITHIN or task.kind not in USED_AHEAD, "the update alone needs it"
            if may_go and thing.stage[0] != task.stage[0]:
                assert self.between(n, thing)[1] is None, (task, thing)


@pytest.mark.parametrize("seed", range(60))
def test_every_use_has_its_thing_and_others_find_the_memory_free(seed: int) -> None:
    rng = random.Random(seed)
    plain, num = random_nodes(rng), rng.choice([1, 2, 4, 7])
    options = dict(kind=rng.choice(["1f1b", "gpipe", "zerobubble"]), encoder_window=rng.choice([None, 1, num]))
    if options["kind"] == "zerobubble":
        plain = [dataclasses.replace(node, splits=node.backward and rng.random() < 0.8) for node in plain]
    llm = [n for n in plain if n.module == "llm"]
    ties = [(llm[-1].key, llm[0].key)] if len(llm) > 1 else []
    nodes = offloaded(plain, rng)
    schedule = build_schedule(nodes, num, ties=ties, **options)
    walk = Walk(schedule, nodes, Needs(nodes, num, ties))
    walk.run()
    between = Walk(schedule, nodes, walk.needs)
    assert {t for t in walk.there if t.what in OF_STAGES} == between.there, "a step ends as it begins"
    assert {t.thing for t in schedule.order if t.thing and t.thing.what in OF_STAGES} <= schedule.home
    without = build_schedule(plain, num, ties=ties, **options)
    assert [t for t in schedule.order if t.kind not in MOVES] == list(without.order)
    assert schedule.update[0].kind is Kind.DECIDE


def held(schedule: Schedule, key: StageKey, what: What) -> list[int]:
    """How many of a stage's things of a kind are on its devices, moment by moment."""
    return [
        max([n for thing, n in m.device if (thing.what, thing.stage) == (what, key)], default=0)
        for m in schedule.moments
    ]


def test_an_encoder_is_away_while_the_language_model_works() -> None:
    nodes = [dataclasses.replace(node, offload=OFFLOADED) for node in vlm(vision=[[0, 1]], llm=[[0, 1]])]
    schedule = build_schedule(nodes, 3)
    vision, llm = ("vision", 0), ("llm", 0)
    by_module = {key: [m for m in schedule.moments if m.stage == key] for key in (vision, llm)}
    for m in by_module[llm]:
        assert {thing.what for thing, _ in m.device if thing.stage == vision} <= {What.SUMS}, m
    for m in by_module[vision]:
        there = {thing.what for thing, _ in m.device if thing.stage == llm}
        assert there <= {What.INPUTS, What.SUMS}, m
    most = lambda key, what: max(held(schedule, key, what))
    assert most(vision, What.RESIDUALS) == 2 and most(llm, What.RESIDUALS) == 1
    plain = build_schedule(vlm(vision=[[0, 1]], llm=[[0, 1]]), 3)
    assert max(held(plain, vision, What.RESIDUALS)) == 3 == plain.forecast.in_flight[vision]
    names = {What.RESIDUALS: "R"}
    signs = {Kind.LEAVE: "<", Kind.GONE: "|", Kind.RETURN: ">"}
    text = " ".join(
        f"{signs[t.kind]}{names[t.thing.what]}{t.microbatch}"
        if t.thing
        else f"{t.stage[0][0]}{t.kind.value}{t.microbatch}"
        for t in schedule.gradients
        if (t.kind in USED_AHEAD) or (t.thing and t.thing.what is What.RESIDUALS)
    )
    assert text == ("vF0 <R0 vF1 <R1 |R0 vF2 <R2 |R1 |R2 lF0 lB0 lF1 lB1 lF2 lB2 >R0 >R1 vB0 >R2 vB1 vB2")
