"""Biases by which routers choose experts: state of a layer that a step's loads move, and no gradient.

They lie among the parameters, whole on each device, and have neither accumulator nor optimizer state. The loads are
those of all microbatches of the step and of all data replicas (`finish.py`); a step that does not count moves nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hetjax.core import optimizer, stacks
from hetjax.core.plan import StagePlan
from hetjax.core.stacks import LAYERS
from models.contract import ModuleDef, Params
from models.paths import Path, at, nested


def paths(definition: ModuleDef, lo: int, hi: int) -> frozenset[Path]:
    """Those of the stacked leaves of these layers that no gradient moves."""
    return frozenset((LAYERS, *path) for part in definition.layers[lo:hi] for path in part.balanced)


@dataclasses.dataclass(frozen=True)
class Balance:
    """What of a stage's parameters a step's loads move, by `rate`: of each leaf the rows of its module's loads, which
    has `layers`, one for each layer with experts."""

    rate: float
    rows: Mapping[Path, tuple[int, ...]]
    layers: int

    @classmethod
    def of(cls, definition: ModuleDef, plan: StagePlan, trains: Callable[[Path], bool]) -> "Balance":
        """That of one stage."""
        moving = [path for path in sorted(paths(definition, plan.lo, plan.hi)) if definition.bias_rate and trains(path)]
        rows = {path: _rows(definition, path[1:], plan) for path in moving}
        return cls(definition.bias_rate, rows, sum(bool(part.balanced) for part in definition.layers))

    def moved(self, params: Params, *loads: jax.Array, ok: jax.Array) -> Params:
        """The parameters after a step that counts if `ok`, in which so many tokens, [layers with experts, experts],
        went to each expert of the module; without `loads` nothing moves."""
        for path, rows in self.rows.items():
            (of_module,) = loads
            bias, mine = at(params, path), of_module[np.array(rows)]
            step = self.rate * jnp.sign(mine.mean(-1, keepdims=True) - mine)
            params = optimizer.merge(nested({path: jnp.where(ok, bias + step.astype(bias.dtype), bias)}), params)
        return params


def _rows(definition: ModuleDef, path: Path, plan: StagePlan) -> tuple[int, ...]:
    """Where the layers of a stage are among those of the module that have the leaf at `path`."""
    has = stacks.holders(definition, path, 0, definition.num_layers)
    return tuple(has.index(layer) for layer in stacks.holders(definition, path, plan.lo, plan.hi))
