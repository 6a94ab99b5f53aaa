"""A schedule is one list: complete, ordered by need and bounded, for hundreds of random graphs."""

import dataclasses
import random

import pytest

from hetjax.core.schedule import Schedule, build_schedule
from hetjax.core.tasks import Kind, Needs, StageNode, Task


def chain(module: str, devices: list[list[int]], upstream: tuple = (), *, backward: bool = True) -> list[StageNode]:
    nodes = []
    for index, ids in enumerate(devices):
        before = upstream if index == 0 else ((module, index - 1),)
        end = None if not backward else Kind.REDUCE if len(ids) > 1 else Kind.MEASURE
        nodes.append(StageNode(module, index, frozenset(ids), backward, before, end))
    return nodes


def vlm(*, vision: list[list[int]], llm: list[list[int]], vision_trains: bool = True) -> list[StageNode]:
    encoder = chain("vision", vision, backward=vision_trains)
    return [*encoder, *chain("llm", llm, (encoder[-1].key,))]


def random_nodes(rng: random.Random) -> list[StageNode]:
    llm_pp, next_device = rng.choice([1, 2, 4]), 100
    llm = [[next_device + i] for i in range(llm_pp)]
    nodes: list[StageNode] = []
    ends = []
    for e in range(rng.randrange(4)):
        pp = rng.choice([1, 2, 3])
        place = rng.choice(["disjoint", "colocated", "first", "shared"])
        devices = {
            "disjoint": [[10 * e + i] for i in range(pp)],
            "colocated": [[d for ids in llm for d in ids]] * pp,
            "first": [llm[0]] * pp,
            "shared": [[999]] * pp,
        }[place]
        nodes += chain(f"e{e}", devices, backward=rng.random() < 0.7)
        ends.append(nodes[-1].key)
    return [*nodes, *entered(chain("llm", llm), rng, ends)]


def entered(llm: list[StageNode], rng: random.Random, ends: list) -> list[StageNode]:
    """The stages with encoders that enter the first, any others, or several."""
    for end in ends:
        where = rng.sample(range(len(llm)), rng.randint(1, len(llm)))
        llm = [
            dataclasses.replace(node, upstream=(*node.upstream, end)) if node.stage in where else node for node in llm
        ]
    return llm


def computed(schedule: Schedule) -> list[Task]:
    return [t for t in schedule.order if t.kind in (Kind.FORWARD, Kind.BACKWARD)]


def text(tasks: list[Task]) -> str:
    return " ".join(f"{t.stage[0][0]}{t.kind.value}{t.microbatch}" for t in tasks)


@pytest.mark.parametrize("seed", range(200))
def test_random_schedules_are_complete_ordered_and_bounded(seed: int) -> None:
    rng = random.Random(seed)
    nodes, num = random_nodes(rng), rng.choice([1, 2, 4, 7])
    kind, window = rng.choice(["1f1b", "gpipe", "zerobubble"]), rng.choice([None, 1, num])
    if kind == "zerobubble":
        nodes = [dataclasses.replace(node, splits=node.backward and rng.random() < 0.8) for node in nodes]
    llm = [n for n in nodes if n.module == "llm"]
    ties = [(llm[-1].key, llm[0].key)] if len(llm) > 1 else []
    schedule = build_schedule(nodes, num, kind=kind, encoder_window=window, ties=ties)
    assert len(schedule.order) == len(set(schedule.order)) and set(schedule.order) == all_tasks(nodes, num, ties)
    at, needs = {task: i for i, task in enumerate(schedule.order)}, Needs(nodes, num, ties)
    for task in schedule.order:
        assert all(at[need] < at[task] for need in needs.of(task)), task
    assert schedule.update[0].kind is Kind.DECIDE
    for node in nodes:  # gradients are added in this order, so they are the same to the bit under every schedule
        for half in (Kind.BACKWARD, Kind.WEIGHTS):
            backward = [t.microbatch for t in schedule.order if t.stage == node.key and t.kind is half]
            assert backward == sorted(backward)
    if kind != "gpipe":
        for node in llm:
            assert schedule.forecast.in_flight[node.key] <= len(llm) - node.stage
        longest = len({n.stage for n in nodes if n.module != "llm"})  # stages of the deepest encoder
        devices = {d for n in llm for d in n.devices}
        if not any(n.devices & devices for n in nodes if n.module != "llm"):
            assert max(schedule.forecast.in_flight.values()) <= len(llm) + longest


