"""Large pictures are decoded at a reduced size, which their pixels do not tell; Pillow's own limit stays as it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hetjax.data import Pictures, photos

COLOURS = (0.9, 0.1, 0.5)
READERS = {
    "squeezed": Pictures(32, 32),
    "squeezed, bilinear": Pictures(32, 32, resampling="bilinear"),
    "the middle": Pictures(32, 32, shortest_edge=40),
    "padded": Pictures(32, 32, mean=COLOURS, pad_to_square=True),
    "the middle of a padded one": Pictures(32, 32, mean=COLOURS, shortest_edge=35, pad_to_square=True),
}
STEPS = 4  # of 255


def scene(width: int, height: int) -> Image.Image:
    """Soft colours with sharp edges and noise."""
    rng = np.random.default_rng(width)
    soft = Image.fromarray(rng.integers(0, 256, (12, 17, 3), np.uint8)).resize((width, height))
    sharp = Image.fromarray(rng.integers(0, 2, (9, 13), np.uint8) * 255).convert("RGB")
    both = Image.blend(soft, sharp.resize((width, height), Image.Resampling.NEAREST), 0.5)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(both).astype(int) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(1200, 904), (905, 1203), (1603, 801)], ids=str)
def test_a_reduced_picture_gives_the_pixels_of_the_whole_one(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image = tmp_path / "a.jpg", scene(*size)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, quality=92, exif=exif)
        whole = {name: reader.to_rgb(reader.read(path)).astype(int) for name, reader in READERS.items()}
        with monkeypatch.context() as patch:
            patch.setattr(photos, "LARGE", 2**16)
            for name, reader in READERS.items():
                read = photos.read(path, reader._surplus)
                assert read.image.size[0] * 4 <= read.size[0] + 3, name
                np.testing.assert_allclose(
                    reader.to_rgb(reader.read(path)),
                    whole[name],
                    rtol=0,
                    atol=STEPS,
                    err_msg=f"{name} {orientation}",
                )


@pytest.mark.parametrize(("needed", "read"), [(300, 900), (100, 450), (50, 225), (37, 113)])
def test_no_more_is_left_out_than_the_resizing_can_spare(
    needed: int, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "LARGE", 2**16)
    scene(1100, 900).save(tmp_path / "a.jpg")
    assert photos.read(tmp_path / "a.jpg", Pictures(needed, needed)._surplus).image.size[1] == read


def test_pillow_s_limit_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    scene(30, 20).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"none")
    Pictures(8, 8).read(tmp_path / "a.png")
    with pytest.raises(Exception, match="cannot identify"):
        Pictures(8, 8).read(tmp_path / "b.png")
    assert Image.MAX_IMAGE_PIXELS == 100
