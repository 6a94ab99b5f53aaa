"""transformers 4.57 makes of exports of every family what we do, and what version 5 does: keys, output, loss,
gradients, ids, pixels and features.

The older one lives in an environment of its own, whose interpreter HETJAX_TRANSFORMERS_457 names:

    python -m venv old && old/bin/pip install torch==2.13.0 && old/bin/pip install transformers==4.57.6 pillow jinja2
    HETJAX_TRANSFORMERS_457=old/bin/python pytest -m slow tests/test_transformers_457.py
"""

import os
import subprocess
import sys
from pathlib import Path

import beside_torch
import families
import hf_folders
import ml_dtypes
import numpy as np
import pytest
import runs
import test_audio_run
from beside_torch import Outcome
from PIL import Image

from hetjax import convert, train
from hetjax.hf.source import Source
from hetjax.hf.stored import open_source

OLD = os.environ.get("HETJAX_TRANSFORMERS_457")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OLD is None, reason="HETJAX_TRANSFORMERS_457 names no interpreter")]
ROUNDED = ("llama", "clip + llama", "qwen2_audio")  # exported in bfloat16 too
SEEING_RUNS = {"a run": None, "a run that crops": 9}  # name -> shortest edge
RUNS = (*SEEING_RUNS, "a run that hears")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> directory of an export, of a folder through a checkpoint, or of a run; with what each version gives."""
    root = tmp_path_factory.mktemp("exports")
    folders = {name: (config, np.float32) for name, config in families.ALL.items()}
    folders |= {f"{name} in bfloat16": (families.ALL[name], ml_dtypes.bfloat16) for name in ROUNDED}
    found = {}
    for number, (name, (config, dtype)) in enumerate(folders.items()):
        found[name] = directory = root / str(number)
        hf_folders.write(directory / "source", config, dtype=dtype)
        _convert("from_hf", directory / "source", directory / "ckpt")
        _convert("to_hf", directory / "ckpt", directory / "model")
    for name, edge in SEEING_RUNS.items():
        found[name] = directory = root / name.replace(" ", "-")
        directory.mkdir()
        gin = runs.write(directory)
        changes = runs.settings(steps=1) | {"experiment.Encoder.shortest_edge": edge}
        assert train.main(runs.arguments(gin, directory / "run", changes)) == 0
        _convert("to_hf", directory / "run", directory / "model")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)).save(directory / "picture.png")
    found["a run that hears"] = directory = root / "hears"
    _convert("to_hf", test_audio_run.trained(directory), directory / "model", "--modules=llm,audio")
    np.save(directory / "sound.npy", np.random.default_rng(0).normal(size=2000).astype(np.float32))
    for directory in found.values():
        np.savez(directory / "inputs.npz", **families.for_transformers(given(directory)))
    script = Path(__file__).with_name("in_transformers.py")
    for version, interpreter in (("old", OLD), ("new", sys.executable)):
        subprocess.run([str(interpreter), str(script), version, *map(str, found.values())], check=True)
    return found


def _convert(command: str, source: Path, out: Path, *options: str) -> None:
    assert convert.main([command, str(source), "--out", str(out), *options]) == 0


def opened(directory: Path) -> Source:
    """The folder that was exported through a checkpoint, or a run's export."""
    return open_source(directory / ("source" if (directory / "source").exists() else "model"))


def given(directory: Path) -> families.Arrays:
    """The microbatch, in the tokens of the model."""
    source = opened(directory)
    microbatch = families.microbatch(source.models)
    if not (directory / "model" / "tokenizer.json").exists():
        return microbatch
    kind = "image" if "vision" in source.models else "audio"
    return families.with_item_token(microbatch, next(iter(source.extras.values())).config[f"{kind}_token_index"])


def outcome(directory: Path, version: str) -> Outcome:
    """What a version of transformers gave."""
    made, gradients = np.load(directory / f"{version}.npz"), np.load(directory / f"{version}.gradients.npz")
    return Outcome(made["output"], made["scalar"].item(), beside_torch.stored(gradients, opened(directory)))


@pytest.mark.parametrize("name", [*families.ALL, *RUNS])
def test_the_older_version_computes_from_an_export_what_we_do(name: str, exports: dict[str, Path]) -> None:
    directory = exports[name]
    source = opened(directory)
    beside_torch.assert_same(beside_torch.ours(source, given(directory)), outcome(directory, "old"), source)


@pytest.mark.parametrize("name", [*families.ALL, *RUNS])
def test_both_versions_compute_the_same_from_an_export(name: str, exports: dict[str, Path]) -> None:
    old, new = (outcome(exports[name], version) for version in ("old", "new"))
    beside_torch.assert_same(old, new, opened(exports[name]))


@pytest.mark.parametrize("name", ROUNDED)
def test_both_versions_compute_nearly_the_same_in_bfloat16(name: str, exports: dict[str, Path]) -> None:
    old, new = (np.load(exports[f"{name} in bfloat16"] / f"{version}.npz")["output"] for version in ("old", "new"))
    np.testing.assert_allclose(old, new, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", RUNS)
def test_both_versions_make_the_same_ids_and_pixels_or_features(name: str, exports: dict[str, Path]) -> None:
    old, new = (np.load(exports[name] / f"{version}.made.npz") for version in ("old", "new"))
    assert set(old) == set(new) and "input_ids" in old and len(set(old)) > 1
    for kind in old:
        np.testing.assert_array_equal(old[kind], new[kind])
