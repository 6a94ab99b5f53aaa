"""`remat = "auto"` in a run: the choice is printed and kept in the workdir, and a run that resumes makes the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hetjax.core import budget
from hetjax.core.remat import Keep
from hetjax.core.trainer import Trainer
from hetjax.run import cluster, decided

FILE = "remat.json"
CHANGED = {"devices": "devices", "stages": "layouts, models or settings of memory"}  # by part of the basis


class Told(NamedTuple):
    """What was chosen by stage, and what from."""

    basis: dict[str, Any]
    keep: dict[str, Keep]


def settle(trainer: Trainer, workdir: Path, phase: int, available: Mapping[int, int]) -> None:
    """Sets what each stage of the modules with `remat="auto"` keeps, on devices with these bytes: as `workdir` has it
    of this phase, where neither devices, layouts, model nor what is set of its memory changed."""
    if not budget.asked(trainer):
        return
    path, name, choice = workdir / FILE, f"phase {phase + 1}", budget.Budget(trainer)
    basis = {"devices": {str(n): size for n, size in available.items()}, "stages": choice.basis}
    before = decided.read(path, _from_json, "chooses")
    told = before.get(name)
    stages = [f"{module}/{index}" for module, index in trainer.pipeline.stages]
    if told is not None and told.basis == basis and sorted(told.keep) == sorted(stages):
        said, chosen = f"as {path} has it", told.keep
    else:
        changed = [CHANGED[what] for what in basis if told is not None and told.basis.get(what) != basis[what]]
        said = f"chosen anew, for other {' and '.join(changed)} than in {path}" if changed else "chosen"
        chosen = {f"{module}/{index}": keep for (module, index), keep in choice.choose(available).items()}
        if cluster.is_primary():
            now = before | {name: Told(basis, chosen)}
            decided.write(path, {phase: _to_json(told) for phase, told in now.items()})
    print(f"remat, {said}: {', '.join(f'{stage} {keep}' for stage, keep in chosen.items())}", flush=True)
    for (module, index), stage in trainer.pipeline.stages.items():
        stage.set_keep(chosen[f"{module}/{index}"])


def _from_json(entry: Any) -> Told:
    return Told(entry["basis"], {stage: Keep.from_json(keep) for stage, keep in entry["keep"].items()})


def _to_json(told: Told) -> dict[str, Any]:
    return {"basis": told.basis, "keep": {stage: keep.to_json() for stage, keep in told.keep.items()}}
