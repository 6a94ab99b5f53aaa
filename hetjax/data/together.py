"""Microbatches that several processes make together: all plan all of them, each reads the files that its devices want.

Behind every step's microbatches each process says what it has made, and hears what the others have. So a file that one
of them finds broken is masked by all, before the step, and whoever fails, or has planned otherwise, ends all.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hetjax.data.making import Broken, Made, Slots
from hetjax.data.problems import Problem
from hetjax.data.settings import DataError


class Here(NamedTuple):
    """Which part of the media is this process's."""

    slots: Slots | None = None  # those whose files it reads; None: all
    tell: Callable[[str], Sequence[str]] = lambda said: [said]  # what it says -> what every process says, in order


ALONE = Here()


class Agreed(NamedTuple):
    """Microbatches as all processes know them: of each the broken files, the first of a sample alone, and how many
    bytes each process read."""

    made: Sequence[Made]
    broken: Sequence[Sequence[Broken]]
    sizes: Sequence[int]


def agree(source: Iterable[Made], count: int, here: Here, bad: Sequence[Problem]) -> Agreed:
    """The next `count` microbatches of `source`, fewer at its end. `bad`: what has been left out so far.

    Raises DataError, in every process, if one has failed or planned otherwise; one that fails raises its own error."""
    made: list[Made] = []
    failure: Exception | None = None
    try:
        made += itertools.islice(source, count)
    except Exception as error:
        failure = error
    mine = {
        "failure": failure and (str(failure) if isinstance(failure, DataError) else repr(failure)),
        "plans": [each.plan for each in made],
        "bad": str(bad[-1]) if bad else "nothing",
        "broken": [each.broken for each in made],
        "size": sum(each.size for each in made),
    }
    said = [json.loads(each) for each in here.tell(json.dumps(mine))]
    if failure is not None:
        raise failure
    _check(said)
    broken = [_firsts(Broken(*each) for other in said for each in other["broken"][n]) for n in range(len(made))]
    return Agreed(made, broken, [other["size"] for other in said])


def _check(said: Sequence[dict[str, Any]]) -> None:
    for process, other in enumerate(said):
        if other["failure"]:
            raise DataError(f"process {process}: {other['failure']}")
        if other["plans"] != said[0]["plans"]:
            raise DataError(
                f"process {process} has planned another microbatch than process 0; the sample that it left out last: "
                f"{other['bad']}; that of process 0: {said[0]['bad']}; all must see the same files"
            )


def _firsts(broken: Iterable[Broken]) -> list[Broken]:
    """The first broken file of each sample."""
    found: dict[int, Broken] = {}
    for each in sorted(broken):
        found.setdefault(each.sample, each)
    return list(found.values())
