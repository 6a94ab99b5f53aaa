"""What a run is: the modules with their layouts, the data, the optimizer. Frozen dataclasses that gin fills in.

`build` turns an experiment into a trainer and its loader; the command, `verify` and notebooks all start there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetjax import layout, optimizer
from hetjax.data import DataConfig, ItemSpec, Loader
from hetjax.graph import Graph, Module, Remat, vlm
from hetjax.layout import Layout
from hetjax.optimizer import OptimizerConfig
from hetjax.trainer import Trainer

PRECISIONS = ("bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One encoder with its projector. `model` is a config such as `models.vit.ViT`."""

    model: Any
    layout: Layout = Layout()
    name: str = "vision"
    field: str = "image"  # key of the conversation JSON that names the pictures
    placeholder: str = "<image>"
    slots_per_group: int = 1  # pictures that a group of samples has room for
    remat: str = "full"  # full, dots or none
    compute_dtype: str = "float32"  # bfloat16, float32 or float64

    def __post_init__(self) -> None:
        check_choice(f"{self.name}.remat", self.remat, tuple(r.value for r in Remat))
        check_choice(f"{self.name}.compute_dtype", self.compute_dtype, PRECISIONS)
        if self.slots_per_group < 1:
            raise ValueError(f"{self.name}: slots_per_group={self.slots_per_group}; a group needs room for at least 1 picture")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The language model. `model` is a config such as `models.decoder.Decoder`."""

    model: Any
    layout: Layout = Layout()
    name: str = "llm"
    remat: str = "full"  # full, dots or none
    compute_dtype: str = "float32"  # bfloat16, float32 or float64

    def __post_init__(self) -> None:
        check_choice(f"{self.name}.remat", self.remat, tuple(r.value for r in Remat))
        check_choice(f"{self.name}.compute_dtype", self.compute_dtype, PRECISIONS)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run. How many microbatches a step has, and its groups, are settings of the run and never of a layout."""

    llm: LanguageModel
    data: DataConfig
    encoders: tuple[Encoder, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    num_microbatches: int = 1  # per step
    schedule: str = "1f1b"  # 1f1b or gpipe
    encoder_window: int | None = None  # microbatches that colocated encoders run ahead; None: all
    seed: int = 0
    param_dtype: str = "float32"  # float32 or float64
    eval_data: DataConfig | None = None
    eval_every: int = 0  # steps; 0: at the end only
    eval_microbatches: int = 0  # 0: the whole held-out set
    save_every: int = 200  # steps
    keep: int = 2  # checkpoints
    log_every: int = 10  # steps
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoders", tuple(self.encoders))
        for name in ("steps", "num_microbatches", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Experiment.{name}={getattr(self, name)}; it must be at least 1")
        check_choice("Experiment.schedule", self.schedule, ("1f1b", "gpipe"))
        check_choice("Experiment.param_dtype", self.param_dtype, ("float32", "float64"))


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{setting}={value!r}; it must be one of {', '.join(choices)}")


def build_graph(experiment: Experiment) -> Graph:
    """The module graph of an experiment."""
    towers = tuple(
        Module(e.name, e.model.module(jnp.dtype(e.compute_dtype), name=e.name), e.layout, Remat(e.remat)) for e in experiment.encoders
    )
    llm = experiment.llm
    definition = llm.model.module(jnp.dtype(llm.compute_dtype), encoders=tuple(e.name for e in experiment.encoders))
    return vlm(towers, Module(llm.name, definition, llm.layout, Remat(llm.remat)))
