"""Pictures and texts become the very pixels and ids that transformers' processors make of the same files and folder.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hetjax.data import Pictures
from hetjax.hf import pictures

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
READERS = {
    "siglip": Pictures(24, 24),
    "siglip, other colours": Pictures(16, 16, CLIP_MEAN, CLIP_STD),
    "clip": Pictures(24, 24, CLIP_MEAN, CLIP_STD, shortest_edge=24),
    "clip, of a larger picture": Pictures(21, 21, CLIP_MEAN, CLIP_STD, shortest_edge=32),
    "clip, padded with black": Pictures(24, 24, CLIP_MEAN, CLIP_STD, shortest_edge=17),
}


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, size, np.uint8)


def palette(image: Image.Image, **options: Any) -> Callable[[Path], None]:
    return lambda path: image.convert("P", palette=Image.Palette.ADAPTIVE).save(path, **options)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    Image.fromarray(noise(20, 31, 3)).save(path, exif=exif)


FILES: dict[str, Callable[[Path], None]] = {
    "rgb.png": Image.fromarray(noise(33, 50, 3)).save,
    "tall.png": Image.fromarray(noise(61, 23, 3)).save,
    "tiny.png": Image.fromarray(noise(3, 2, 3)).save,
    "square.png": Image.fromarray(noise(24, 24, 3)).save,
    "long.png": Image.fromarray(noise(5, 301, 3)).save,
    "photo.jpg": Image.fromarray(noise(40, 57, 3)).save,
    "cmyk.jpg": Image.fromarray(noise(30, 41, 4), "CMYK").save,
    "rgba.png": Image.fromarray(noise(29, 35, 4)).save,
    "grey.png": Image.fromarray(noise(31, 27)).save,
    "grey-alpha.png": Image.fromarray(noise(31, 27, 2), "LA").save,
    "bits.png": Image.fromarray(noise(37, 26)).convert("1").save,
    "palette.png": palette(Image.fromarray(noise(30, 44, 3))),
    "palette-transparent.png": palette(Image.fromarray(noise(30, 44, 3)), transparency=bytes(range(200))),
    "colour-transparent.gif": palette(Image.fromarray(noise(30, 44, 3)), transparency=7),
    "rotated.jpg": rotated,
}


@pytest.mark.parametrize("name", list(READERS))
def test_pixels_are_those_of_transformers_bit_for_bit(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    (tmp_path / pictures.FILE).write_text(json.dumps(pictures.write(reader)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert pictures.read({pictures.FILE: tmp_path / pictures.FILE}) == reader
    for file, save in FILES.items():
        save(tmp_path / file)
        image = transformers.image_utils.load_image(str(tmp_path / file))
        image.info.pop("transparency", None)  # one transparent colour: 5 paints it white, 4.57 leaves it, as we do
        theirs = processor(image, return_tensors="np")
        ours, rows = reader.read(tmp_path / file)
        assert rows is None
        np.testing.assert_array_equal(ours["pixels"], theirs["pixel_values"][0].transpose(1, 2, 0), err_msg=file)


CLIP_HUB = dict(
    crop_size=24, do_center_crop=True, do_normalize=True, do_resize=True, feature_extractor_type="CLIPFeatureExtractor",
    image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD), resample=3, size=24,
)  # fmt: skip
SIGLIP_HUB = dict(image_processor_type="SiglipImageProcessor", size=dict(height=24, width=24), image_mean=[0.5] * 3)
FORMS: dict[str, tuple[dict[str, Any], Pictures]] = {
    "clip, first form": (CLIP_HUB, READERS["clip"]),
    "clip, defaults": (
        dict(image_processor_type="CLIPImageProcessorFast"),
        Pictures(224, 224, CLIP_MEAN, CLIP_STD, shortest_edge=224),
    ),
    "clip, a square first": (CLIP_HUB | dict(size=dict(height=24, width=24)), Pictures(24, 24, CLIP_MEAN, CLIP_STD)),
    "siglip": (SIGLIP_HUB, READERS["siglip"]),
    "siglip, as they are": (SIGLIP_HUB | dict(do_normalize=False), Pictures(24, 24, (0.0,) * 3, (1.0,) * 3)),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_the_hub_are_read_as_transformers_reads_them(form: str, tmp_path: Path) -> None:
    config, reader = FORMS[form]
    (tmp_path / pictures.FILE).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert pictures.read({pictures.FILE: tmp_path / pictures.FILE}) == reader
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    FILES["rgb.png"](tmp_path / "a.png")
    theirs = processor(Image.open(tmp_path / "a.png"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(reader.read(tmp_path / "a.png")[0]["pixels"], theirs)


def test_transformers_5_s_own_files_are_read(tmp_path: Path) -> None:
    (tmp_path / pictures.NESTED).write_text(json.dumps({"image_processor": SIGLIP_HUB, "image_token": "<image>"}))
    assert pictures.read({pictures.NESTED: tmp_path / pictures.NESTED}) == READERS["siglip"]
    (tmp_path / pictures.NESTED).write_text(json.dumps({"image_token": "<image>"}))
    assert pictures.read({pictures.NESTED: tmp_path / pictures.NESTED}) is None and pictures.read({}) is None
