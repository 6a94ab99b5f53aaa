"""Trains the tiny model as one process of several, and writes what its devices hold for the test that started it.

python in_processes.py COORDINATOR PROCESSES PROCESS DEVICES OUT CASE ...
"""

import contextlib
import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[str, Any]  # name of a leaf -> {block: values}; "loss", "norm", "tasks": of each step; "compiled": stages;
# "replicas": stages that own nothing; "reads": rows that are read from files, by array; "memories": where optimizer
# state lies between steps; "whole": leaves of all processes, by module
STEPS = 2
ITEMS = {"vision.pixels", "audio.mel"}  # what is read from files


@dataclasses.dataclass(frozen=True)
class Case:
    """Layouts of the modules, by settings of `Layout`, and what else differs from the plain tiny model."""

    llm: dict[str, Any]
    vision: dict[str, Any]
    audio: dict[str, Any] | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: str = "1f1b"
    window: int | None = None
    offload: bool = False  # of all that can be, by all modules


# Eight devices, two of each of four processes.
OWN = "0,1"
CASES = {
    "encoder on its own process": Case(dict(dp=2, devices="2,3"), dict(dp=2, devices=OWN)),
    "pp 2 across, tied": Case(
        dict(pp=2, dp=2, devices="2-5"), dict(dp=2, devices=OWN), model=dict(tied=True), schedule="gpipe"
    ),
    "pp 4 across, tied; encoder on its own": Case(dict(pp=4, dp=2), dict(dp=2, devices=OWN), model=dict(tied=True)),
    "pp 2 over two processes each, tied": Case(
        dict(pp=2, dp=2, tp=2), dict(dp=4, devices="2-5"), model=dict(tied=True), schedule="zerobubble"
    ),
    "pp 2 vpp 2 across, tied": Case(
        dict(pp=2, vpp=2, dp=2, devices="2-5"), dict(dp=2, devices=OWN), model=dict(tied=True)
    ),
    "replicas on two processes": Case(
        dict(pp=2, dp=2, devices="2-5"), dict(replicas=2, dp=2, devices="2-5"), model=dict(tied=True)
    ),
    "replicas across, gpipe": Case(dict(pp=2, dp=4), dict(replicas=2, dp=4, zero=2), schedule="gpipe"),
    "tp inside, dp across": Case(dict(dp=4, tp=2), dict(dp=8)),
    "tp across": Case(dict(tp=4, devices="0-3"), dict(tp=4, devices="4-7")),
    "cp across, ring": Case(dict(cp=4, context="ring", devices="2-5"), dict(dp=2, devices="0,7")),
    "ep across": Case(
        dict(dp=2, tp=2, ep=4, sp=True, devices="0-3"), dict(dp=4, devices="4-7"), model=dict(experts="experts")
    ),
    "colocated over all": Case(dict(dp=2, tp=2, cp=2), dict(dp=8)),
    "colocated, pp 2, gpipe": Case(dict(dp=2, pp=2, tp=2), dict(dp=4, devices="0-3")),
    "overlapping": Case(dict(dp=2, tp=2, devices="1-4"), dict(dp=4, devices="2-5")),
    "1 process and 3": Case(dict(dp=2, tp=2, devices="2-5"), dict(dp=2, devices=OWN)),
    "unequal counts": Case(dict(tp=1, devices="7"), dict(dp=4, devices="0-3")),
    "unequal counts, two to four": Case(dict(dp=4, devices="3-6"), dict(tp=2, devices="0,2")),
    "zero 3 across": Case(dict(dp=4, zero=3, devices="0-3"), dict(dp=4, zero=2, devices="4-7")),
    "zero 2 across, tied over pp": Case(dict(dp=4, pp=2, zero=2), dict(dp=8, zero_size=4), model=dict(tied=True)),
    "two encoders on two processes": Case(
        dict(dp=4, devices="4-7"), dict(dp=2, devices=OWN), dict(dp=2, devices="2,3")
    ),
    "pp 2 across, tied, offloaded": Case(
        dict(pp=2, dp=2, devices="2-5"), dict(dp=2, devices=OWN), model=dict(tied=True), schedule="gpipe", offload=True
    ),
    "pp 2 over two processes each, tied, offloaded": Case(
        dict(pp=2, dp=2, tp=2), dict(dp=4, devices="2-5"), model=dict(tied=True), schedule="zerobubble", offload=True
    ),
    "replicas on two processes, offloaded": Case(
        dict(pp=2, dp=2, devices="2-5"), dict(replicas=2, dp=2, devices="2-5"), model=dict(tied=True), offload=True
    ),
    "colocated over all, offloaded": Case(dict(dp=2, tp=2, cp=2), dict(dp=8), window=1, offload=True),
    "overlapping, zero 2 and 3, offloaded": Case(
        dict(dp=4, zero=3, devices="1-4"), dict(dp=4, zero=2, devices="2-5"), window=1, offload=True
    ),
}


