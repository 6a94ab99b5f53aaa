"""`remat = "auto"`: the least recompute with which each device's memory holds the run, found before anything compiles.

What a stage keeps of a microbatch is known from abstract runs of its forward, one for each choice of `remat.py`. All
begin with everything kept; while a device has too little, of the stages on it the one gives something up whose next
choice costs least for each byte that it frees. Modules that share devices so spend the memory where it saves most.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hetjax.core import memory
from hetjax.core.memory import DeviceMemory
from hetjax.core.remat import Keep, Policy, Product, Remat, recorder
from hetjax.core.stacks import LAYERS
from hetjax.core.stage import Stage
from hetjax.core.tasks import StageKey
from hetjax.core.trainer import Trainer
from models.contract import Params

SHARE = 0.9  # of a device's memory: the workspace is estimated


class Choice(NamedTuple):
    """One of a stage's choices."""

    keep: Keep
    kept: int  # bytes per microbatch and device
    cost: float  # FLOPs for each byte freed, of what this choice computes again and the one before it does not


def kept_bytes(stage: Stage, policy: Policy | None) -> int:
    """Bytes on each device of a microbatch's residuals, if the layers kept what `policy` says."""
    local, found = stage.local_with(policy), [0]

    def probe(weights: Params, x: Any, batch: Any) -> jax.Array:
        kept = local.forward(weights, dict(x), batch)[1]
        found.append(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)))
        return jnp.zeros(())

    if stage.has_backward:
        stage.trace(probe, P(), stage.batch)
    return found[-1]


def choices(stage: Stage, whole: int) -> list[Choice]:
    """From everything kept, `whole`, to nothing: each frees memory that the one before it takes."""
    products: set[Product] = set()
    found = [Choice(Keep(Remat.NONE), whole, 0.0)]
    dots = kept_bytes(stage, recorder(products))
    steps = [(Keep(Remat.DOTS), 0.0)]
    ranked = sorted(products, key=lambda product: product.rank, reverse=True)
    for n in range(len(ranked) - 1, -1, -1):
        keep = Keep(Remat.DOTS, ranked[n - 1]) if n else Keep(Remat.FULL)
        steps.append((keep, ranked[n].cost))
    for keep, cost in steps:
        kept = dots if keep == Keep(Remat.DOTS) else kept_bytes(stage, keep.policy)
        if kept < found[-1].kept:
            found.append(Choice(keep, kept, cost))
        elif len(found) > 1:  # a product that no backward asks for
            found[-1] = found[-1]._replace(keep=keep)
    return found


class Budget:
    """What the stages of a trainer take and could choose; nothing needs to be compiled."""

    def __init__(self, trainer: Trainer) -> None:
        self.pipeline, self.stages = trainer.pipeline, trainer.pipeline.stages
        self.whole = {key: kept_bytes(stage, None) for key, stage in self.stages.items()}

    @functools.cached_property
    def choices(self) -> dict[StageKey, list[Choice]]:
        """Those of the stages of modules with `remat="auto"`, and what is set of the others."""
        found = {}
        for key, stage in self.stages.items():
            asks = stage.module.remat is Remat.AUTO and stage.has_backward
            set_to = Choice(stage.keep, kept_bytes(stage, stage.keep.policy), 0.0)
            found[key] = choices(stage, self.whole[key]) if asks else [set_to]
        return found

    @property
    def basis(self) -> dict[str, list]:
        """By stage, what a choice is made from: what is set, where it lies and what it takes."""

        def of_stage(key: StageKey, stage: Stage) -> list:
            takes = memory.things(self.pipeline, key, self.whole[key]).values()
            in_flight = self.pipeline.schedule.forecast.in_flight[key]
            set_to = stage.module.remat.value, stage.module.unroll, list(stage.module.layout.offload)
            return [*set_to, list(stage.plan.device_ids), in_flight, memory.local_bytes(stage.parameters.acc), *takes]

        return {f"{key[0]}/{key[1]}": of_stage(key, stage) for key, stage in self.stages.items()}

    def choose(self, available: Mapping[int, int]) -> dict[StageKey, Keep]:
        """What each stage keeps on devices with these bytes: all where no limit is known; where too little is left
        even without, nothing."""
        if not available:
            return {key: Keep(Remat.NONE) if s.module.remat is Remat.AUTO else s.keep for key, s in self.stages.items()}
        left = {key: list(choices) for key, choices in self.choices.items()}
        while True:
            needed = self.estimate({key: choices[0].kept for key, choices in left.items()})
            short = {n for n, found in needed.items() if n in available and found.total > SHARE * available[n]}
            able = [
                k for k, choices in left.items() if len(choices) > 1 and short & set(self.stages[k].plan.device_ids)
            ]
            if not able:
                return {key: choices[0].keep for key, choices in left.items()}
            del left[min(able, key=lambda key: _price(*left[key][:2]))][0]

    def estimate(self, kept: Mapping[StageKey, int]) -> dict[int, DeviceMemory]:
        """Memory by device position, from the bytes of a microbatch that each stage keeps."""

        workspace: dict[tuple[StageKey, str], int] = {}
        for key, stage in self.stages.items():
            of_both = _workspace(stage, kept[key], self.whole[key])
            workspace |= {(key, program): of_both for program in ("forward", "backward")}
        return memory.of_step(self.pipeline, kept, workspace)


def asked(trainer: Trainer) -> bool:
    """Whether a module leaves the choice to the budget."""
    return any(module.remat is Remat.AUTO for module in trainer.graph.modules)


def settle(trainer: Trainer, available: Mapping[int, int]) -> dict[StageKey, Keep]:
    """Sets what each stage keeps to what is chosen, and returns it."""
    chosen = Budget(trainer).choose(available)
    for key, keep in chosen.items():
        trainer.pipeline.stages[key].set_keep(keep)
    return chosen


def _price(now: Choice, then: Choice) -> tuple[float, int]:
    """Lower for what is given up rather: by cost, then by the bytes that become free."""
    return then.cost, then.kept - now.kept


def _workspace(stage: Stage, kept: int, whole: int) -> int:
    """A layer's inner results, or all layers' if they are computed again without a loop to hold them back; and of the
    forward what leaves it beside what is kept, of the backward as much again, the gradients of the widest leaf and of a
    chunk's logits. Under ZeRO-2 and 3 the gradients of a layer, twice to lie side by side, if they are more than those;
    under ZeRO-3 the gathered weights of two layers and of one end."""
    inner = whole if stage.module.unroll and kept < whole else whole // len(stage.local.loops.layers)
    mine, definition = stage.parameters, stage.module.definition
    gathered = 2 * mine.working.gathered_bytes(LAYERS) + max(map(mine.working.gathered_bytes, ("first", "last")))
    scattered = 2 * mine.working.scattered_bytes(LAYERS)
    ends = [leaf for part, leaves in mine.trainable.items() if part != LAYERS for leaf in jax.tree.leaves(leaves)]
    widest, logits = max(map(memory.local_bytes, ends), default=0), 0
    if stage.ends_in_loss:
        part, leaf = mine.place_in_last(definition.head)
        targets = stage.batch["targets"]
        tokens = min(stage.local.chunk, memory.local_bytes(targets) // targets.dtype.itemsize)
        head = mine.leaves[part][leaf]
        ids = memory.local_bytes(head) // head.dtype.itemsize // definition.width
        logits = 2 * tokens * ids * stage.ends["loss"].dtype.itemsize
    return gathered + inner + max(memory.local_bytes(stage.y), inner + max(widest + logits, scattered))
