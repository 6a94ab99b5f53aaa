"""The same steps under layouts and through the reference, and how far apart they are.

A leaf's error is ||x - reference|| / max(||reference||, 0.01 ||module's reference||): some leaves (key biases) have a
true gradient of zero, and relative error means nothing there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hetjax.core import stacks
from hetjax.core.trainer import Path, State, Trainer, is_stacked, path_parts
from hetjax.judge.reference import Reference, initial_params
from models.contract import ModuleDef

Flat = Mapping[str, Mapping[Path, np.ndarray]]


class Worst(NamedTuple):
    """The leaf that differs most."""

    error: float
    leaf: str


class StepReport(NamedTuple):
    """One step, compared: the losses, and the worst leaf of each module's gradients, optimizer state and parameters.

    Parameters are those that the reference makes of the trainer's own gradients: an optimizer that divides a gradient
    by its size (Adam) moves where that is nothing but rounding, and no two orders of summation move alike there."""

    step: int
    loss: float
    reference_loss: float
    gradients: dict[str, Worst]
    state: dict[str, Worst]
    params: dict[str, Worst]
    routed: float = 0.0  # share of the tokens' choices of experts, of a module, that one side alone has made

    @property
    def loss_error(self) -> float:
        """Relative difference of the losses."""
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), 1e-30)

    def within(self, *, loss: float, leaves: float, params: float, routed: float = 1e-12) -> bool:
        """Whether the loss, every leaf and the routers' choices are within tolerance (a NaN is not)."""
        bounds = ((self.gradients, leaves), (self.state, leaves), (self.params, params))
        good = [w.error <= bound for found, bound in bounds for w in found.values()]
        return self.loss_error <= loss and self.routed <= routed and all(good)


def worst_leaf(got: Mapping[Path, np.ndarray], reference: Mapping[Path, np.ndarray], definition: ModuleDef) -> Worst:
    """The largest error over the leaves of one module; layers are judged one by one."""
    if set(got) != set(reference):
        odd = sorted(jax.tree_util.keystr(p) for p in set(got) ^ set(reference))
        return Worst(float("inf"), f"held by one side only: {odd[0]}")
    whole = np.sqrt(sum(float(np.sum(np.square(r, dtype=np.float64))) for r in reference.values()))
    worst = Worst(0.0, "-")
    for path, leaf in reference.items():
        stacked = is_stacked(path)
        pairs = zip(got[path], leaf, strict=True) if stacked else [(got[path], leaf)]
        for row, (a, b) in enumerate(pairs):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = max(np.linalg.norm(b), 0.01 * whole, 1e-300)
            error = float(np.linalg.norm(a - b) / scale)
            if not error <= worst.error:  # also true for NaN
                worst = Worst(error, _name(path, row if stacked else None, definition))
    return worst


def _name(path: Path, row: int | None, definition: ModuleDef) -> str:
    parts = path_parts(path)
    if row is None:
        return "/".join(parts)
    return stacks.names(parts, lambda behind: stacks.holders(definition, behind, 0, definition.num_layers))[row]


def compare(
    trainer: Trainer,
    steps: Iterable[Sequence[Mapping[str, np.ndarray]]],
    reference: Reference,
    *,
    start: State | None = None,
    judges: Callable[[int], None] = lambda step: None,
) -> Iterator[StepReport]:
    """Trains both sides from the same parameters, a step per element of `steps` (lists of microbatches).

    `start`, where the trainer's first step begins with other parameters than its initial ones, is consumed. `judges` is
    called once the trainer's part of a step is done: what follows is the reference's alone, of each process its own."""
    definitions = {module.name: module.definition for module in trainer.graph.modules}
    state: State = trainer.init() if start is None else start
    before = params = trainer.whole(state.params)
    states = trainer.flat(state.optimizer, "state")
    reference_state = reference.init_state(params)
    for n, microbatches in enumerate(steps):
        done = trainer.gradients(state, microbatches)
        got = trainer.flat(done.grads, "grads")
        state, outcome = trainer.update(state, done)
        new, moved = trainer.flat(state.optimizer, "state"), trainer.flat(state.params)
        judges(n)
        result = reference.step(params, reference_state, microbatches, n)
        own = (_like(reference_state, states), outcome.loss, _like(result.grads, got), outcome.routed)
        expected = reference.update(before, *own, n).params
        params, reference_state = result.params, result.state
        states = new
        yield StepReport(
            n,
            float(outcome.loss),
            float(result.loss),
            {m: worst_leaf(got[m], _leaves(result.grads[m]), definitions[m]) for m in got},
            {m: worst_leaf(states[m], _leaves(reference_state[m]), definitions[m]) for m in states if states[m]},
            {m: worst_leaf(moved[m], _leaves(expected[m]), definitions[m]) for m in moved},
            _routed_apart(outcome.routed, result.routed),
        )
        before = _like(params, moved)


def _routed_apart(got: Mapping[str, jax.Array], reference: Mapping[str, jax.Array]) -> float:
    """Of choices [layers, experts], in the module where the share is largest."""
    if got.keys() != reference.keys():
        return float("inf")
    pairs = [(np.asarray(got[name], np.float64), np.asarray(reference[name], np.float64)) for name in got]
    return max((float(np.abs(a - b).sum() / 2 / max(b.sum(), 1)) for a, b in pairs), default=0.0)


def _like(reference: dict[str, Any], flat: Flat) -> dict[str, Any]:
    """The trainer's leaves as the trees of the reference; one that the trainer lacks stays the reference's."""
    return {
        module: jax.tree_util.tree_map_with_path(lambda path, leaf, m=module: flat.get(m, {}).get(path, leaf), tree)
        for module, tree in reference.items()
    }


def compare_initial(trainer: Trainer) -> dict[str, Worst]:
    """The worst leaf of each module's parameters before the first step, against those made on one device."""
    got = trainer.flat(trainer.init().params)
    expected = initial_params(trainer.graph, trainer.spec.seed, trainer.spec.param_dtype)
    return {m.name: worst_leaf(got[m.name], _leaves(expected[m.name]), m.definition) for m in trainer.graph.modules}


def _leaves(tree: Any) -> dict[Path, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
