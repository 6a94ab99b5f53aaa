"""The plan of pieces, on NumPy arrays: random layouts by the hundred, no jax."""

import collections
import dataclasses
import itertools
import math
import random
from collections.abc import Mapping

import numpy as np
import pytest

from hetjax.core import wire

AXES = ("dp", "copies", "cp", "tp")
SHAPE = (24, 12)  # items or samples, sequence
SPECS = ((("dp",),), (("dp",), ("cp",)), (("dp", "cp"),), ())  # the mesh axes of each dim


@dataclasses.dataclass(frozen=True)
class Side:
    """Devices under a layout, and how it splits an array."""

    devices: tuple[int, ...]
    sizes: tuple[int, ...]  # of AXES
    spec: tuple[tuple[str, ...], ...]


def blocks(side: Side, shape: tuple[int, ...] = SHAPE) -> dict[int, wire.Box]:
    """The block of every device, from its coordinates."""
    found = {}
    for device, coordinates in zip(side.devices, itertools.product(*map(range, side.sizes)), strict=True):
        box = []
        for dim, size in enumerate(shape):
            index, ways = 0, 1
            for axis in side.spec[dim] if dim < len(side.spec) else ():
                index = index * side.sizes[AXES.index(axis)] + coordinates[AXES.index(axis)]
                ways *= side.sizes[AXES.index(axis)]
            box.append((index * size // ways, (index + 1) * size // ways))
        found[device] = tuple(box)
    return found


def draw_side(rng: random.Random, devices: range) -> Side:
    """A random layout of some of `devices`, in a random order."""
    while True:
        sizes = tuple(rng.choice((1, 1, 2, 3, 4)) for _ in AXES)
        if math.prod(sizes) <= len(devices):
            return Side(tuple(rng.sample(devices, math.prod(sizes))), sizes, rng.choice(SPECS))


def pairs(receivers: range, count: int = 300) -> list[tuple[dict[int, wire.Box], dict[int, wire.Box]]]:
    """Random (held, wanted): the source on devices 0-7, the destination on `receivers`."""
    rng = random.Random(0)
    return [(blocks(draw_side(rng, range(8))), blocks(draw_side(rng, receivers))) for _ in range(count)]


def cut(array: np.ndarray, box: wire.Box) -> np.ndarray:
    return array[tuple(slice(*edge) for edge in box)]


def carry(held: Mapping[int, wire.Box], wanted: Mapping[int, wire.Box], array: np.ndarray) -> dict[int, np.ndarray]:
    """What every destination device has in the end, by the letter of the plan; bytes that nothing sets stay -1."""
    plan = wire.plan(held, wanted)
    landings = {}
    for device, block in wanted.items():
        shape = [stop - start for start, stop in block]
        if plan.dim is not None:
            shape[plan.dim] = plan.rows
        landings[device] = np.full(shape, -1)
    for piece in plan.pieces:
        assert wire.volume(piece.take) > 0, "another process would wait for an empty one for ever"
        place = cut(landings[piece.receiver], piece.place)
        assert (place == -1).all(), "no element lands twice"
        place[...] = cut(cut(array, held[piece.sender]), piece.take)
    if plan.dim is None:
        return landings
    whole = {}
    for block, replicas in wire.owners(wanted).items():
        start, stop = block[plan.dim]
        gathered = np.concatenate([landings[device] for device in replicas], plan.dim)
        whole |= dict.fromkeys(replicas, gathered.take(range(stop - start), plan.dim))
    return whole


@pytest.mark.parametrize("receivers", [range(8, 16), range(8), range(4, 12)], ids=["disjoint", "same", "overlapping"])
@pytest.mark.parametrize("shape", [SHAPE, (24, 12, 5), (24,), (0, 12), (24, 0)], ids=str)
def test_every_device_gets_its_block_whatever_the_layouts(receivers: range, shape: tuple[int, ...]) -> None:
    rng = random.Random(len(shape))
    array = np.arange(math.prod(shape)).reshape(shape)
    for _ in range(200):
        held, wanted = (
            blocks(dataclasses.replace(side, spec=side.spec[: len(shape)]), shape)
            for side in (draw_side(rng, range(8)), draw_side(rng, receivers))
        )
        for device, got in carry(held, wanted, array).items():
            np.testing.assert_array_equal(got, cut(array, wanted[device]))


def test_between_disjoint_devices_every_element_crosses_once() -> None:
    for held, wanted in pairs(range(8, 16)):
        assert wire.plan(held, wanted).moved == wire.payload(held, wanted) == math.prod(SHAPE)


@pytest.mark.parametrize("receivers", [range(8), range(4, 12)], ids=["same", "overlapping"])
def test_elements_that_a_device_or_its_replica_holds_are_not_payload(receivers: range) -> None:
    for held, wanted in pairs(receivers):
        has = {d: {*np.ndindex(SHAPE)} & {*itertools.product(*itertools.starmap(range, b))} for d, b in held.items()}
        missing = 0
        for block, takers in wire.owners(wanted).items():
            near = set().union(*(has.get(device, set()) for device in takers))
            missing += len({*itertools.product(*itertools.starmap(range, block))} - near)
        assert wire.payload(held, wanted) == missing
        assert missing <= wire.plan(held, wanted).moved <= math.prod(SHAPE)


def test_what_is_in_place_is_not_sent() -> None:
    for held, _ in pairs(range(8)):
        plan = wire.plan(held, held)
        assert plan.moved == 0 or plan.dim is not None  # replicas share out even what they hold
    whole, halves = ((0, 12), (0, 4)), {0: ((0, 12), (0, 2)), 1: ((0, 12), (2, 4))}
    assert wire.plan({0: whole, 1: whole}, {1: whole}).moved == 0  # its own copy, not the other's turn
    assert wire.plan(halves, dict.fromkeys((0, 1), whole)).moved == 0  # each lands the half that it holds


def test_twelve_rows_from_three_devices_to_two_are_four_pieces() -> None:
    held = {0: ((0, 4),), 1: ((4, 8),), 2: ((8, 12),)}
    assert wire.plan(held, {3: ((0, 6),), 4: ((6, 12),)}) == wire.Wire(
        pieces=(
            wire.Piece(0, ((0, 4),), 3, ((0, 4),)),
            wire.Piece(1, ((0, 2),), 3, ((4, 6),)),
            wire.Piece(1, ((2, 4),), 4, ((0, 2),)),
            wire.Piece(2, ((0, 4),), 4, ((2, 6),)),
        ),
        dim=None,
        rows=0,
    )


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (Side((0, 1, 2, 3), (1, 1, 1, 4), SPECS[0]), Side((4,), (1, 1, 1, 1), SPECS[0])),  # four holders, one wants it
        (Side((0, 1, 2, 3), (1, 1, 1, 4), SPECS[0]), Side((4, 5), (2, 1, 1, 1), SPECS[0])),
        (Side((0, 1), (1, 1, 1, 2), SPECS[0]), Side((4, 5, 6), (3, 1, 1, 1), SPECS[0])),  # requests do not divide
        (Side((0, 1, 2, 3), (2, 1, 1, 2), SPECS[0]), Side((4, 5, 6, 7), (2, 1, 2, 1), SPECS[1])),
    ],
)
def test_devices_that_hold_the_same_block_share_the_sending(source: Side, destination: Side) -> None:
    sent: collections.Counter[int] = collections.Counter()
    for piece in wire.plan(blocks(source), blocks(destination)).pieces:
        sent[piece.sender] += wire.volume(piece.take)
    assert set(sent.values()) == {math.prod(SHAPE) // len(source.devices)}


def test_replicas_share_the_receiving() -> None:
    received: collections.Counter[int] = collections.Counter()
    plan = wire.plan({0: ((0, 24), (0, 12))}, blocks(Side((4, 5, 6, 7), (1, 1, 2, 2), SPECS[0])))
    for piece in plan.pieces:
        received[piece.receiver] += wire.volume(piece.take)
    assert received == dict.fromkeys((4, 5, 6, 7), math.prod(SHAPE) // 4)


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_replicas_share_rows_that_do_not_divide(rows: int) -> None:
    held = {0: ((0, rows),)}
    wanted = dict.fromkeys((1, 2, 3), ((0, rows),))
    assert wire.plan(held, wanted).moved == rows
    for got in carry(held, wanted, np.arange(rows)).values():
        np.testing.assert_array_equal(got, np.arange(rows))


def test_a_replica_never_receives_rows_of_the_next_block() -> None:
    wanted = {device: ((0, 5),) if device < 4 else ((5, 10),) for device in range(1, 7)}
    assert wire.plan({0: ((0, 10),)}, wanted).moved == 10


def test_a_scalar_goes_to_every_device_that_wants_it() -> None:
    plan = wire.plan({0: (), 1: ()}, {2: (), 3: ()})
    assert {piece.receiver for piece in plan.pieces} == {2, 3} and plan.dim is None


def test_split_covers_a_box_once_in_near_equal_parts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        box = tuple((start, start + rng.randint(1, 9)) for start in (rng.randint(0, 5), rng.randint(0, 5)))
        parts = rng.randint(1, 6)
        found = wire.split(box, parts)
        cells = [cell for part in found for cell in itertools.product(*itertools.starmap(range, part))]
        assert len(found) <= parts
        assert sorted(cells) == sorted(itertools.product(*itertools.starmap(range, box)))
        longest = max(stop - start for start, stop in box)
        assert max(map(wire.volume, found)) <= wire.volume(box) / longest * math.ceil(longest / min(parts, longest))
