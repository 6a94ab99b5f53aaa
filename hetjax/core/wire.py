"""Which pieces of an array cross between two sets of devices; pure Python, imports no jax.

The blocks that the source's devices hold and the blocks that the destination's devices want are cut at every edge of
either. Twelve rows from dp=3 (devices 0, 1, 2) to dp=2 (devices 3, 4) are four pieces and no padding:

    held    0: rows 0-4      1: rows 4-8          2: rows 8-12
    wanted  3: rows 0-6      4: rows 6-12
    pieces  0 -> 3: 0-4      1 -> 3: 4-6    1 -> 4: 6-8    2 -> 4: 8-12

Devices that hold the same block (tp, copies) each send a part of it. Devices that want the same block (replicas) each
receive a part of it, their *landing*, which the destination mesh gathers afterwards. So every byte enters the
destination once, and all links share the work.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping

Box = tuple[tuple[int, int], ...]  # one (start, stop) per dim


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one device sends another: `take` is relative to the sender's block, `place` to the receiver's landing."""

    sender: int  # device id
    take: Box
    receiver: int  # device id; the sender itself where the bytes are in place
    place: Box


@dataclasses.dataclass(frozen=True)
class Wire:
    """How one array crosses: the pieces, and the dim along which the replicas of a destination block share it.

    `dim` None: there are no replicas (or the array is a scalar, which is not worth sharing), a landing is the wanted
    block. Otherwise each landing has `rows` along `dim`, of which the last replicas fill fewer where the block does not
    divide; a block with fewer rows than replicas leaves some landings empty, and exact all the same.
    """

    pieces: tuple[Piece, ...]
    dim: int | None
    rows: int

    @property
    def moved(self) -> int:
        """Elements that travel between two different devices."""
        return sum(volume(piece.take) for piece in self.pieces if piece.sender != piece.receiver)


def volume(box: Box) -> int:
    """Elements in `box`."""
    return math.prod(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """What `a` and `b` have in common, None where that is nothing."""
    common = tuple((max(s, t), min(u, v)) for (s, u), (t, v) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def relative(box: Box, origin: Box) -> Box:
    """`box` counted from where `origin` starts."""
    return tuple((start - at, stop - at) for (start, stop), (at, _) in zip(box, origin, strict=True))


def split(box: Box, parts: int) -> list[Box]:
    """`box` in at most `parts` near-equal boxes, along the first dim that divides, else along the longest."""
    if parts == 1 or not box:
        return [box]
    sizes = [stop - start for start, stop in box]
    even = [dim for dim, size in enumerate(sizes) if size % parts == 0]
    dim = even[0] if even else sizes.index(max(sizes))
    start, size = box[dim][0], sizes[dim]
    edges = sorted({start + part * size // parts for part in range(parts + 1)})
    return [(*box[:dim], edge, *box[dim + 1 :]) for edge in itertools.pairwise(edges)]


def owners(blocks: Mapping[int, Box]) -> dict[Box, list[int]]:
    """The devices of every distinct block, in the mesh's order."""
    devices: dict[Box, list[int]] = collections.defaultdict(list)
    for device, block in blocks.items():
        devices[block].append(device)
    return dict(devices)


def payload(held: Mapping[int, Box], wanted: Mapping[int, Box]) -> int:
    """Elements that no device that wants them holds: what has to cross, however it is done."""
    holders = owners(held)
    return sum(
        volume(common)
        for block, takers in owners(wanted).items()
        for source, senders in holders.items()
        if not set(senders) & set(takers) and (common := intersect(source, block)) is not None
    )


def plan(held: Mapping[int, Box], wanted: Mapping[int, Box]) -> Wire:
    """The pieces that turn `held` into `wanted` (device id -> block, in mesh order; replicas adjacent per the mesh).

    Among the dims along which replicas can share a block, the one that moves least, then needs fewest pieces.
    """
    takers = owners(wanted)
    block, group = next(iter(takers.items()))
    replicas = len(group)
    if replicas == 1 or not block:
        return Wire(_pieces(held, wanted), None, 0)
    sizes = [stop - start for start, stop in block]
    even = [dim for dim, size in enumerate(sizes) if size % replicas == 0]
    options = []
    for dim in even or [sizes.index(max(sizes))]:
        rows = -(-sizes[dim] // replicas)
        landings = {
            device: _slab(block, dim, rank, rows)
            for block, group in takers.items()
            for rank, device in enumerate(group)
        }
        options.append(Wire(_pieces(held, landings), dim, rows))
    return min(options, key=lambda wire: (wire.moved, len(wire.pieces)))


def _slab(block: Box, dim: int, rank: int, rows: int) -> Box:
    """The `rows` of `block` along `dim` that replica `rank` receives; fewer, or none, at the end."""
    start, stop = block[dim]
    first = min(start + rank * rows, stop)
    return (*block[:dim], (first, min(first + rows, stop)), *block[dim + 1 :])


def _pieces(held: Mapping[int, Box], landings: Mapping[int, Box]) -> tuple[Piece, ...]:
    """Every part of every landing, with its sender: the receiver itself where it holds the part, else any holder.

    Several holders take turns; where the number of requests does not divide among them, each request is split."""
    requests = []
    for receiver, landing in landings.items():
        for source, devices in owners(held).items():
            common = intersect(source, landing)
            if common is not None:
                senders = (receiver,) if receiver in devices else tuple(devices)
                requests.append((source, senders, receiver, common))
    asked = collections.Counter((source, senders) for source, senders, _, _ in requests)
    turn: collections.Counter[tuple[Box, tuple[int, ...]]] = collections.Counter()
    pieces = []
    for source, senders, receiver, common in requests:
        parts = len(senders) // math.gcd(len(senders), asked[source, senders])
        for part in split(common, parts):
            sender = senders[turn[source, senders] % len(senders)]
            turn[source, senders] += 1
            pieces.append(Piece(sender, relative(part, source), receiver, relative(part, landings[receiver])))
    return tuple(pieces)
