"""A folder's picture processor that a run does not follow, or that nobody here can, is told by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import hf_folders
import pytest
import runs
from hf_folders import vision

from hetjax import train
from hetjax.data import Pictures
from hetjax.hf import pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.stored import open_source

SIGLIP = dict(image_processor_type="SiglipImageProcessor", size=dict(height=8, width=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type='ViTImageProcessor': pictures are read as",
        ),
        ({"resample": 0}, "resample=0: pictures are resized with one of 3 (bicubic), 2 (bilinear), or remove the file"),
        (
            {"image_processor_type": "Siglip2ImageProcessorFast"},
            "image_processor_type='Siglip2ImageProcessorFast': SigLIP 2 with pictures of any shape (NaFlex) is not",
        ),
        ({"do_resize": False}, "do_resize=False: pictures are read with True"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0: pictures are read with 0.0039"),
        ({"do_pad": True}, "do_pad=True: pictures are padded as LlavaImageProcessor does before it normalises"),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False},
            "do_pad=True: pictures are padded as LlavaImageProcessor does before it normalises, which this file",
        ),
        ({"size": {"shortest_edge": 8}}, "size={'shortest_edge': 8}: without a crop pictures must have one height"),
        ({"size": {"longest_edge": 8}}, "size={'longest_edge': 8}: pictures have one height"),
        (
            {"size": 8},
            "size=8: without a crop pictures must have one height and width, as in {'height': 8, 'width': 8}",
        ),
        (
            {"do_center_crop": True, "crop_size": 8, "size": {"shortest_edge": 8, "longest_edge": 9}},
            "size={'shortest_edge': 8, 'longest_edge': 9}: pictures have one height and width, or one shortest edge",
        ),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 8}}, "crop_size={'shortest_edge': 8}: pictures have"),
        ({"use_square_size": True}, "use_square_size=True: pictures are read with False"),
        ({"image_processor_type": None}, "image_processor_type='': pictures are read as CLIPImageProcessor, "),
        (
            {"do_center_crop": True, "crop_size": 6},
            "size={'height': 8, 'width': 8}: crop_size={'height': 6, 'width': 6} cuts something else",
        ),
    ],
    ids=str,
)
def test_what_no_reader_does_is_refused_by_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / pictures.FILE
    path.write_text(json.dumps(SIGLIP | changes))
    with pytest.raises(ConvertError) as caught:
        pictures.read({pictures.FILE: path})
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_run_that_shows_other_pictures_than_its_folder_knows_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gin = runs.write(tmp_path)
    folder = hf_folders.write(tmp_path / "hf", vision("siglip"))
    (folder / pictures.FILE).write_text(json.dumps(SIGLIP | {"image_mean": [0.4, 0.5, 0.6]}))
    model = open_source(folder).models["vision"]
    changes = {f"vit.ViT.{f}": v for f, v in vars(model).items() if v is not None and f != "output_width"}
    start = runs.settings(steps=1, init_from={"vision": str(folder)})
    capsys.readouterr()
    assert train.main(runs.arguments(gin, tmp_path / "run", changes | start)) == 2
    assert "says mean=(0.4, 0.5, 0.6) (the run has (0.5, 0.5, 0.5)); set the encoder to that" in capsys.readouterr().err


def test_pictures_may_be_padded_before_a_tower_that_knew_none_but_not_the_other_way_round(tmp_path: Path) -> None:
    files = {pictures.FILE: tmp_path / pictures.FILE}
    plain = Pictures(8, 8, shortest_edge=8)
    padded = dataclasses.replace(plain, pad_to_square=True)
    files[pictures.FILE].write_text(json.dumps(pictures.write(plain)))
    pictures.check("vision", padded, files)
    files[pictures.FILE].write_text(json.dumps(pictures.write(padded)))
    with pytest.raises(ConvertError, match=r"says pad_to_square=True \(the run has False\); set the encoder to that"):
        pictures.check("vision", plain, files)
