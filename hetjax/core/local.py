"""A stage's model as one device runs it on its shards: what `stage.py` compiles into programs.

Parameters are cast to varying over the data axes before they meet an activation, and the VJP is taken here, inside of
the per-device program: so no data-parallel collective is inserted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from hetjax.core import loss, optimizer, stacks
from hetjax.core.graph import Module, Remat
from hetjax.core.layout import AXES, DATA_AXES, StagePlan, spec
from hetjax.core.parameters import Parameters
from hetjax.core.stacks import LAYERS
from models.axes import vary, varying_axes
from models.contract import Params, Part
from models.layers import is_product

Tree = Any
POLICIES = {Remat.DOTS: is_product, Remat.FULL: jax.checkpoint_policies.nothing_saveable}


class Local:
    """The layers of one stage, and its module's first and last parts as far as it has them.

    `x_wanted`: the inputs whose producers train. `ends_in_loss`: the stage's last part yields it.
    """

    def __init__(
        self, module: Module, plan: StagePlan, parameters: Parameters, *, x_wanted: frozenset[str], ends_in_loss: bool
    ) -> None:
        self.module, self.plan, self.parameters = module, plan, parameters
        self.x_wanted, self.ends_in_loss = x_wanted, ends_in_loss
        self.layers = module.definition.layers[plan.lo : plan.hi]

    def _run(self, params: Params, x: Tree, batch: Mapping[str, jax.Array], end: Callable[..., Tree]) -> Tree:
        """The carry behind the layers; for a module's last stage, what `end(last parameters, carry)` makes of it.

        `params` are those of `opened`."""
        definition, plan = self.module.definition, self.plan
        first = self._remat(lambda w, x: definition.first.apply(w, x, batch, plan.axes))
        carry = first(params["first"], x) if plan.first else x
        carry = jax.tree.map(lambda c: vary(c, DATA_AXES), carry)  # as what meets parameters is
        for number, (lo, _) in enumerate(stacks.runs(self.layers)):
            carry = lax.scan(self._layer(self.layers[lo], batch), carry, params[LAYERS][number])[0]
        return self._remat(end)(self.parameters.full_last(params), carry) if plan.last else carry

    def _layer(self, part: Part, batch: Mapping[str, jax.Array]) -> Callable[..., tuple[Tree, None]]:
        """What a scan over layers of one part does with the carry and a layer's parameters."""
        layer = self._remat(lambda w, c: part.apply(w, c, batch, self.plan.axes))
        return lambda c, w: (layer(w, c), None)

    def _remat(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        """`function`, of whose inner results the backward keeps what the module's setting says."""
        if self.module.remat is Remat.NONE:
            return function
        return jax.checkpoint(function, policy=POLICIES[self.module.remat], prevent_cse=False)

    def outputs(self, params: Params, x: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What leaves the stage; the loss as this device's part of the sum."""

        def end(last: Params, carry: Tree) -> Tree:
            y = self.module.definition.last.apply(last, carry, batch, self.plan.axes)
            return {"loss": self._end(loss.token_sum, y, batch)} if self.ends_in_loss else y

        y = self._run(params, x, batch, end)
        wanted = {k: frozenset(DATA_AXES) if self.ends_in_loss else _axes_of(spec(self.dims[k])) for k in y}
        return {k: _settle(v, wanted[k]) for k, v in y.items()}

    def scores(self, params: Params, x: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The loss as in `outputs`, of the stage that ends in it, and the likeliest next id at every position."""

        def end(last: Params, carry: Tree) -> Tree:
            y = self.module.definition.last.apply(last, carry, batch, self.plan.axes)
            total, ids = self._end(loss.token_scores, y, batch)
            return {"loss": total, "likeliest": ids}

        return {k: _settle(v, frozenset(DATA_AXES)) for k, v in self._run(params, x, batch, end).items()}

    def _end(self, function: Callable[..., Any], y: Tree, batch: Mapping[str, jax.Array]) -> Any:
        return function(y["x"], y["head"], batch["targets"], batch["weights"], axes=self.plan.axes)

    @property
    def dims(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical dims of what leaves the stage, but for a loss."""
        return self.module.definition.output if self.plan.last else self.module.definition.carry

    def vjp(self, params: Params, x: Tree, batch: Tree) -> tuple[Tree, Callable[..., Tree], list[jax.Array]]:
        """Outputs, VJP in (trainable parameters, wanted inputs), and the flat inputs that the VJP may refer to."""
        trainable, frozen = self.split(params)
        wanted = {k: v for k, v in x.items() if k in self.x_wanted}

        def function(trainable: Params, wanted: Tree) -> Tree:
            return self.outputs(optimizer.merge(trainable, frozen), {**x, **wanted}, batch)

        y, pull = jax.vjp(function, trainable, wanted)
        return y, pull, jax.tree.leaves((trainable, frozen, x, batch))

    def opened(self, params: Params) -> Params:
        """Parameters as `_run` takes them, or some of them: varying over the data axes, layers cut into runs.

        It stands outside of the VJP. Inside, each run's rows would be residuals: a copy per microbatch in flight."""
        params = jax.tree.map(lambda p: vary(p, DATA_AXES), params)
        return params | {LAYERS: stacks.cut(params.get(LAYERS, {}), self.layers)}

    def split(self, params: Params) -> tuple[Params, Params]:
        """(trainable, frozen) parameters, opened."""
        trainable, frozen = self.parameters.split(params)
        return self.opened(trainable), self.opened(frozen)


def closed(opened: Params) -> Params:
    """What `Local.opened` cut, joined."""
    layers = stacks.join(list(opened[LAYERS].values()))
    rest = {part: tree for part, tree in opened.items() if part != LAYERS}
    return rest | {LAYERS: layers} if layers else rest


def _settle(y: jax.Array, names: frozenset[str]) -> jax.Array:
    """`y`, typed as varying over exactly the axes `names`.

    Raises ValueError if the model left it different along another axis of size > 1, which would lose values.
    """
    y = vary(y, names)
    extra = tuple(a for a in AXES if a in varying_axes(y) - names)
    for axis in extra:
        if lax.axis_size(axis) > 1:
            raise ValueError(
                f"a model output of shape {y.shape} differs along {axis}; it may differ along {sorted(names)}"
            )
    return lax.psum(y, extra) if extra else y


def _axes_of(where: P) -> frozenset[str]:
    return frozenset(a for part in where if part for a in ((part,) if isinstance(part, str) else part))
