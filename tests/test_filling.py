"""Replicas of an encoder work in the holes of the language model's pipeline: what that is worth, and for hundreds of
random graphs that it is done in time and within bounds."""

import dataclasses
import random

import pytest
from test_forecast import check_bounds, check_devices, random_graph
from test_schedule import all_tasks, chain, text

from hetjax.core.forecast import Forecast, forecast
from hetjax.core.schedule import build_schedule
from hetjax.core.tasks import Cost, Kind, Needs, Share, StageKey, StageNode, Task


def replicas(module: str, devices: list[list[int]], *, backward: bool = True) -> list[StageNode]:
    end = Kind.MEASURE if backward else None
    alike = [StageNode(module, n, frozenset(ids), backward, (), end) for n, ids in enumerate(devices)]
    return [dataclasses.replace(node, share=Share(node.stage, len(devices))) for node in alike]


def pipeline(lanes: int, *, backward: bool = True) -> list[StageNode]:
    """A language model of so many stages, each with a replica of the encoder on its device."""
    devices = [[n] for n in range(lanes)]
    encoder = replicas("vision", devices, backward=backward)
    return [*encoder, *chain("llm", devices, tuple(node.key for node in encoder))]


def windows(lanes: int, *, backward: bool = True) -> list[StageNode]:
    """The same with one encoder over all devices."""
    encoder = chain("vision", [list(range(lanes))], backward=backward)
    return [*encoder, *chain("llm", [[n] for n in range(lanes)], (encoder[0].key,))]


def costs(nodes: list[StageNode], encoder: Cost, llm: Cost) -> dict[StageKey, Cost]:
    return {node.key: llm if node.module == "llm" else encoder for node in nodes}


def spans_of(found: Forecast, device: int) -> str:
    return text([task for task in found.spans if device in found.devices[task.stage]])


def test_forwards_fill_the_warmup_and_backwards_the_cooldown() -> None:
    """Of eight microbatches each device encodes two, where it waits for the language model. The first device waits for
    the first backward, the last one at both ends."""
    nodes = pipeline(4)
    found = forecast(nodes, 8, costs=costs(nodes, Cost(1, 2), Cost(2, 4)))
    assert spans_of(found, 0) == "vF0 lF0 lF1 lF2 lF3 vF4 lB0 lF4 lB1 lF5 lB2 lF6 lB3 lF7 lB4 vB0 lB5 vB4 lB6 lB7"
    assert spans_of(found, 3) == "vF3 vF7 lF0 lB0 lF1 lB1 lF2 lB2 lF3 lB3 lF4 lB4 lF5 lB5 lF6 lB6 lF7 lB7 vB3 vB7"
    assert found.makespan == found.text_only + 1 + 2, "the first microbatch's forward and the last one's backward alone"


