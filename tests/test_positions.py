"""A tower goes on with pictures of another size: its position table is resized as transformers resizes it.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path
from typing import Any

import beside_torch
import families
import hf_folders
import numpy as np
import pytest
import runs
from beside_torch import in_transformers, torch, transformers
from hf_folders import vision
from PIL import Image

from hetjax import convert, train
from hetjax.data import Pictures
from hetjax.hf import pictures
from hetjax.hf.positions import Resized
from hetjax.hf.stored import open_source

pytestmark = beside_torch.QUIET
MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


@pytest.mark.parametrize("size", [4, 9, 12, 21, 44])  # of one patch to 121; at first there are nine
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_table_is_that_of_transformers(kind: str, size: int, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", vision(kind, image_size=13))
    model = in_transformers.load(folder)
    embeddings = getattr(model, "vision_model", model).embeddings
    tokens = torch.zeros(1, (size // 4) ** 2 + (kind == "clip"), 16)
    with torch.no_grad():
        expected = embeddings.interpolate_pos_encoding(tokens, size, size)[0].numpy()
    source = Resized(open_source(folder), "vision", size)
    table = source.fetch(["vision/first/position"])["vision/first/position"]
    assert source.arrays["vision/first/position"].shape == expected.shape
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """run.gin, the folder of a tower of 13 x 13 pixels with its processor, and settings for 8 x 8 that start there."""
    directory = tmp_path_factory.mktemp("start")
    folder = hf_folders.write(directory / "clip", vision("siglip", image_size=13))
    reader = Pictures(13, 13, MEAN, STD, shortest_edge=26)
    (folder / pictures.FILE).write_text(json.dumps(pictures.write(reader)))
    model = open_source(folder).models["vision"]
    sizes = {f"vit.ViT.{f}": v for f, v in vars(model).items() if v is not None and f != "output_width"}
    own = dict(mean=MEAN, std=STD, shortest_edge=16, resize_positions=True)
    changes = sizes | {f"experiment.Encoder.{name}": value for name, value in own.items()}
    changes |= {"vit.ViT.image_size": 8}
    return runs.write(directory), folder, changes | runs.settings(steps=1, init_from={"vision": str(folder)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"experiment.Encoder.resize_positions": False},
            "ViT.image_size=8, but {folder}, which Experiment.init_from names, was made with 13; set ViT.image_size to "
            "that, or resize_positions=True of the encoder to resize its positions",
        ),
        (
            {"experiment.Encoder.shortest_edge": 26},
            "read for pictures of 8 x 8 says shortest_edge=16 (the run has 26); set the encoder to that",
        ),
        (
            {"experiment.Experiment.init_from": {}},
            "vision: resize_positions=True, but Experiment.init_from names no folder whose position table could be",
        ),
    ],
    ids=["not asked for", "another part of the picture", "nothing to resize"],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    start: tuple[Path, Path, dict[str, Any]], changed: dict[str, Any], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    gin, folder, changes = start
    assert train.main(runs.arguments(gin, tmp_path / "run", changes | changed)) == 2
    assert message.format(folder=folder) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_in_another_size_starts_there_and_its_export_says_so(
    start: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    gin, folder, changes = start
    still = {"optimizer.OptimizerConfig.learning_rate": 1e-30, "optimizer.OptimizerConfig.weight_decay": 0.0}
    assert train.main(runs.arguments(gin, tmp_path / "run", changes | still)) == 0
    source = open_source(tmp_path / "run")
    name = "vision/first/position"
    np.testing.assert_allclose(
        source.fetch([name])[name], Resized(open_source(folder), "vision", 8).fetch([name])[name], atol=1e-7
    )

    for modules, out in (("llm,vision", tmp_path / "whole"), ("vision", tmp_path / "tower")):
        assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(out), f"--modules={modules}"]) == 0
        config = json.loads((out / "config.json").read_text())
        assert config.get("vision_config", config)["image_size"] == 8
        processor = transformers.AutoImageProcessor.from_pretrained(out)
        assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (8, 16)
        in_transformers.load(out)

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 33, 3), np.uint8)).save(tmp_path / "a.png")
    shown = runs.load(gin, changes).encoders[0].items.read(tmp_path / "a.png")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "whole")
    image = transformers.image_utils.load_image(str(tmp_path / "a.png"))
    made = processor(images=[image], text="what <image> is it", return_tensors="np")
    np.testing.assert_array_equal(made["pixel_values"][0].transpose(1, 2, 0), shown.values["pixels"])
    token = json.loads((tmp_path / "whole" / "config.json").read_text())["image_token_index"]
    assert (made["input_ids"] == token).sum() == shown.rows == 4

    model = in_transformers.load(tmp_path / "whole")
    microbatch = families.with_item_token(families.microbatch(source.models), token)
    with torch.no_grad():
        expected, _ = in_transformers.run(model, families.for_transformers(microbatch))
    _, logits = beside_torch.forward(source, microbatch)(beside_torch.whole(source))
    np.testing.assert_allclose(np.asarray(logits), expected.numpy(), atol=1e-5)