def all_tasks(nodes: list[StageNode], num: int, ties: list) -> set[Task]:
    """Those of a step, written down apart from `Needs`."""
    by_key = {n.key: n for n in nodes}
    found = {Task(Kind.DECIDE, nodes[-1].key)}
    found |= {Task(Kind.TIE, a, to=b) for pair in ties for a, b in (pair, pair[::-1])}
    for node in nodes:
        ends = (node.end,) if node.share.replica else (node.end, Kind.UPDATE)
        found |= {Task(kind, node.key) for kind in ends if kind and node.end}
        for i in range(node.share.replica, num, node.share.replicas):
            upstream = [key for key in node.upstream if i % by_key[key].share.replicas == by_key[key].share.replica]
            found.add(Task(Kind.FORWARD, node.key, i))
            found |= {Task(Kind.BOUNDARY, source, i, node.key) for source in upstream}
            if node.backward:
                found.add(Task(Kind.BACKWARD, node.key, i))
                found |= {Task(Kind.BOUNDARY, node.key, i, key) for key in upstream if by_key[key].backward}
            if node.splits:
                found.add(Task(Kind.WEIGHTS, node.key, i))
    return found


def test_a_boundary_stands_where_its_producer_ends() -> None:
    """Neither in front of what the receiver does meanwhile, nor behind the sender's next task."""
    schedule = build_schedule(chain("llm", [[0], [1]]), 2)
    names = [f"{t.kind.value}{t.stage[1]}.{t.microbatch}" for t in schedule.gradients]
    first = ["F0.0", "boundary0.0", "F1.0", "F0.1", "boundary0.1", "B1.0", "boundary1.0", "F1.1", "B0.0", "B1.1"]
    assert names[: len(first)] == first
    assert names[len(first) :] == ["boundary1.1", "measure1.-1", "B0.1", "measure0.-1"]


def test_gradients_are_finished_behind_the_last_half() -> None:
    nodes = [dataclasses.replace(node, splits=True) for node in chain("llm", [[0], [1]])]
    order = [
        f"{t.kind.value}{t.stage[1]}.{t.microbatch}" for t in build_schedule(nodes, 3, kind="zerobubble").gradients
    ]
    assert order[-4:] == ["W1.2", "W0.2", "measure1.-1", "measure0.-1"]
    needed = Needs(nodes, 3).of(Task(Kind.MEASURE, ("llm", 0)))
    assert set(needed) == {Task(half, ("llm", 0), i) for half in (Kind.BACKWARD, Kind.WEIGHTS) for i in range(3)}


def test_1f1b_alternates_after_a_warmup_of_the_longest_path() -> None:
    nodes = vlm(vision=[[0], [1]], llm=[[2], [3]])
    schedule = build_schedule(nodes, 6)
    of = lambda key: "".join(t.kind.value for t in computed(schedule) if t.stage == key)
    assert of(("llm", 1)) == "FB" * 6
    assert of(("llm", 0)) == "FF" + "BF" * 4 + "BB"
    assert of(("vision", 0)) == "FFFF" + "BF" * 2 + "BBBB"
    assert [schedule.forecast.in_flight[n.key] for n in nodes] == [4, 3, 2, 1]


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (0, 3), (2,), (0, 2)])
def test_entering_later_stages_costs_no_time(stages: tuple[int, ...]) -> None:
    """What a later stage needs is there before the carry is; and an encoder that enters none of the first keeps fewer
    microbatches in flight."""
    encoder, llm = chain("vision", [[0]]), chain("llm", [[1], [2], [3], [4]])
    give = lambda where: [
        dataclasses.replace(n, upstream=(*n.upstream, encoder[0].key)) if n.stage in where else n for n in llm
    ]
    plain, skips = (build_schedule([*encoder, *give(where)], 8) for where in ((0,), stages))
    if 0 in stages:
        assert computed(skips) == computed(plain)
    assert skips.forecast.in_flight == plain.forecast.in_flight | {("vision", 0): 5 - min(stages)}


