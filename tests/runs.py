"""Real commands on a tiny data set: writes the data and a gin file, and runs `python -m hetjax...` in a subprocess."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import corpus
from corpus import Spec

from hetjax import config
from hetjax.data import ItemSpec
from hetjax.experiment import Experiment
from hetjax.metrics import FILE, read_jsonl

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "jax-runs"  # its own: a run that is killed may leave a broken entry
TRAIN, HELD_OUT = 6, 12  # samples; the first 6 held-out questions are those that are trained on
ITEM = ItemSpec("vision", rows=4, height=8, width=8, slots_per_group=2)
TIMES = ("tokens_per_second", "images_per_second", "step_seconds", "data_wait_seconds", "tflops_per_device")

GIN = """
from hetjax import experiment, layout, optimizer
from hetjax.data import settings
from models import decoder, vit

experiment.Experiment.emulated_devices = 8
experiment.Experiment.encoders = [@vision/experiment.Encoder()]
experiment.Experiment.llm = @llm/experiment.LanguageModel()
experiment.Experiment.optimizer = @optimizer.OptimizerConfig()
experiment.Experiment.data = @train/settings.DataConfig()
experiment.Experiment.steps = 6
experiment.Experiment.num_microbatches = 2
experiment.Experiment.log_every = 1
experiment.Experiment.save_every = 2

vision/experiment.Encoder.model = @vit.ViT()
vision/experiment.Encoder.layout = @vision/layout.Layout()
vision/experiment.Encoder.slots_per_group = 2
vision/layout.Layout.dp = 2
vision/layout.Layout.devices = '0-1'
vit.ViT.image_size = 8
vit.ViT.patch_size = 4
vit.ViT.width = 16
vit.ViT.num_layers = 2
vit.ViT.num_heads = 2
vit.ViT.mlp_width = 32
vit.ViT.output_width = 16

llm/experiment.LanguageModel.model = @decoder.Decoder()
llm/experiment.LanguageModel.layout = @llm/layout.Layout()
llm/layout.Layout.tp = 2
llm/layout.Layout.devices = '2-3'
decoder.Decoder.vocab_size = 32
decoder.Decoder.width = 16
decoder.Decoder.num_layers = 2
decoder.Decoder.num_heads = 4
decoder.Decoder.num_kv_heads = 2
decoder.Decoder.mlp_width = 32

optimizer.OptimizerConfig.learning_rate = 1e-2
optimizer.OptimizerConfig.warmup_steps = 3

settings.DataConfig.seq_len = 16
settings.DataConfig.samples_per_group = 1
settings.DataConfig.groups = 4
settings.DataConfig.workers = 1
"""


def write(directory: Path, text: str = GIN) -> Path:
    """run.gin in `directory`, with data beside it: some samples without a picture, some with two, some of two turns."""
    kinds = [Spec({"vision": (1,)}), Spec({"vision": (2,)}, words=2), Spec({}, words=3), Spec({"vision": (1, 0)}, turns=2)]
    for name, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        (directory / name).mkdir()
        corpus.write(directory / name, [kinds[n % len(kinds)] for n in range(count)], [ITEM])
        corpus.write_tokenizer(directory / name, HELD_OUT)
    path = directory / "run.gin"
    path.write_text(text + f"\ntrain/settings.DataConfig.path = {str(directory / 'train' / 'data.json')!r}\n")
    return path


def held_out(gin: Path) -> list[str]:
    """Settings that evaluate on the held-out data."""
    path = str(gin.parent / "held_out" / "data.json")
    settings = {"experiment.Experiment.held_out": "@held_out/settings.DataConfig()", "held_out/settings.DataConfig.path": repr(path)}
    return [f"{name} = {value}" for name, value in settings.items()]


def layouts(**modules: dict[str, Any]) -> list[str]:
    """Settings that give modules these layouts instead of those of the gin file: layouts(llm=dict(dp=2, tp=4))."""
    plain = dict(dp=1, tp=1, pp=1, cp=1, devices=None)
    return [f"{m}/layout.Layout.{k} = {v!r}" for m, changes in modules.items() for k, v in (plain | changes).items()]


def settings(**changes: Any) -> list[str]:
    """Settings of the experiment: settings(steps=3)."""
    return [f"experiment.Experiment.{name} = {value!r}" for name, value in changes.items()]


def load(gin: Path, *bindings: str) -> Experiment:
    """The experiment in this process."""
    return config.load([str(gin)], bindings, Experiment)


def command(module: str, gin: Path, bindings: Iterable[str] = (), *flags: str) -> list[str]:
    """The command line of `python -m module`."""
    pairs = (b.split(" = ", 1) for b in bindings)
    return [sys.executable, "-m", module, f"--gin_file={gin}", *(f"--gin.{name}={value}" for name, value in pairs), *flags]


def environment() -> dict[str, str]:
    """That of the tests, with a compilation cache that takes every program."""
    more = dict(JAX_COMPILATION_CACHE_DIR=str(CACHE), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", PYTHONUNBUFFERED="1")
    return {**os.environ, **more}


def train(gin: Path, workdir: Path, *bindings: str, status: int = 0, timeout: float = 200) -> subprocess.CompletedProcess:
    """A whole run of `hetjax.train`, which must end with `status`."""
    line = command("hetjax.train", gin, bindings, f"--workdir={workdir}")
    ran = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == status, f"{ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran


def start(gin: Path, workdir: Path, *bindings: str) -> subprocess.Popen:
    """A run of `hetjax.train` that is still going on; its output goes to DIR/output.txt."""
    workdir.mkdir(parents=True, exist_ok=True)
    line = command("hetjax.train", gin, bindings, f"--workdir={workdir}")
    with (workdir / "output.txt").open("a") as output:
        return subprocess.Popen(line, env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def records(workdir: Path, name: str = "loss") -> dict[int, Any]:
    """Step -> value of `name` in metrics.jsonl. Fails if a step has two."""
    found = [(r["step"], r[name]) for r in read_jsonl(workdir / FILE) if name in r]
    assert len(dict(found)) == len(found), f"a step twice: {found}"
    return dict(found)


Check = Callable[[], object]
