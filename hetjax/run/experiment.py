"""What a run is: the modules with their layouts, the data, the optimizer. Frozen dataclasses that gin fills in.

`build` turns an experiment into a trainer, `train_loader` and `held_out_loader` into its data; the commands and
notebooks all start there:

    experiment = config.load(["configs/quickstart.gin"], [], Experiment)
    start(experiment)
    trainer, loader = build(experiment), train_loader(experiment)
    trainer.compile()
    state = trainer.init()
    state, outcome = trainer.step(state, loader.next_step(experiment.num_microbatches))
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hetjax.core.forecast import KINDS
from hetjax.core.graph import Graph, Module, deepstack, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.data import DataConfig, ItemSpec, Loader, Pictures, Sounds
from hetjax.data.items import Reader
from hetjax.data.microbatch import Prepare, abstract
from hetjax.data.together import ALONE, Here
from hetjax.run import cluster, command
from hetjax.run.checks import check_at_least, check_choice, check_model, check_steps

PRECISIONS = ("bfloat16", "float32", "float64")
OF_PICTURES = ("mean", "std", "shortest_edge", "pad_to_square", "resampling", "resize_positions")
SEES, HEARS = ("vision", "image", "<image>"), ("audio", "audio", "<audio>")  # name, field and placeholder of an encoder


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One encoder with its projector. `model` is a config such as `models.vit.ViT` or `models.whisper.Whisper`."""

    model: Any
    layout: Layout = Layout()
    name: str = ""  # "": vision, of a model that hears audio
    field: str = ""  # key of the conversation JSON that names the files; "": image, or audio
    placeholder: str = ""  # "": <image>, or <audio>
    slots_per_group: int = 1  # pictures or clips that a group of samples has room for
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in 0..1, taken off; pictures alone
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # then divided by; pictures alone
    shortest_edge: int | None = None  # pixels of the shorter side when the middle is cut out; None: nothing is cut off
    pad_to_square: bool = False  # with the mean colour, before all else, as LLaVA-1.5 was trained; pictures alone
    resampling: str = "bicubic"  # or bilinear, as SigLIP 2; pictures alone
    resize_positions: bool = False  # init_from's position table, to the model's image_size; pictures alone
    on_long_clip: str = "truncate"  # a clip longer than the model's context: truncate or skip; sounds alone
    remat: str = "full"  # full, dots, none, or auto: what fits in memory
    unroll: bool = False  # no loop over layers: longer to compile and more workspace, faster or slower: measure it
    weight_copies: bool = True  # what products take is made once a step; False: in every program, less memory at dp=1
    compute_dtype: str = "float32"  # bfloat16, float32 or float64

    def __post_init__(self) -> None:
        kind = "a vision or audio model, such as models.vit.ViT or models.whisper.Whisper"
        check_model(self.name or "encoder", self.model, ("image_size", "num_mels"), kind)
        for name, default in zip(("name", "field", "placeholder"), HEARS if self.hears else SEES, strict=True):
            object.__setattr__(self, name, getattr(self, name) or default)
        check_choice(f"{self.name}.remat", self.remat, tuple(r.value for r in Remat))
        check_choice(f"{self.name}.compute_dtype", self.compute_dtype, PRECISIONS)

    @property
    def hears(self) -> bool:
        """Whether its items are clips, not pictures."""
        return hasattr(self.model, "num_mels")

    @property
    def items(self) -> ItemSpec:
        """What the encoder asks of the data."""
        try:
            reader = self._reader()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return ItemSpec(
            name=self.name,
            rows=self.model.rows,
            reader=reader,
            slots_per_group=self.slots_per_group,
            field=self.field,
            placeholder=self.placeholder,
        )

    def _reader(self) -> Reader:
        model, fields = self.model, {f.name: f for f in dataclasses.fields(self)}
        for name in OF_PICTURES if self.hears else ("on_long_clip",):
            if getattr(self, name) != fields[name].default:
                kind = "clips" if self.hears else "pictures"
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing to an encoder of {kind}; leave it out")
        if self.hears:
            return Sounds(model.num_mels, model.frames, model.context, model.rows_of, self.on_long_clip)
        size = (model.image_size, model.image_size)
        return Pictures(*size, self.mean, self.std, self.shortest_edge, self.pad_to_square, self.resampling)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The language model. `model` is a config such as `models.decoder.Decoder`."""

    model: Any
    layout: Layout = Layout()
    name: str = "llm"
    remat: str = "full"  # full, dots, none, or auto: what fits in memory
    unroll: bool = False  # no loop over layers: longer to compile and more workspace, faster or slower: measure it
    weight_copies: bool = True  # what products take is made once a step; False: in every program, less memory at dp=1
    compute_dtype: str = "float32"  # bfloat16, float32 or float64

    def __post_init__(self) -> None:
        check_model(self.name, self.model, ("vocab_size",), "a language model, such as models.decoder.Decoder")
        check_choice(f"{self.name}.remat", self.remat, tuple(r.value for r in Remat))
        check_choice(f"{self.name}.compute_dtype", self.compute_dtype, PRECISIONS)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run with an optimizer of its own, whose schedules begin at the phase's first step."""

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_at_least("Phase.steps", self.steps, 1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run. How many microbatches a step has, and its groups, are settings of the run and never of a layout.

    `steps` and `optimizer` are the one phase of an ordinary run. `phases` take their place: each begins with the
    parameters that the one before it left, and with a fresh optimizer state.
    """

    llm: LanguageModel
    data: DataConfig
    encoders: tuple[Encoder, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    phases: tuple[Phase, ...] = ()  # one after another, in place of `steps` and `optimizer`
    num_microbatches: int = 1  # per step
    schedule: str = "1f1b"  # 1f1b, gpipe, or zerobubble: 1f1b with backwards in two, whose second halves fill holes
    schedule_costs: str = "flops"  # or measured: stages' own times, once before the first step
    encoder_window: int | None = None  # microbatches that colocated encoders run ahead; None: all
    seed: int = 0
    param_dtype: str = "float32"  # float32 or float64
    init_from: Mapping[str, str] = dataclasses.field(default_factory=dict)  # module -> folder of parameters
    held_out: DataConfig | None = None  # evaluated at the end, and every `eval_every` steps
    eval_every: int = 0  # steps; 0: at the end only
    eval_microbatches: int = 0  # 0: the whole held-out file
    eval_samples: int = 0  # held-out questions whose answers an evaluation shows
    eval_sample_tokens: int = 32  # of an answer at most; each costs an evaluation of a microbatch
    save_every: int = 200  # steps
    keep: int = 2  # checkpoints
    log_every: int = 10  # steps
    step_limit: float = 600.0  # seconds; a step, save or evaluation in which nothing happens for so long ends it
    start_limit: float = 3600.0  # seconds; the same of the start and the end
    timeline_steps: tuple[int, ...] = ()  # recorded: when each task began and ended, as picture and trace
    profile_steps: tuple[int, ...] = ()  # of which jax.profiler writes a profile
    tensorboard: bool = False
    wandb: str = ""  # project there that numbers also go to; "": none
    emulated_devices: int = 0  # CPU devices to emulate; 0: the devices that jax finds
    compilation_cache: str | None = None  # directory; None: the user's cache, "": none

    def __post_init__(self) -> None:
        for name in ("encoders", "phases", "timeline_steps", "profile_steps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("steps", "num_microbatches", "save_every", "keep", "log_every", "eval_sample_tokens"):
            check_at_least(f"Experiment.{name}", getattr(self, name), 1)
        for name in ("eval_every", "eval_microbatches", "eval_samples", "emulated_devices"):
            check_at_least(f"Experiment.{name}", getattr(self, name), 0)
        for name in ("step_limit", "start_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Experiment.{name}={getattr(self, name)}; it must be above 0")
        for name in ("timeline_steps", "profile_steps"):
            check_steps(f"Experiment.{name}", getattr(self, name), self.ends[-1])
        for name in ("steps", "optimizer"):
            if self.phases and getattr(self, name) != getattr(Experiment, name):
                raise ValueError(
                    f"Experiment.{name} is set beside phases, which have their own; set Phase.{name} instead"
                )
        check_choice("Experiment.schedule", self.schedule, KINDS)
        check_choice("Experiment.schedule_costs", self.schedule_costs, ("flops", "measured"))
        check_choice("Experiment.param_dtype", self.param_dtype, ("float32", "float64"))
        for encoder in self.encoders:
            if encoder.resize_positions and encoder.name not in self.init_from:
                raise ValueError(
                    f"{encoder.name}: resize_positions=True, but Experiment.init_from names no folder whose position "
                    "table could be resized; name one, or leave it out"
                )
            if encoder.hears and encoder.name == self.attended:
                raise ValueError(
                    f"CrossAttention.encoder={encoder.name!r} hears, and clips differ in their rows, while layers "
                    "attend to all rows of an item; attend to pictures"
                )
        for name in ("eval_every", "eval_samples"):
            if getattr(self, name) and self.held_out is None:
                raise ValueError(
                    f"Experiment.{name}={getattr(self, name)} without held-out data; set Experiment.held_out"
                )

    @property
    def training(self) -> tuple[Phase, ...]:
        """The run's phases, at least one."""
        return self.phases or (Phase(self.steps, self.optimizer),)

    @property
    def ends(self) -> tuple[int, ...]:
        """The last step of each phase; that of the last one is the run's."""
        return tuple(itertools.accumulate(phase.steps for phase in self.training))

    @property
    def items(self) -> tuple[ItemSpec, ...]:
        """What the encoders ask of the data. An item that the language model attends to has one place in the text."""
        return tuple(dataclasses.replace(e.items, places=int(e.name == self.attended)) for e in self.encoders)

    @property
    def attended(self) -> str:
        """The encoder that layers of the language model attend to; "": none."""
        attention = getattr(self.llm.model, "cross_attention", None)
        return "" if attention is None else attention.encoder

    def phase_of(self, step: int) -> int:
        """The index of the phase that left the state of step `step`; beyond the last step the last one's."""
        return min(bisect.bisect_left(self.ends, step), len(self.training) - 1)


def build_graph(experiment: Experiment) -> Graph:
    """The module graph of an experiment."""
    how = lambda module: (module.layout, Remat(module.remat), module.unroll, module.weight_copies)
    towers = tuple(
        Module(e.name, e.model.module(jnp.dtype(e.compute_dtype), name=e.name), *how(e)) for e in experiment.encoders
    )
    llm = experiment.llm
    packed = experiment.data.pack or (experiment.held_out is not None and experiment.held_out.pack)
    names = tuple(e.name for e in experiment.encoders)
    told = dict(encoders=names, deepstack=deepstack(towers), packed=packed)
    definition = llm.model.module(jnp.dtype(llm.compute_dtype), **told)
    return vlm(towers, Module(llm.name, definition, *how(llm)))


def start(experiment: Experiment) -> None:
    """Sets up jax for the experiment: emulated devices, float64, compilation cache. Call it before the first array."""
    dtypes = (experiment.param_dtype, experiment.llm.compute_dtype, *(e.compute_dtype for e in experiment.encoders))
    if "float64" in dtypes:
        jax.config.update("jax_enable_x64", True)
    if experiment.emulated_devices and not cluster.is_one_of_several():
        command.emulate_devices(experiment.emulated_devices)
    command.use_compilation_cache(experiment.compilation_cache)


def build(experiment: Experiment, phase: int = 0) -> Trainer:
    """The trainer of one phase; reads no data and compiles nothing. Raises ValueError for what cannot run."""
    shapes = abstract(experiment.data, experiment.items)
    spec = TrainSpec(
        graph=build_graph(experiment),
        devices=jax.devices(),
        batch={name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()},
        groups=experiment.data.groups,
        num_microbatches=experiment.num_microbatches,
        optimizer=experiment.training[phase].optimizer,
        first_step=(0, *experiment.ends)[phase],
        schedule=experiment.schedule,
        encoder_window=experiment.encoder_window,
        seed=experiment.seed,
        param_dtype=jnp.dtype(experiment.param_dtype),
    )
    return Trainer(spec)


def train_loader(experiment: Experiment, prepare: Prepare = dict, here: Here = ALONE) -> Loader:
    """The training data; `prepare` is called with each microbatch in the data thread (see `Trainer.prepare`)."""
    return _loader(experiment, experiment.data, prepare, here)


def held_out_loader(experiment: Experiment, here: Here = ALONE) -> Loader | None:
    """The held-out data, in microbatches of the training's shape."""
    if experiment.held_out is None:
        return None
    shape = ("seq_len", "samples_per_group", "groups")
    same = dataclasses.replace(experiment.held_out, **{name: getattr(experiment.data, name) for name in shape})
    return _loader(experiment, same, dict, here)


def _loader(experiment: Experiment, data: DataConfig, prepare: Prepare, here: Here) -> Loader:
    loader = Loader(data, experiment.items, prepare, here)
    if loader.vocab_size > experiment.llm.model.vocab_size:
        raise ValueError(
            f"{experiment.llm.name}: vocab_size={experiment.llm.model.vocab_size}, but the tokenizer "
            f"{data.tokenizer_path} has {loader.vocab_size} tokens; set vocab_size to at least {loader.vocab_size}"
        )
    return loader