def test_gpipe_runs_every_forward_before_the_first_backward() -> None:
    schedule = build_schedule(vlm(vision=[[0]], llm=[[2], [3]]), 3, kind="gpipe")
    for key in (("vision", 0), ("llm", 0), ("llm", 1)):
        assert "".join(t.kind.value for t in computed(schedule) if t.stage == key) == "FFFBBB"


def test_colocated_encoder_runs_three_phases_per_window() -> None:
    nodes = vlm(vision=[[0, 1]], llm=[[0, 1]])
    text_of = lambda window: text(computed(build_schedule(nodes, 4, encoder_window=window)))
    assert text_of(None) == "vF0 vF1 vF2 vF3 lF0 lB0 lF1 lB1 lF2 lB2 lF3 lB3 vB0 vB1 vB2 vB3"
    assert text_of(2) == "vF0 vF1 lF0 lB0 lF1 lB1 vB0 vB1 vF2 vF3 lF2 lB2 lF3 lB3 vB2 vB3"
    assert text_of(1) == "vF0 lF0 lB0 vB0 vF1 lF1 lB1 vB1 vF2 lF2 lB2 vB2 vF3 lF3 lB3 vB3"


@pytest.mark.parametrize("window", [1, 2, 4])
def test_phases_hold_where_the_pipeline_leaves_the_encoders_devices_idle(window: int) -> None:
    order = computed(build_schedule(vlm(vision=[[0]], llm=[[0], [1]]), 4, encoder_window=window))
    phase = lambda t: "FlB".index(t.kind.value if t.stage[0] == "vision" else "l")
    phases = [(t.microbatch // window, phase(t)) for t in order]
    assert phases == sorted(phases)


def test_frozen_encoder_has_no_backward_and_does_not_run_ahead_without_bound() -> None:
    nodes = vlm(vision=[[0]], llm=[[1]], vision_trains=False)
    order = build_schedule(nodes, 20).order
    assert {t.kind for t in order if "vision" in t.stage} == {Kind.FORWARD, Kind.BOUNDARY}
    at = {t: i for i, t in enumerate(order)}
    for i in range(18):
        assert at[Task(Kind.FORWARD, ("vision", 0), i + 2)] > at[Task(Kind.FORWARD, ("llm", 0), i)]


def test_two_encoders_both_precede_the_llm() -> None:
    vision, audio = chain("vision", [[0]]), chain("audio", [[1]])
    nodes = [*vision, *audio, *chain("llm", [[2]], (("vision", 0), ("audio", 0)))]
    of = Needs(nodes, 2).of
    llm, first = ("llm", 0), [Task(Kind.BOUNDARY, (name, 0), 0, ("llm", 0)) for name in ("vision", "audio")]
    assert of(Task(Kind.FORWARD, llm, 0)) == first
    back = Task(Kind.BOUNDARY, llm, 1, ("audio", 0))
    assert of(Task(Kind.BACKWARD, ("audio", 0), 1)) == [Task(Kind.FORWARD, ("audio", 0), 1), back]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="zigzag"), "schedule='zigzag'; it must be one of 1f1b, gpipe, zerobubble"),
        (dict(encoder_window=0), "encoder_window=0 is outside of 1 to num_microbatches=4; None means all of them"),
        (dict(encoder_window=5), "encoder_window=5 is outside of 1 to num_microbatches=4; None means all of them"),
    ],
)
def test_impossible_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(vlm(vision=[[0]], llm=[[1]]), 4, **options)
