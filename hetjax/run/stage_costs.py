"""`schedule_costs = "measured"` in a run: what stages cost is measured once and kept in the workdir, so that a run that
resumes has the same order of tasks, to the bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hetjax.core.measured import measured
from hetjax.core.tasks import Cost, StageKey
from hetjax.core.trainer import Trainer
from hetjax.run import cluster, decided

FILE = "costs.json"


class Told(NamedTuple):
    """Costs in microseconds by stage, and of what stages they are."""

    basis: dict[str, str]
    costs: dict[str, Cost]


def check(workdir: Path) -> None:
    """Raises ValueError for a file of costs that no run wrote, before anything compiles."""
    _read(workdir / FILE)


def settle(trainer: Trainer, workdir: Path, phase: int, microbatch: Mapping[str, np.ndarray]) -> None:
    """Orders the tasks of a compiled trainer by the costs of its stages: as `workdir` has them of this phase and the
    same stages, else measured on this microbatch. Each of several processes measures its own stages."""
    path, name, basis = workdir / FILE, f"phase {phase + 1}", _basis(trainer)
    before = _read(path)
    told = before.get(name)
    if told is not None and told.basis == basis:
        said, costs = f"as {path} has them", told.costs
    else:
        said = "measured" if told is None else f"measured anew, for other stages than in {path}"
        of_all = _of_all(measured(trainer, microbatch))
        costs = {stage: of_all[stage] for stage in basis}
        if cluster.is_primary():
            now = before | {name: Told(basis, costs)}
            decided.write(path, {phase: told._asdict() for phase, told in now.items()})
    words = (f"{stage} {'/'.join(f'{n / 1000:.3g}' for n in cost if n)}" for stage, cost in costs.items())
    split = "/of that weights' gradients" if any(cost.weights for cost in costs.values()) else ""
    print(f"costs of stages, forward/backward{split}, {said}: {', '.join(words)} ms")
    trainer.pipeline.reschedule({key: costs[_named(key)] for key in trainer.pipeline.stages})
    print(trainer.pipeline.promise(), flush=True)
    order = "\n".join(map(str, trainer.pipeline.schedule.order))
    cluster.agree(lambda: {f"order of tasks of {name}": order})


def _of_all(mine: Mapping[StageKey, Cost]) -> dict[str, Cost]:
    """Those of all processes; of a stage of several the first one's word counts."""
    found: dict[str, Cost] = {}
    for said in map(json.loads, cluster.tell_all(json.dumps({_named(key): cost for key, cost in mine.items()}))):
        found = {stage: Cost(*cost) for stage, cost in said.items()} | found
    return found


def _basis(trainer: Trainer) -> dict[str, str]:
    """By stage, what its time depends on."""
    return {
        _named(key): f"layers {s.plan.lo}-{s.plan.hi} on {s.plan.device_ids}, {s.module.layout}, keeps {s.keep}"
        + ", backwards in two" * s.splits
        for key, s in trainer.pipeline.stages.items()
    }


def _named(key: StageKey) -> str:
    return f"{key[0]}/{key[1]}"


def _read(path: Path) -> dict[str, Told]:
    return decided.read(path, lambda entry: _checked(**entry), "measures")


def _checked(basis: dict[str, str], costs: dict[str, Any]) -> Told:
    told = Told(basis, {stage: Cost(*cost) for stage, cost in costs.items()})
    if told.costs.keys() != basis.keys():
        raise ValueError(f"costs of {', '.join(told.costs)} for the stages {', '.join(basis)}")
    for stage, cost in told.costs.items():
        whole = len(costs[stage]) == len(cost) and all(isinstance(n, int) for n in cost)
        if not whole or not (cost.forward > 0 <= cost.weights < cost.backward):
            raise ValueError(
                f"the costs of {stage} are {costs[stage]}, not three whole numbers of microseconds: a forward and a "
                "backward above 0, and of the backward less than all, from 0 on, for weights' gradients"
            )
    return told
