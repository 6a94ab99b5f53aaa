"""What a schedule promises: closed forms of the bubble, bounds for hundreds of random graphs, and what is compared."""

import dataclasses
import itertools
import random
import time

import pytest
from test_schedule import chain, vlm

from hetjax.core.forecast import Forecast, forecast
from hetjax.core.tasks import OF_MICROBATCHES, Cost, Kind, Needs, StageKey, StageNode, Task


def dealt(module: str, lanes: int, rounds: int, upstream: tuple = (), *, base: int = 0, lowest: int = 0) -> list:
    """Stages dealt to one device after another, `rounds` times; those from the `lowest` on have a backward."""
    nodes = chain(module, [[base + n % lanes] for n in range(lanes * rounds)], upstream)
    return [dataclasses.replace(node, backward=node.stage >= lowest) for node in nodes]


def split(nodes: list[StageNode]) -> list[StageNode]:
    """The same, whose backwards are two tasks."""
    return [dataclasses.replace(node, splits=node.backward) for node in nodes]


def alike(nodes: list[StageNode], cost: Cost) -> dict[StageKey, Cost]:
    return {node.key: cost for node in nodes}


@pytest.mark.parametrize("cost", [Cost(1, 1), Cost(1, 2), Cost(10, 21)])
@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("lanes", "num"), [(1, 3), (2, 2), (2, 7), (4, 5), (4, 16), (8, 64)])
def test_the_bubble_of_equal_stages_is_the_closed_form(lanes: int, num: int, kind: str, cost: Cost) -> None:
    nodes = chain("llm", [[n] for n in range(lanes)])
    found = forecast(nodes, num, kind=kind, costs=alike(nodes, cost))
    assert found.bubble == pytest.approx((lanes - 1) / (num + lanes - 1), abs=1e-12)
    assert found.makespan == (num + lanes - 1) * sum(cost) and found.shortest == lanes * sum(cost)
    assert found.throughput == 1
    most = {node.key: min(num, num if kind == "gpipe" else lanes - node.stage) for node in nodes}
    assert found.in_flight == most


@pytest.mark.parametrize("cost", [Cost(1, 1), Cost(1, 2), Cost(10, 21)])
@pytest.mark.parametrize(
    ("lanes", "rounds", "num"), [(2, 2, 2), (2, 3, 6), (3, 2, 10), (4, 2, 4), (4, 2, 7), (4, 2, 16), (8, 4, 32)]
)
def test_interleaved_stages_divide_the_bubble(lanes: int, rounds: int, num: int, cost: Cost) -> None:
    nodes = dealt("llm", lanes, rounds)
    found = forecast(nodes, num, costs=alike(nodes, cost))
    assert found.bubble == pytest.approx((lanes - 1) / (rounds * num + lanes - 1), abs=1e-12)


@pytest.mark.parametrize("cost", [Cost(1, 2, 1), Cost(10, 21, 9), Cost(4, 9, 2)])
@pytest.mark.parametrize(("lanes", "num"), [(1, 3), (2, 2), (2, 7), (4, 4), (4, 16), (8, 64)])
def test_split_backwards_leave_the_wait_without_the_weights_halves(lanes: int, num: int, cost: Cost) -> None:
    """Where all tasks take equally long, a third of the time that a device waits under 1F1B. Each stage keeps something
    of as many microbatches as the first one does there."""
    nodes = split(chain("llm", [[n] for n in range(lanes)]))
    found = forecast(nodes, num, kind="zerobubble", costs=alike(nodes, cost))
    waits = (lanes - 1) * (cost.forward + cost.backward - 2 * cost.weights)
    assert found.makespan == num * (cost.forward + cost.backward) + waits
    plain = forecast(chain("llm", [[n] for n in range(lanes)]), num, costs=alike(nodes, cost._replace(weights=0)))
    idle = plain.bubble * plain.makespan
    assert found.bubble * found.makespan == pytest.approx(idle * waits / ((lanes - 1) * sum(cost[:2])) if idle else 0)
    assert found.in_flight == plain.in_flight
    assert found.held == found.held_bounds == {node.key: min(lanes, num) for node in nodes}