@pytest.mark.parametrize("rounds", [2, 3, 5, 8])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_an_encoder_that_fits_the_holes_costs_less_than_a_fiftieth(lanes: int, rounds: int) -> None:
    """A device waits for (lanes - 1) forwards and as many backwards. The first device's holes among its last backwards
    are as long as forwards: what a replica has of the encoder's backwards must fit into these."""
    nodes, num, llm = pipeline(lanes), rounds * lanes, Cost(1000, 2000)
    room = (lanes - 1) * llm.forward // (2 * rounds)  # for the forward of a microbatch, whose backward takes twice that
    text_only = (num + lanes - 1) * sum(llm)
    cost = min(room, text_only // 50 // 3 - 1)
    found = forecast(nodes, num, costs=costs(nodes, Cost(cost, 2 * cost), llm))
    assert found.text_only == text_only and found.makespan < 1.02 * text_only
    over_all = costs(windows(lanes), Cost(cost // lanes, 2 * cost // lanes), llm)
    in_windows = forecast(windows(lanes), num, costs=over_all)
    assert found.throughput > in_windows.throughput


def test_a_forward_goes_first_where_the_language_model_would_wait_longer_for_it() -> None:
    """A frozen encoder whose work is less than half of the holes, though some of its forwards are due before these."""
    nodes = pipeline(4, backward=False)
    found = forecast(nodes, 32, costs=costs(nodes, Cost(50, 1), Cost(100, 200)))
    assert found.makespan <= found.text_only + 2 * 50


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(("forward", "window"), [(4, 8), (40, 8), (400, 8), (4, None), (400, None), (4000, None)])
def test_no_encoder_is_too_large_to_be_worth_it(forward: int, window: int | None, backward: bool) -> None:
    """Up to fifty times what the holes hold. In windows each device has a quarter of every microbatch."""
    nodes, whole, llm = pipeline(4, backward=backward), windows(4, backward=backward), Cost(100, 200)
    found = forecast(nodes, 16, encoder_window=window, costs=costs(nodes, Cost(forward, 2 * forward), llm))
    quarter = costs(whole, Cost(forward // 4, forward // 2), llm)
    assert found.makespan <= forecast(whole, 16, encoder_window=window, costs=quarter).makespan


@pytest.mark.parametrize("window", [8, 12, 16, None])
def test_a_window_bounds_what_is_in_memory(window: int | None) -> None:
    nodes = pipeline(4)
    found = forecast(nodes, 32, encoder_window=window, costs=costs(nodes, Cost(1, 2), Cost(2, 4)))
    most = 8 if window is None else window // 4
    assert {found.in_flight["vision", n] for n in range(4)} == {most} == {found.bounds["vision", n] for n in range(4)}
    assert found.throughput > forecast(windows(4), 32, encoder_window=window).throughput


def test_less_than_the_language_model_keeps_is_refused() -> None:
    said = "encoder_window=3 is less than the 4 microbatches in flight behind the replicas of vision; set at least 4"
    with pytest.raises(ValueError, match=said):
        forecast(pipeline(4), 8, encoder_window=3)
    with pytest.raises(ValueError, match="encoder_window=6 is less than the 8 microbatches"):
        forecast(pipeline(4), 8, encoder_window=6, kind="gpipe")


def random_filled(rng: random.Random) -> list[StageNode]:
    """A random graph with one or two modules more, whose replicas stand anywhere and enter any stages."""
    nodes = random_graph(rng)
    llm = [node for node in nodes if node.module == "llm"]
    lanes = sorted({min(node.devices) for node in llm})
    more: list[StageNode] = []
    for module in ("filling", "more")[: rng.choice([1, 1, 2])]:
        places = [lanes, lanes[::-1], lanes[:2], [*lanes, 77], [88, 99]]
        more += replicas(module, [[device] for device in rng.choice(places)], backward=rng.random() < 0.7)
        ends = tuple(node.key for node in more if node.module == module)
        where = rng.sample(range(len(llm)), rng.randint(1, len(llm)))
        lowest = min(where) if more[-1].backward else len(llm)
        llm = [
            dataclasses.replace(
                node,
                upstream=(*node.upstream, *(ends if node.stage in where else ())),
                backward=node.backward or node.stage >= lowest,
            )
            for node in llm
        ]
    every = [*more, *(node for node in nodes if node.module != "llm"), *llm]
    return [dataclasses.replace(node, end=Kind.MEASURE if node.backward else None) for node in every]


@pytest.mark.parametrize("seed", range(120))
def test_whatever_the_graph_all_is_done_in_time_and_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    nodes, num = random_filled(rng), rng.choice([5, 6, 8, 12])
    kind, window = rng.choice(["1f1b", "zerobubble", "gpipe"]), rng.choice([None, 1, (num + 1) // 2, num - 1])
    cost = {node.key: Cost(rng.randint(1, 9), rng.randint(2, 9)) for node in nodes}
    if kind == "zerobubble":
        alone = lambda node: node.backward and node.share.replicas == 1
        nodes = [dataclasses.replace(node, splits=alone(node) and rng.random() < 0.8) for node in nodes]
        cost = {node.key: cost[node.key]._replace(weights=int(node.splits)) for node in nodes}
    try:
        schedule = build_schedule(nodes, num, kind=kind, encoder_window=window, costs=cost)
    except ValueError:
        schedule = build_schedule(nodes, num, kind=kind, costs=cost)
    found, needs = schedule.forecast, Needs(nodes, num)
    assert set(found.spans) == set(needs.of_microbatches())
    for task, span in found.spans.items():
        assert span.end - span.begin == cost[task.stage].of(task.kind)
        assert all(found.spans[need].end <= span.begin for need in needs.computed(task)), task
    check_devices(found, nodes)
    check_bounds(found, nodes, num)
    assert found.shortest <= found.makespan
    assert len(schedule.order) == len(set(schedule.order)) and set(schedule.order) == all_tasks(nodes, num, [])
    at = {task: n for n, task in enumerate(schedule.order)}
    assert all(at[need] < at[task] for task in schedule.order for need in needs.of(task))


def test_each_microbatch_is_encoded_once_and_replicas_meet_at_the_end() -> None:
    nodes = pipeline(2)
    ties = [(("vision", 1), ("vision", 0))]
    schedule = build_schedule(nodes, 5, ties=ties)
    taken = {
        n: [t.microbatch for t in schedule.order if t.stage == ("vision", n) and t.kind is Kind.FORWARD] for n in (0, 1)
    }
    assert taken == {0: [0, 2, 4], 1: [1, 3]}
    assert [t for t in schedule.order if t.kind is Kind.TIE] == [
        Task(Kind.TIE, *ties[0][:1], to=ties[0][1]),
        Task(Kind.TIE, ties[0][1], to=ties[0][0]),
    ]
    assert [t.stage for t in schedule.update if t.kind is Kind.UPDATE] == [("vision", 0), ("llm", 0), ("llm", 1)]
