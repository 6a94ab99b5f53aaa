"""Folders of the shapes that the hub's have go in and come out the same, and compute what transformers does.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path
from typing import Any

import beside_torch
import families
import hf_folders
import hub
import jax
import numpy as np
import pytest
from beside_torch import in_transformers, torch, transformers
from PIL import Image

from hetjax import convert
from hetjax.hf import pictures
from hetjax.hf.stored import open_source

pytestmark = beside_torch.QUIET


def write(directory: Path, shape: hub.Shape) -> Path:
    """A folder whose weights transformers draws and saves, and whose other files are those of the hub."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape.config))
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = getattr(transformers, shape.config["architectures"][0])(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms as drawn would hide an exchange
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    for name, value in {"config.json": shape.config, **shape.files}.items():
        (directory / name).write_text(json.dumps(value))
    return directory


def converted(command: str, source: Path, out: Path) -> Path:
    """`out`, written."""
    assert convert.main([command, str(source), "--out", str(out)]) == 0
    return out


def model_of(folder: Path) -> Any:
    """transformers' model; of a pair of towers the one that sees."""
    model = in_transformers.load(folder)
    return getattr(model, "vision_model", model) if hasattr(model, "text_model") else model


def told(config: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the config says in the fields that were there before."""
    inside = lambda name: isinstance(before[name], dict) and isinstance(config[name], dict)
    return {n: told(config[n], before[n]) if inside(n) else config[n] for n in before if n in config}


@pytest.mark.parametrize("name", list(hub.SHAPES))
def test_a_folder_of_the_hub_comes_out_as_it_was_and_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    shape = hub.SHAPES[name]
    folder = write(tmp_path / "hf", shape)
    out = converted("to_hf", converted("from_hf", folder, tmp_path / "ckpt"), tmp_path / "out")
    again = converted("to_hf", out, tmp_path / "again")
    assert told(json.loads((out / "config.json").read_text()), shape.config) == shape.config
    assert not list(hf_folders.differing(hf_folders.read(out), hf_folders.read(again)))
    for file, value in shape.files.items():
        assert json.loads((out / file).read_text()) == value, file

    source = open_source(out)
    microbatch = families.microbatch(source.models)
    ours = jax.jit(beside_torch.forward(source, microbatch))(beside_torch.whole(source))[1]
    for theirs in (folder, out):
        with torch.no_grad():
            expected = in_transformers.run(model_of(theirs), families.for_transformers(microbatch))[0]
        np.testing.assert_allclose(np.asarray(ours), expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [n for n, s in hub.SHAPES.items() if "image_std" in s.files.get(pictures.FILE, {})])
def test_pictures_are_read_as_the_folder_s_processor_reads_them(name: str, tmp_path: Path) -> None:
    for file, value in {"config.json": hub.SHAPES[name].config, **hub.SHAPES[name].files}.items():
        (tmp_path / file).write_text(json.dumps(value))
    reader = pictures.read({pictures.FILE: tmp_path / pictures.FILE})
    assert reader is not None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 44, 3), np.uint8))
    image.save(tmp_path / "a.png")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(reader.read(tmp_path / "a.png")["pixels"], theirs[0].transpose(1, 2, 0))