@pytest.mark.parametrize(("lanes", "rounds", "num"), [(2, 2, 2), (2, 2, 8), (4, 3, 12), (8, 4, 32)])
def test_interleaved_stages_leave_a_third_of_theirs(lanes: int, rounds: int, num: int) -> None:
    plain = dealt("llm", lanes, rounds)
    found, unsplit = forecast(split(plain), num, kind="zerobubble"), forecast(plain, num)
    assert 3 * found.bubble * found.makespan == pytest.approx(unsplit.bubble * unsplit.makespan)


def test_the_weights_halves_stand_behind_what_others_wait_for() -> None:
    found = forecast(split(chain("llm", [[0], [1], [2]])), 5, kind="zerobubble")
    of_stage = lambda n: " ".join(f"{t.kind.value}{t.microbatch}" for t in found.spans if t.stage[1] == n)
    assert of_stage(0) == "F0 F1 F2 B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4"
    assert of_stage(1) == "F0 F1 B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4"
    assert of_stage(2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4"


def test_a_lane_interleaves_its_stages_in_groups_and_alternates() -> None:
    found = forecast(dealt("llm", 2, 2), 4, costs=alike(dealt("llm", 2, 2), Cost(1, 1)))
    of_lane = lambda place: " ".join(
        f"{t.kind.value}{'ab'[t.stage[1] // 2]}{t.microbatch}" for t in found.spans if t.stage[1] % 2 == place
    )
    assert of_lane(0) == "Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Fa3 Bb1 Fb2 Ba0 Fb3 Ba1 Bb2 Bb3 Ba2 Ba3"
    assert of_lane(1) == "Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Fa2 Ba0 Fa3 Ba1 Fb2 Bb2 Fb3 Bb3 Ba2 Ba3"


def random_graph(rng: random.Random) -> list[StageNode]:
    """Encoders and a language model, each of one or several stages on a device, partly frozen; apart, on the same
    devices or on some of them; entering any stages."""
    lanes, rounds = rng.choice([1, 2, 3, 4]), rng.choice([1, 1, 2, 3])
    count = lanes * rounds
    nodes: list[StageNode] = []
    for number in range(rng.randrange(4)):
        mine = rng.choice([1, 2, 3]), rng.choice([1, 1, 2])
        base = rng.choice([100, 100 * (number + 2), 0, lanes - 1])
        total = mine[0] * mine[1]
        nodes += dealt(f"e{number}", *mine, base=base, lowest=rng.choice([0, total, rng.randrange(total)]))
    ends = [n.key for n in nodes if (n.module, n.stage + 1) not in {m.key for m in nodes}]
    enters = {end: rng.sample(range(count), rng.randint(1, count)) for end in ends}
    trained = [min(enters[n.key]) for n in nodes if n.key in enters and n.backward]
    lowest = min([rng.choice([0, rng.randrange(count)]), *trained])
    llm = dealt("llm", lanes, rounds, lowest=lowest)
    into = lambda node: tuple(end for end in ends if node.stage in enters[end])
    return [*nodes, *(dataclasses.replace(node, upstream=(*node.upstream, *into(node))) for node in llm)]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_the_graph_all_is_done_in_time_and_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    nodes, num = random_graph(rng), rng.choice([1, 2, 3, 5, 8, 12])
    kind, window = rng.choice(["1f1b", "gpipe", "zerobubble"]), rng.choice([None, 1, (num + 1) // 2])
    costs = {node.key: Cost(rng.randint(1, 9), rng.randint(1, 9)) for node in nodes}
    if kind == "zerobubble":  # a stage of which nothing trains has nothing for later
        nodes = [dataclasses.replace(node, splits=node.backward and rng.random() < 0.8) for node in nodes]
        costs = {n.key: costs[n.key]._replace(weights=n.splits * rng.randrange(costs[n.key].backward)) for n in nodes}
    found = forecast(nodes, num, kind=kind, encoder_window=window, costs=costs)
    spans, needs = found.spans, Needs(nodes, num)
    assert list(spans) == sorted(spans, key=lambda task: spans[task].begin) and len(spans) == len(set(spans))
    assert set(spans) == set(needs.of_microbatches())
    for task, span in spans.items():
        assert span.end - span.begin == costs[task.stage].of(task.kind)
        assert all(spans[need].end <= span.begin for need in needs.computed(task)), task
    check_devices(found, nodes)
    check_bounds(found, nodes, num)
    check_windows(found, nodes, num, window or num)
    assert found.shortest <= found.makespan and 0 <= found.bubble < 1


def check_devices(found: Forecast, nodes: list[StageNode]) -> None:
    """No device has two tasks at a time; each stage takes its microbatches in their order."""
    for device in frozenset().union(*(node.devices for node in nodes)):
        mine = [span for task, span in found.spans.items() if device in found.devices[task.stage]]
        assert all(a.end <= b.begin for a, b in itertools.pairwise(mine))
    for node in nodes:
        for kind in OF_MICROBATCHES:
            order = [t.microbatch for t in found.spans if t.stage == node.key and t.kind is kind]
            assert order == sorted(order)


def check_bounds(found: Forecast, nodes: list[StageNode], num: int) -> None:
    """Counted in simulated time, apart from how the forecast counts."""
    needs = Needs(nodes, num)
    for node in nodes:
        assert found.in_flight[node.key] <= found.bounds[node.key] <= num
        if node.splits:
            assert kept(found, node) <= found.held_bounds[node.key] <= num
        mine = range(node.share.replica, num, node.share.replicas)
        for count, i in enumerate(mine, 1):
            begin = found.spans[Task(Kind.FORWARD, node.key, i)].begin
            frees = [Task(Kind.BACKWARD, node.key, n) for n in mine if node.backward]
            if node.backward:
                done = sum(found.spans[task].end <= begin for task in frees)
            else:
                taken = [[Task(Kind.FORWARD, k, n) for k in needs.consumers[node.key]] for n in mine]
                done = sum(all(found.spans[task].end <= begin for task in tasks) for tasks in taken)
            assert count - done <= found.bounds[node.key], (node.key, i)


def check_windows(found: Forecast, nodes: list[StageNode], num: int, window: int) -> None:
    """Devices that an encoder shares with the language model have three phases per window. Those of other stages wait
    for what these take, and for nothing else."""
    needs, llm = Needs(nodes, num), frozenset().union(*(node.devices for node in nodes if node.module == "llm"))
    windowed = {node.module for node in nodes if node.module != "llm" and node.devices & llm}
    encodes = [node for node in nodes if node.module in windowed]
    for device in llm & frozenset().union(*(node.devices for node in encodes)):
        tasks = [task for task in found.spans if device in found.devices[task.stage] and task.kind is not Kind.WEIGHTS]
        of_both = [task for task in tasks if task.stage[0] in {"llm", *windowed}]
        phases = [(t.microbatch // window, "FlB".index("l" if t.stage[0] == "llm" else t.kind.value)) for t in of_both]
        assert phases == sorted(phases)
    for node in nodes:
        if node.module in windowed or any(node.devices & other.devices for other in encodes):
            continue
        on_devices = {span.end for task, span in found.spans.items() if node.devices & found.devices[task.stage]}
        takers = [] if node.backward else needs.consumers[node.key]
        of_takers = {span.end for task, span in found.spans.items() if task.stage in takers}
        for task in (task for task in found.spans if task.stage == node.key):
            given = {found.spans[need].end for need in needs.computed(task)}
            assert found.spans[task].begin in {0, *given, *on_devices, *of_takers}, task


def kept(found: Forecast, node: StageNode) -> int:
    """The most microbatches of which the forward has begun and the weights' gradients are not there."""
    of = lambda kind: [span for task, span in found.spans.items() if task.stage == node.key and task.kind is kind]
    ends = [span.end for span in of(Kind.WEIGHTS)]
    return max(i + 1 - sum(end <= span.begin for end in ends) for i, span in enumerate(of(Kind.FORWARD)))


def test_a_frozen_encoder_runs_ahead_and_keeps_nothing() -> None:
    nodes = vlm(vision=[[0]], llm=[[1], [2]], vision_trains=False)
    found = forecast(nodes, 8, costs={("vision", 0): Cost(1, 1), ("llm", 0): Cost(4, 8), ("llm", 1): Cost(4, 8)})
    assert found.in_flight[("vision", 0)] == 0 and found.bounds[("vision", 0)] == 3
    first = [task for task in found.spans if task.stage == ("vision", 0)][:3]
    assert [found.spans[task].begin for task in first] == [0, 1, 2], "ahead as far as the bound allows, without a stop"


@pytest.mark.parametrize("place", range(4))
def test_a_window_holds_no_stage_of_other_devices(place: int) -> None:
    """While an encoder encodes the others, the first microbatch goes through the stages in front of its own; while the
    last cotangents go back through these, its backwards begin."""
    nodes, num = vlm(vision=[[place]], llm=[[0], [1], [2], [3]]), 8
    found = forecast(nodes, num, costs=alike(nodes, Cost(2, 4)))
    begins = {task: span.begin for task, span in found.spans.items()}
    for stage in range(place):
        assert begins[Task(Kind.FORWARD, ("llm", stage), 0)] == 2 * (stage + 1)
    assert begins[Task(Kind.FORWARD, ("llm", place), 0)] == 2 * num
    assert found.makespan == found.text_only + (num - place) * (2 + 4)


def test_work_below_the_lowest_trained_part_shortens_the_step() -> None:
    whole, above = dealt("llm", 4, 1), dealt("llm", 4, 1, lowest=2)
    assert {t.stage[1] for t in forecast(above, 8).spans if t.kind is Kind.BACKWARD} == {2, 3}
    assert forecast(above, 8).makespan < forecast(whole, 8).makespan


def test_encoders_are_compared_with_text_alone() -> None:
    """Beside the language model they cost the wait for the first microbatch and the last; in front of it all."""
    alone = forecast(chain("llm", [[1]]), 8).makespan
    beside = forecast(vlm(vision=[[0]], llm=[[1]]), 8)
    shared = forecast(vlm(vision=[[1]], llm=[[1]]), 8)
    assert (beside.text_only, shared.text_only) == (alone, alone)
    assert beside.makespan == alone + 3 and beside.throughput == alone / (alone + 3)
    assert shared.throughput == 1 / 2 and shared.bubble == 0
    assert shared.numbers() == {
        "idle": 0.0,
        "longest_chain": shared.shortest / shared.makespan,
        "text_only_throughput": 1 / 2,
        "in_flight": {"vision/0": 8, "llm/0": 1},
        "in_flight_at_most": {"vision/0": 8, "llm/0": 1},
    }


def test_a_slow_stage_is_what_a_step_is_made_of() -> None:
    nodes = chain("llm", [[0], [1]])
    found = forecast(nodes, 10, costs={("llm", 0): Cost(1, 2), ("llm", 1): Cost(5, 10)})
    assert found.makespan == 1 + 150 + 2 and found.works(("llm", 1)) == 150 / 153
    assert found.bubble == pytest.approx(1 - (150 + 30) / (2 * 153))


def test_ten_thousand_tasks_take_a_second() -> None:
    nodes = [*dealt("vision", 2, 1, base=100), *dealt("llm", 8, 1, (("vision", 1),))]
    start = time.process_time()
    found = forecast(nodes, 500)
    assert len(found.spans) == 10000 and time.process_time() - start < 5  # it is a quarter of a second on a quiet core
