"""Exports of every family mean the same in transformers 4.57 as in 5: keys, logits, ids and pixels.

The older one lives in an environment of its own, whose interpreter HETJAX_TRANSFORMERS_457 names:

    python -m venv old && old/bin/pip install torch==2.13.0 && old/bin/pip install transformers==4.57.6 pillow jinja2
    HETJAX_TRANSFORMERS_457=old/bin/python pytest -m slow tests/test_transformers_457.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_folders
import ml_dtypes
import numpy as np
import pytest
import runs
from hf_folders import IMAGE_TOKEN, qwen2_audio, text, vision
from PIL import Image

from hetjax import convert, train
from hetjax.hf.stored import open_source

pytest.importorskip("transformers")
import test_convert_audio_torch as hears
import test_convert_torch as sees

OLD = os.environ.get("HETJAX_TRANSFORMERS_457")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OLD is None, reason="HETJAX_TRANSFORMERS_457 names no interpreter")]
FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    **{name: (config, np.float32) for name, config in sees.CASES.items()},
    "clip": (vision("clip"), np.float32),
    "siglip": (vision("siglip"), np.float32),
    "qwen2_audio": (qwen2_audio(text("qwen2")), np.float32),
    "llama in bfloat16": (sees.CASES["llama"], ml_dtypes.bfloat16),
    "clip + llama in bfloat16": (sees.CASES["clip + llama"], ml_dtypes.bfloat16),
}


def inputs(models: dict[str, Any]) -> dict[str, np.ndarray]:
    """What transformers' model takes."""
    if "audio" in models:
        made = hears.batch(models["audio"])
        return dict(
            input_ids=made["tokens"].astype(np.int64),
            attention_mask=np.ones_like(made["tokens"], np.int64),
            input_features=made["audio.mel"][:3].transpose(0, 2, 1),
            feature_attention_mask=(np.arange(16) < hears.FRAMES[:3, None]).astype(np.int64),
        )
    made = sees.batch(models["vision"].rows if "vision" in models else 0)
    pixels = {"pixel_values": made["vision.pixels"][:3].transpose(0, 3, 1, 2)} if "vision" in models else {}
    ids = {"input_ids": made["tokens"].astype(np.int64), "attention_mask": np.ones_like(made["tokens"], np.int64)}
    return pixels | ids if "llm" in models else pixels


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> directory of an export, of a folder through a checkpoint, or of a run."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    for number, (name, (config, dtype)) in enumerate(FAMILIES.items()):
        found[name] = directory = root / str(number)
        folder = hf_folders.write(directory / "folder", config, dtype=dtype)
        for command in (
            ["from_hf", folder, "--out", directory / "ckpt"],
            ["to_hf", directory / "ckpt", "--out", "model"],
        ):
            command[-1] = directory / command[-1]
            assert convert.main([str(word) for word in command]) == 0
        np.savez(directory / "inputs.npz", **inputs(dict(open_source(folder).models)))
    for name, edge in (("a run", None), ("a run that crops", 9)):
        found[name] = directory = root / name.replace(" ", "-")
        directory.mkdir()
        gin = runs.write(directory)
        changes = runs.settings(steps=1) | {"experiment.Encoder.shortest_edge": edge}
        assert train.main(runs.arguments(gin, directory / "run", changes)) == 0
        assert convert.main(["to_hf", str(directory / "run"), "--out", str(directory / "model")]) == 0
        source = open_source(directory / "model")
        made = inputs(dict(source.models))
        token = next(iter(source.extras.values())).config["image_token_index"]
        ids = np.where(made["input_ids"] == IMAGE_TOKEN, token, made["input_ids"] % token)
        np.savez(directory / "inputs.npz", **made | {"input_ids": ids})
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)).save(directory / "picture.png")
    return found


def test_both_versions_make_the_same_of_every_export(exports: dict[str, Path]) -> None:
    script = Path(__file__).with_name("in_transformers.py")
    outputs = {}
    for interpreter in (sys.executable, OLD):
        subprocess.run([interpreter, str(script), *map(str, exports.values())], check=True)
        for name, directory in exports.items():
            for file in directory.glob("*.npy"):
                outputs[interpreter, name, file.name] = np.load(file)
                shutil.move(file, directory / f"{file.name}.read")
    compared = 0
    for (interpreter, name, file), value in outputs.items():
        if interpreter == OLD:
            exact = file != "logits.npy"
            close = dict(rtol=0, atol=0) if exact else dict(rtol=0, atol=0.05 if "bfloat16" in name else 1e-5)
            np.testing.assert_allclose(value, outputs[sys.executable, name, file], err_msg=f"{name}: {file}", **close)
            compared += 1
    assert compared == len(exports) + 4 and len(outputs) == 2 * compared