def run(case: Case, checkpoints: str = "") -> Found:
    """Trains STEPS steps, on all devices that there are."""
    import jax
    import jax.numpy as jnp
    import tiny

    from hetjax.core.layout import Layout
    from hetjax.core.optimizer import OptimizerConfig
    from hetjax.core.tasks import OFFLOADS
    from hetjax.run import cluster
    from hetjax.run.checkpoint import Checkpoints

    own = dict(offload=tuple(OFFLOADS) if case.offload else ())
    encoders = {"vision": Layout(**case.vision, **own)} | ({"audio": Layout(**case.audio, **own)} if case.audio else {})
    model = dict(case.model)
    if "experts" in model:
        model["experts"] = dataclasses.replace(tiny.EXPERTS, count=8, balance_loss=0.5)
    graph = tiny.graph(Layout(**case.llm, **own), encoders, jnp.float32, **model)
    shape = tiny.Shape(microbatches=3)
    config = OptimizerConfig(name="sgd", momentum=0.9, learning_rate=0.1, clip_norm=0.5)
    trainer = tiny.trainer(graph, shape, config, dtype=jnp.float32, schedule=case.schedule, encoder_window=case.window)
    cluster.meet(f"compiled {case}")
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(Checkpoints(checkpoints)) if checkpoints else None
        state = trainer.init() if saved is None or saved.latest is None else saved.restore(trainer)[0]
        state, outcomes = _train(trainer, state, shape, tuple(encoders))
        if saved is not None:
            saved.save(trainer, state, {"seed": state.step})
    found: Found = {
        "loss": [float(o.loss) for o in outcomes],
        "norm": [float(o.norm) for o in outcomes],
        "tasks": [o.host.tasks for o in outcomes],
        "compiled": [
            f"{module}/{index}" for (module, index), stage in trainer.pipeline.stages.items() if stage.programs
        ],
        "replicas": [
            f"{module}/{index}" for (module, index), s in trainer.pipeline.stages.items() if s.plan.share.replica
        ],
        "reads": {name: sorted(trainer.pipeline.rows_here(name)) for name in ITEMS & trainer.spec.batch.keys()},
        "memories": sorted({leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer)}),
        "whole": {},
    }
    for kind, trees in (("params", state.params), ("optimizer", state.optimizer)):
        for (module, index), tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{kind}/{module}/{index}{jax.tree_util.keystr(path)}"
                found[name] = {_block(shard): np.asarray(shard.data) for shard in leaf.addressable_shards}
    for like, trees in (("params", state.params), ("state", state.optimizer)):
        for module, leaves in trainer.flat(trees, like).items():
            found["whole"] |= {f"{like}/{module}{jax.tree_util.keystr(path)}": a for path, a in leaves.items()}
    return found


def _train(trainer: Any, state: Any, shape: Any, encoders: tuple[str, ...]) -> tuple[Any, list]:
    import tiny

    outcomes = []
    for seed in range(state.step, state.step + STEPS):
        microbatches = [_own(trainer, m) for m in tiny.microbatches(shape, encoders, seed=seed)]
        state, outcome = trainer.step(state, microbatches)
        outcomes.append(outcome)
    return state, outcomes


def _own(trainer: Any, microbatch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The microbatch with NaN for what this process need not read."""
    own = dict(microbatch)
    for name in ITEMS & own.keys():
        others = sorted(set(range(len(own[name]))) - trainer.pipeline.rows_here(name))
        own[name] = own[name].copy()
        own[name][others] = np.nan
    return own


def _block(shard: Any) -> tuple:
    return tuple((part.start, part.stop) for part in shard.index)


def main() -> None:
    """Runs the cases one after the other."""
    coordinator, *numbers, out, checkpoints = sys.argv[1:7]
    processes, process, devices = map(int, numbers)
    from hetjax.run import cluster

    cluster.join(coordinator, processes, process, devices)
    found = {}
    for name in sys.argv[7:]:
        found[name] = run(CASES[name], checkpoints)
        print(f"done: {name}", flush=True)
    Path(out).write_bytes(pickle.dumps(found))
    cluster.leave()


if __name__ == "__main__":
    main()
