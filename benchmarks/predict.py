"""How long a compiled trainer's step takes on one device, if each operation goes as fast as the device can."""

import dataclasses

from cost import H100, H200, Cost, Rates, costs
from hlo import Program, parse

from hetjax.core.trainer import Trainer

EACH = ("forward", "backward")  # run for each microbatch; the others once a step
BEFORE = ("cast",)  # once a run


@dataclasses.dataclass(frozen=True)
class Ran:
    """One program of a stage."""

    stage: str
    name: str
    calls: int  # in a step
    program: Program
    costs: list[Cost]

    def seconds(self, rates: Rates, kind: str | None = None) -> float:
        """Of one call; of one kind of operations."""
        return sum(c.seconds(rates) for c in self.costs if kind in (None, c.kind))


def rates(device_kind: str) -> Rates:
    """Those of an H200, of an H100 for anything else."""
    return H200 if "H200" in device_kind else H100


def programs(trainer: Trainer) -> list[Ran]:
    """The programs of all stages, as XLA made them. What crosses boundaries is left out: it is small."""
    found = []
    for (module, index), stage in trainer.pipeline.stages.items():
        for name in [name for name in stage.programs if name not in BEFORE]:
            compiled = stage.programs[name]
            program = parse(compiled.as_text())
            calls = trainer.spec.num_microbatches if name in EACH else 1
            found.append(Ran(f"{module} {index}", name, calls, program, costs(program)))
    return found


def seconds(ran: list[Ran], rates: Rates) -> float:
    """Of a step on one device, where all stages take turns."""
    return sum(r.calls * r.seconds(rates) for r in ran)
