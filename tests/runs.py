"""Real runs on a tiny data set: writes data and a gin file, and calls `python -m hetjax.train` in a subprocess."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from conftest import CACHE
from corpus import Spec
from PIL import Image

from hetjax.data import ItemSpec, Pictures
from hetjax.run import config
from hetjax.run.experiment import Experiment
from hetjax.run.metrics import FILE, read_jsonl

ROOT = Path(__file__).parent.parent
TRAIN, HELD_OUT = 6, 12  # samples; the first half of the held-out ones are trained on
ITEM = ItemSpec("vision", 4, Pictures(height=8, width=8), slots_per_group=2)
Changes = Mapping[str, Any]  # gin name -> value

GIN = """
from hetjax.core import layout, optimizer
from hetjax.run import experiment
from hetjax.data import settings
from models import decoder, vit

experiment.Experiment.emulated_devices = 8
experiment.Experiment.encoders = [@vision/experiment.Encoder()]
experiment.Experiment.llm = @llm/experiment.LanguageModel()
experiment.Experiment.optimizer = @optimizer.OptimizerConfig()
experiment.Experiment.data = @train/settings.DataConfig()
experiment.Experiment.steps = 30
experiment.Experiment.num_microbatches = 2
experiment.Experiment.log_every = 1

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
llm/layout.Layout.cp = 2
llm/layout.Layout.tp = 2
llm/layout.Layout.devices = '4-7'
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


def write(directory: Path) -> Path:
    """run.gin in `directory`, with data beside it: samples without a picture, with two, and of two turns."""
    one, two, text = Spec({"vision": (1,)}), Spec({"vision": (2,)}, words=2), Spec({}, words=3)
    kinds = [one, two, text, Spec({"vision": (1, 0)}, turns=2)]
    for name, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        (directory / name).mkdir()
        data = corpus.write(directory / name, [kinds[n % len(kinds)] for n in range(count)], [ITEM])
        corpus.write_tokenizer(directory / name, HELD_OUT)
        _ask_for_colours(Path(data))
    path = directory / "run.gin"
    path.write_text(f"{GIN}\ntrain/settings.DataConfig.path = {str(directory / 'train' / 'data.json')!r}\n")
    return path


def _ask_for_colours(path: Path) -> None:
    """Samples with pictures all ask q0, so that only their colours, now far apart, tell the answers."""
    entries = json.loads(path.read_text())
    for n, entry in enumerate(entries):
        names = entry.get("image", [])
        for name in [names] if isinstance(names, str) else names:
            colour = np.random.default_rng(n).integers(0, 256, 3)
            Image.new("RGB", (8, 8), tuple(int(c) for c in colour)).save(path.with_name(name))
        for turn in entry["conversations"][::2] if names else []:
            turn["value"] = turn["value"].replace(f"q{n}", "q0")
    path.write_text(json.dumps(entries))


class Reference(str):
    """A value such as @vit.ViT(), which stands in gin without quotes."""

    __repr__ = str.__str__


def held_out(gin: Path) -> Changes:
    """Settings that evaluate on the held-out data."""
    return {
        "experiment.Experiment.held_out": Reference("@held_out/settings.DataConfig()"),
        "held_out/settings.DataConfig.path": str(gin.parent / "held_out" / "data.json"),
    }


def layouts(**modules: Mapping[str, Any]) -> Changes:
    """Settings that give modules other layouts: layouts(llm=dict(dp=2, tp=4))."""
    plain = dict(dp=1, tp=1, pp=1, cp=1, devices=None)
    return {f"{m}/layout.Layout.{k}": v for m, changes in modules.items() for k, v in (plain | changes).items()}


def settings(**changes: Any) -> Changes:
    """Settings of the experiment: settings(steps=3)."""
    return {f"experiment.Experiment.{name}": value for name, value in changes.items()}


def load(gin: Path, changes: Changes) -> Experiment:
    """The experiment, in this process."""
    return config.load([str(gin)], [f"{name} = {value!r}" for name, value in changes.items()], Experiment)


def arguments(gin: Path, workdir: Path, changes: Changes) -> list[str]:
    """Those of `hetjax.train`."""
    bindings = (f"--gin.{name}={value!r}" for name, value in changes.items())
    return [f"--gin_file={gin}", f"--workdir={workdir}", *bindings]


def train(gin: Path, workdir: Path, changes: Changes, *, timeout: float = 300) -> str:
    """The output of a whole run, which must succeed."""
    line = [sys.executable, "-m", "hetjax.train", *arguments(gin, workdir, changes)]
    ran = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == 0, f"{ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def start(gin: Path, workdir: Path, changes: Changes) -> subprocess.Popen:
    """A run that goes on, with its output in a pipe; what it compiles it keeps to itself.

    A process that is killed while it writes to the compilation cache leaves half a program there.
    """
    line = [sys.executable, "-m", "hetjax.train", *arguments(gin, workdir, changes)]
    never = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9")
    return subprocess.Popen(
        line, env=environment() | never, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def environment() -> dict[str, str]:
    """That of the tests, whose compilation cache takes every program."""
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(CACHE), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    return {**os.environ, **cache}


def records(workdir: Path, name: str = "loss") -> dict[int, Any]:
    """Step -> value of `name` in metrics.jsonl. Fails if a step has two."""
    found = [(r["step"], r[name]) for r in read_jsonl(workdir / FILE) if name in r]
    assert len(dict(found)) == len(found), f"a step twice: {found}"
    return dict(found)


# Of the runs of `one_trainer.py`: the step that a workdir is saved at, the last one, what is said in place of compiling
SAVED, STEPS, COMPILES = 4, 8, "<compiles>"
DRAWN = "<curves>"  # written there in place of a picture
PLAIN = layouts(vision=dict(), llm=dict()) | settings(num_microbatches=1, save_every=2, emulated_devices=0)
