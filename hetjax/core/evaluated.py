"""What an evaluation gives, on the host of every process: the last stage's devices are those of some."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.boundary import Boundary
from hetjax.core.decision import Telling
from hetjax.core.stage import Stage


class Evaluated:
    """(sum of token losses, likeliest next ids [batch, seq]) of the stage that ends in the loss."""

    def __init__(self, stage: Stage, everywhere: Sequence[jax.Device]) -> None:
        self._together = jax.process_count() == 1
        if self._together:
            return
        home = stage.plan.mesh.devices.flat[0]
        at_home = NamedSharding(Mesh(np.array([home]), ["one"]), P())
        where = NamedSharding(stage.plan.mesh, stage.evaluated["likeliest"])
        ids = jax.ShapeDtypeStruct(stage.batch["targets"].shape, jnp.int32, sharding=where)
        self._gather = Boundary({"x": ids}, {"x": at_home})
        self._tell = Telling([ids, stage.scores["loss"]], home, everywhere)

    def __call__(self, y: Mapping[str, jax.Array] | None) -> tuple[jax.Array, np.ndarray]:
        """From the stage's output; None: that is another process's."""
        if y is not None and self._together:
            return y["loss"], np.asarray(y["likeliest"])
        ids = self._gather.forward(None if y is None else {"x": y["likeliest"]})["x"]
        told: list[jax.Array | None] = [None, None]
        if y is not None and ids.is_fully_addressable:  # on the one device
            told = [ids.addressable_data(0), y["loss"].addressable_data(0)]
        ids, loss = self._tell(told)
        return loss, np.asarray(ids)
