"""A schedule is complete, ordered by need, bounded, and free of circular waits, for hundreds of random graphs."""

import random

import pytest

from hetjax.core.schedule import Kind, Schedule, StageNode, Task, build_schedule, dependencies


def chain(module: str, devices: list[list[int]], upstream: tuple = (), *, backward: bool = True) -> list[StageNode]:
    nodes = []
    for index, ids in enumerate(devices):
        before = upstream if index == 0 else ((module, index - 1),)
        nodes.append(StageNode(module, index, frozenset(ids), backward, before))
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
    return [*nodes, *chain("llm", llm, tuple(ends))]


def positions(schedule: Schedule) -> dict[Task, int]:
    return {task: i for i, task in enumerate(schedule.order)}


@pytest.mark.parametrize("seed", range(200))
def test_random_schedules_are_complete_ordered_bounded_and_without_deadlock(seed: int) -> None:
    rng = random.Random(seed)
    nodes, num = random_nodes(rng), rng.choice([1, 2, 4, 7])
    kind, window = rng.choice(["1f1b", "gpipe"]), rng.choice([None, 1, num])
    schedule = build_schedule(nodes, num, kind=kind, encoder_window=window)
    expected = {Task(*n.key, i, k) for n in nodes for i in range(num) for k in Kind if k is Kind.FORWARD or n.backward}
    assert len(schedule.order) == len(expected) and set(schedule.order) == expected
    at = positions(schedule)
    for task in schedule.order:
        assert all(at[need] < at[task] for need in dependencies(task, nodes))
    assert sum(map(len, schedule.groups)) == len(expected) and {t for g in schedule.groups for t in g} == expected
    for group in schedule.groups:
        assert [at[t] for t in group] == sorted(at[t] for t in group)
    run_in_groups(schedule, nodes)
    for node in nodes:  # gradients are added in this order, so they are the same to the bit under every schedule
        backward = [t.microbatch for t in schedule.order if t.key == node.key and t.kind is Kind.BACKWARD]
        assert backward == sorted(backward)
    if kind == "1f1b":
        llm = [n for n in nodes if n.module == "llm"]
        for node in llm:
            assert schedule.max_in_flight[node.key] <= len(llm) - node.stage


def run_in_groups(schedule: Schedule, nodes: list[StageNode]) -> None:
    """Executes the groups as independent queues, as the host loop does: it must always find a ready head."""
    done: set[Task] = set()
    heads = [list(group) for group in schedule.groups]
    while any(heads):
        ready = [q for q in heads if q and all(t in done for t in dependencies(q[0], nodes))]
        assert ready
        for queue in ready:
            done.add(queue.pop(0))


def test_1f1b_alternates_after_a_warmup_of_the_longest_path() -> None:
    nodes = vlm(vision=[[0], [1]], llm=[[2], [3]])
    schedule = build_schedule(nodes, 6)
    of = lambda key: "".join(t.kind.value for t in schedule.order if t.key == key)
    assert of(("llm", 1)) == "FB" * 6
    assert of(("llm", 0)) == "FF" + "BF" * 4 + "BB"
    assert of(("vision", 0)) == "FFFF" + "BF" * 2 + "BBBB"
    assert [schedule.max_in_flight[n.key] for n in nodes] == [4, 3, 2, 1]


def test_gpipe_runs_every_forward_before_the_first_backward() -> None:
    schedule = build_schedule(vlm(vision=[[0]], llm=[[2], [3]]), 3, kind="gpipe")
    for key in (("vision", 0), ("llm", 0), ("llm", 1)):
        assert "".join(t.kind.value for t in schedule.order if t.key == key) == "FFFBBB"


def test_colocated_encoder_runs_three_phases_per_window() -> None:
    nodes = vlm(vision=[[0, 1]], llm=[[0, 1]])
    text = lambda window: " ".join(
        f"{t.module[0]}{t.kind.value}{t.microbatch}" for t in build_schedule(nodes, 4, encoder_window=window).order
    )
    assert text(None) == "vF0 vF1 vF2 vF3 lF0 lB0 lF1 lB1 lF2 lB2 lF3 lB3 vB0 vB1 vB2 vB3"
    assert text(2) == "vF0 vF1 lF0 lB0 lF1 lB1 vB0 vB1 vF2 vF3 lF2 lB2 lF3 lB3 vB2 vB3"
    assert text(1) == "vF0 lF0 lB0 vB0 vF1 lF1 lB1 vB1 vF2 lF2 lB2 vB2 vF3 lF3 lB3 vB3"


def test_frozen_encoder_has_no_backward_and_does_not_run_ahead_without_bound() -> None:
    nodes = vlm(vision=[[0]], llm=[[1]], vision_trains=False)
    order = build_schedule(nodes, 20).order
    assert not [t for t in order if t.module == "vision" and t.kind is Kind.BACKWARD]
    at = {t: i for i, t in enumerate(order)}
    for i in range(18):
        assert at[Task("vision", 0, i + 2, Kind.FORWARD)] > at[Task("llm", 0, i, Kind.FORWARD)]


def test_two_encoders_both_precede_the_llm() -> None:
    vision, audio = chain("vision", [[0]]), chain("audio", [[1]])
    nodes = [*vision, *audio, *chain("llm", [[2]], (("vision", 0), ("audio", 0)))]
    needs = dependencies(Task("llm", 0, 0, Kind.FORWARD), nodes)
    assert needs == [Task("vision", 0, 0, Kind.FORWARD), Task("audio", 0, 0, Kind.FORWARD)]
    assert dependencies(Task("audio", 0, 1, Kind.BACKWARD), nodes) == [
        Task("audio", 0, 1, Kind.FORWARD),
        Task("llm", 0, 1, Kind.BACKWARD),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="zigzag"), "schedule='zigzag'; it must be one of 1f1b, gpipe"),
        (dict(encoder_window=0), "encoder_window=0 is outside of 1 to num_microbatches=4; None means all of them"),
        (dict(encoder_window=5), "encoder_window=5 is outside of 1 to num_microbatches=4; None means all of them"),
    ],
)
def test_impossible_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(vlm(vision=[[0]], llm=[[1]]), 4, **options)
