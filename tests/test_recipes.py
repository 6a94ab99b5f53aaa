"""The recipes: what their files say can be built, and the real ones answer as their exports do in transformers."""

import subprocess
import sys
from pathlib import Path

import corpus
import hf_folders
import numpy as np
import pytest
import runs
import soundfile
from PIL import Image

from hetjax.assets import tuxpaint
from hetjax.run import config, experiment
from hetjax.run.experiment import Experiment

CONFIGS = runs.ROOT / "configs"
CACHE = runs.ROOT / "data" / "cache"
RECIPES = ["smollm2_captions", "whisper_smollm2", "smollm2_both"]
LIKE_SMOLLM2 = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=8)
EXPORTED = {  # first phase, held-out questions, what is exported: no class of transformers holds both encoders
    "smollm2_captions": ("encoder", "captions", "llm,vision"),
    "whisper_smollm2": ("projector", "spoken", "llm,audio"),
    "smollm2_both": ("senses", "captions", "llm,vision"),
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory to stand in, with data/cache as the scripts make it, but two narrow layers and forty stamps."""
    monkeypatch.chdir(tmp_path)
    cache = Path("data/cache")
    hf_folders.write(cache / "smollm2", hf_folders.text("llama", **LIKE_SMOLLM2))
    tokenizer = corpus.write_tokenizer(cache / "smollm2", 4)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>", "<audio>"])
    tokenizer.save(str(cache / "smollm2" / "tokenizer.json"))
    hf_folders.write(cache / "whisper", hf_folders.whisper(num_mel_bins=80, max_source_positions=64))
    stamps = Path("stamps")
    stamps.mkdir()
    noise = np.random.default_rng(0).normal(size=16_000)
    for number in range(40):
        Image.new("RGBA", (8, 8), (number, 0, 0, 255)).save(stamps / f"{number}.png")
        (stamps / f"{number}.txt").write_text(f"Number {number}.")
        soundfile.write(stamps / f"{number}_desc_fr.ogg", 0.1 * noise, 16_000)
    tuxpaint.prepare(cache / "tuxpaint", stamps)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_every_phase_and_its_data_fit(name: str) -> None:
    run = config.load([str(CONFIGS / f"{name}.gin")], [], Experiment)
    trainers = [experiment.build(run, phase) for phase in range(len(run.training))]
    assert len(trainers) == 2 and not any(
        stage.parameters.trains for (module, _), stage in trainers[0].pipeline.stages.items() if module == "llm"
    )
    assert len({str(module.layout) for module in trainers[0].graph.modules}) == len(trainers[0].graph.modules)
    with experiment.train_loader(run) as loader:
        (batch,) = loader.next_step(run.num_microbatches)
        assert not loader.bad and batch["weights"].any()
    for item in loader.items:
        assert (batch[f"{item.name}.index"] >= 0).any()
    held_out = experiment.held_out_loader(run)
    assert held_out is not None
    with held_out:
        assert held_out.samples


@pytest.mark.slow
@pytest.mark.skipif(not (CACHE / "smollm2").is_dir(), reason="scripts/ fetch what the recipes start from")
@pytest.mark.parametrize("name", EXPORTED)
def test_a_recipes_export_answers_as_the_run_does(name: str, tmp_path: Path) -> None:
    """After a step of each phase; real weights, held-out items, greedy."""
    pytest.importorskip("transformers")
    phase, data, modules = EXPORTED[name]
    steps = {f"{p}/experiment.Phase.steps": 1 for p in (phase, "all")}
    short = steps | runs.settings(eval_microbatches=1) | {"all/optimizer.OptimizerConfig.decay_steps": 0}
    runs.train(CONFIGS / f"{name}.gin", tmp_path / "run", short, timeout=1000)
    exported = tmp_path / "export"
    command("-m", "hetjax.convert", "to_hf", tmp_path / "run", "--out", exported, f"--modules={modules}")
    questions = CACHE / "tuxpaint" / f"{data}.test.json"
    said = command("scripts/same_answers.py", tmp_path / "run", exported, questions, "--count", 4)
    assert "4 of 4 answers are the same" in said


def command(*words: object) -> str:
    line = [sys.executable, *map(str, words)]
    ran = subprocess.run(line, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout
