"""Pipelines drawn with a fixed seed under every schedule. Few sets of stages are drawn, and several schedules for each,
which are the same programs in another order."""

import dataclasses
import functools
import itertools
import random

import drawn
import tiny
from test_parity import FROZEN_LLM, FROZEN_VISION, Case

from hetjax.core.layout import Layout

SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=5)
SETS, CASES = 10, 42
KINDS = [
    {"1f1b", "gpipe", "zerobubble"},
    {"colocated", "disjoint", "overlapping"},
    {"all trained", "frozen llm", "frozen vision"},
    {"dense", "experts"},
    {"interleaved", "one stage a device"},
    {"replicas", "windows", "one encoder, no windows"},
    {"FLOPs", "measured costs"},
]


def stages(rng: random.Random) -> Case | None:
    """A pipeline with an encoder, or None where what was drawn is not legal."""
    number = rng.choice([0, 1, 3])  # dense, with experts, with an encoder of experts
    pp, vpp = rng.choice([(2, 1), (2, 2), (4, 1)])
    llm = Layout(pp=pp, vpp=vpp, **rng.choice([{}, {}, dict(dp=2), dict(tp=2)]))
    vision = Layout(**rng.choice([{}, dict(dp=2), dict(tp=2), dict(dp=4), dict(pp=2)]))
    if vision.pp == 1 and rng.random() < 0.4:
        vision = dataclasses.replace(vision, replicas=pp)
    try:
        placed = drawn.place(rng, {"llm": llm, "vision": vision})
        drawn.check(placed, number, SHAPE)
    except ValueError:
        return None
    changes = rng.choice([(), FROZEN_LLM, FROZEN_VISION])
    return Case(**placed, shape=SHAPE, changes=changes, **drawn.MODELS[number])


def scheduled(rng: random.Random, case: Case) -> Case:
    """The same stages under a schedule."""
    window = rng.choice([None, 1, 2, 3]) if case.vision.replicas == 1 else None
    costs = rng.choice([None, rng.randrange(100)])
    kind = rng.choice(["1f1b", "gpipe", "zerobubble"])
    return dataclasses.replace(case, schedule=kind, encoder_window=window, costs=costs)


def kinds(case: Case) -> set[str]:
    """Of `KINDS`, one of each."""
    placement = drawn.placement(case)
    windows = case.encoder_window is not None and placement != "disjoint"
    return {
        case.schedule,
        placement,
        drawn.TRAINED[case.changes],
        "experts" if case.experts or case.seeing else "dense",
        "interleaved" if case.llm.vpp > 1 else "one stage a device",
        "replicas" if case.vision.replicas > 1 else "windows" if windows else "one encoder, no windows",
        "FLOPs" if case.costs is None else "measured costs",
    }


@functools.cache
def cases() -> list[Case]:
    """All of them, those of the same stages behind each other."""
    sets = drawn.cases(SETS, stages, kinds, tries=300, size=3)
    found = drawn.cases(CASES, lambda rng: scheduled(rng, rng.choice(sets)), kinds, tries=1500, size=3)
    plain = lambda case: dataclasses.replace(case, schedule="1f1b", encoder_window=None, costs=None)
    return sorted(found, key=lambda case: sets.index(plain(case)))


def pairs() -> set[tuple[str, ...]]:
    """All that can meet."""
    both = (itertools.product(one, other) for one, other in itertools.combinations(KINDS, 2))
    return {tuple(sorted(pair)) for of_two in both for pair in of_two} - {("disjoint", "windows")}
