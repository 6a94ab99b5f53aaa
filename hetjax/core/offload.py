"""What is in the host's memory while nobody uses it: when a thing leaves its devices, and when it returns.

Between two uses of a thing its devices work on other tasks. Here the encoder `v` and the language model `l` share them;
R is what the backward of a microbatch needs of its forward, < its leaving, | that its memory is free, > its return:

    vF0 <R0 vF1 <R1 |R0 vF2 <R2 |R1 |R2 lF0 lB0 lF1 lB1 lF2 lB2 >R0 >R1 vB0 >R2 vB1 vB2

- A thing leaves behind its use. Its memory is free behind the next task of its module, beside which it travels, or in
  front of the next task of another module, which waits for it.
- It returns one task of its own module ahead, beside which it travels, but never before the last task of another module
  in between has ended. Parameters and optimizer state return behind the step's decision, for the update alone.
- It stays where no task would find its memory free.
- What a stage holds from step to step and leaves at all lies on the host between steps.

Placed in a finished list of tasks, so that the order in which the stages work does not depend on it. Pure Python.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hetjax.core.tasks import COMPUTING, OF_STAGES, Kind, Needs, StageKey, Task, Thing, What

Slotted = tuple[int, int, Task]  # the place in front of which task, the order there, and what


def with_moves(tasks: Sequence[Task], needs: Needs) -> tuple[list[Task], frozenset[Thing]]:
    """The tasks of a step with what leaves and returns in between; the things that lie on the host between steps."""
    uses: dict[Thing, list[int]] = {
        Thing(what, key): [] for key, node in needs.nodes.items() for what in OF_STAGES if what in node.offload
    }
    for n, task in enumerate(tasks):
        for thing in dict.fromkeys((*needs.reads(task), *needs.writes(task))):
            if thing.what in needs.nodes[thing.stage].offload:
                uses.setdefault(thing, []).append(n)
    moves: list[Slotted] = []
    home: set[Thing] = set()
    gaps = _Gaps(tasks, needs)
    for thing, at in uses.items():
        found = [gaps.trip(thing, *gap) for gap in itertools.pairwise(at)]
        if thing.what in OF_STAGES:
            over = gaps.trip(thing, at[-1], at[0] + len(tasks)) if at else None
            if any(found) and not over:  # it stays for nobody's good, but lies on the host between steps
                over = gaps.idle(thing, at[-1], at[0])
            found.append(over)
            home |= {thing} if over or not at else set()
        moves += [move for trip in found if trip for move in trip]
    behind_moves = [(n, len(Kind), task) for n, task in enumerate(tasks)]
    in_order = sorted([*moves, *behind_moves], key=lambda slotted: slotted[:2])
    return [task for _, _, task in in_order], frozenset(home)


class _Gaps:
    """The times between two uses. Places count on from one step into the next."""

    def __init__(self, tasks: Sequence[Task], needs: Needs) -> None:
        self.tasks, self.needs, self.count = tasks, needs, len(tasks)
        self.decide = tasks.index(needs.decide)

    def trip(self, thing: Thing, last: int, next_: int) -> list[Slotted] | None:
        """There and back between two uses; None where it is not worth while."""
        between = self._between(thing, last, next_)
        if not between:
            return None
        gone = between[0] + self._own(thing, between[0])
        begin = next_ - next_ % self.count  # of the step of the next use
        kind = self.tasks[next_ % self.count].kind
        ahead = self._own(thing, between[-1]) and kind in (Kind.FORWARD, Kind.BACKWARD)
        back = max(between[-1] + (not ahead), begin + (self.decide + 1 if kind is Kind.UPDATE else 0))
        if not any(gone <= n < back for n in between):
            return None
        return self._moves(thing, last + 1, gone - between[0] // self.count * self.count, back - begin)

    def idle(self, thing: Thing, last: int, first: int) -> list[Slotted]:
        """Off behind the step's last use and back in front of the next step's first."""
        return self._moves(thing, last + 1, first, first)

    def _moves(self, thing: Thing, leave: int, gone: int, back: int) -> list[Slotted]:
        places = (leave, Kind.LEAVE), (gone, Kind.GONE), (back, Kind.RETURN)
        task = Task(Kind.LEAVE, thing.stage, thing.microbatch, thing=thing)
        return [(slot, rank, task._replace(kind=kind)) for rank, (slot, kind) in enumerate(places)]

    def _own(self, thing: Thing, n: int) -> bool:
        return self.tasks[n % self.count].stage[0] == thing.stage[0]

    def _between(self, thing: Thing, last: int, next_: int) -> list[int]:
        """What its devices work on meanwhile."""
        nodes = self.needs.nodes
        return [
            n
            for n in range(last + 1, next_)
            if (task := self.tasks[n % self.count]).kind in COMPUTING
            and nodes[task.stage].devices & nodes[thing.stage].devices
        ]


class Moment(NamedTuple):
    """A task of `kind` works on a stage, and so many things are on their devices and on the host while it does, those
    of all microbatches together (as `Thing` of microbatch -1)."""

    stage: StageKey
    kind: Kind
    device: frozenset[tuple[Thing, int]]
    host: frozenset[tuple[Thing, int]]


def moments(order: Sequence[Task], needs: Needs, home: frozenset[Thing]) -> Iterator[Moment]:
    """What a step holds, computing task by task."""
    always = [Thing(what, key) for key in needs.nodes for what in OF_STAGES]
    moved = {task.thing: task.kind for task in reversed(order) if task.thing}  # first in the step
    there = [thing for thing in always if thing not in home or moved.get(thing) is Kind.GONE]
    device, host = collections.Counter(there), collections.Counter(home)
    away = set(home)  # those with a copy on the host, which stays until they change
    last = {thing: task for task in order for thing in (*needs.reads(task), *needs.writes(task))}
    made: set[Thing] = set()
    for task in order:
        thing = task.thing
        if thing is not None:
            of_all = thing._replace(microbatch=-1)
            if task.kind is Kind.LEAVE and thing not in away:
                away.add(thing)
                host[of_all] += 1
            device[of_all] += {Kind.LEAVE: 0, Kind.GONE: -1, Kind.RETURN: 1}[task.kind]
            continue
        for thing in needs.writes(task):
            if thing in away:
                away.remove(thing)
                host[thing._replace(microbatch=-1)] -= 1
            if thing.what not in OF_STAGES and thing not in made:
                made.add(thing)
                device[thing._replace(microbatch=-1)] += 1
        if task.kind in COMPUTING:
            now = (frozenset((+held).items()) for held in (device, host))
            yield Moment(task.stage, task.kind, *now)
        for thing in dict.fromkeys((*needs.reads(task), *needs.writes(task))):
            if thing.what not in (*OF_STAGES, What.SUMS) and last[thing] == task:
                device[thing._replace(microbatch=-1)] -= 1
                if thing in away:
                    away.remove(thing)
                    host[thing._replace(microbatch=-1)] -= 1
