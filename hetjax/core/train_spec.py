"""What a trainer is built from: one record, which the trainer and its pipeline hand on as it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hetjax.core.graph import Graph
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.stage import Abstract


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """What is trained, on which devices, from microbatches of which shape, and how."""

    graph: Graph
    devices: Sequence[jax.Device]
    batch: Abstract  # one global microbatch
    groups: int  # of a microbatch
    num_microbatches: int  # per step
    optimizer: OptimizerConfig
    first_step: int = 0  # where the optimizer's schedules begin
    schedule: str = "1f1b"
    encoder_window: int | None = None  # microbatches that colocated encoders run ahead; None: all
    seed: int = 0
    param_dtype: Any = jnp.float32
