"""Pictures as users have them: each is read as transformers' `load_image` and processors read it, or refused in a line.

Most show four quadrants, so that the colours of the corners tell of turns, mirrors and frames.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hetjax.data import Pictures
from hetjax.data.conversations import SampleError

Colour = tuple[int, int, int]
Save = Callable[[Path], Any]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
GREYS = tuple((g, g, g) for g in (0, 85, 170, 255))
COLOURS = (RED, GREEN, BLUE, WHITE)  # top left, top right, bottom left, bottom right
UPRIGHT = (BLUE, RED, WHITE, GREEN)  # turned clockwise by a quarter


def quadrants(width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    """Four colours, or four greys."""
    colours = COLOURS if mode == "RGB" else [g[0] for g in GREYS]
    corners = np.array(colours, np.uint8).reshape(2, 2, *([3] if mode == "RGB" else []))
    return Image.fromarray(corners).resize((width, height), Image.Resampling.NEAREST)


def saved(image: Image.Image, **options: Any) -> Save:
    return lambda path: image.save(path, **options)


def large(width: int, height: int, orientation: int = 1) -> Save:
    return lambda path: quadrants(width, height, "L").save(path, exif=exif(orientation))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def with_alpha(mode: str, alpha: int) -> Image.Image:
    image = quadrants() if mode == "RGBA" else quadrants(mode="L")
    image.putalpha(alpha)
    return image


def palette(**options: Any) -> Save:
    half = np.arange(32, dtype=np.uint8) // 16
    image = Image.fromarray(2 * half[:, None] + half)
    image.putpalette([*RED, *GREEN, *BLUE, *WHITE])
    return saved(image, **options)


def animated(**options: Any) -> Save:
    return saved(quadrants(), save_all=True, append_images=[Image.new("RGB", (32, 32), "black")] * 2, **options)


def written(content: bytes | str) -> Save:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def cut_short(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])


def claims(width: int, height: int) -> Save:
    """A JPEG whose header tells of a larger picture than it holds."""

    def save(path: Path) -> None:
        quadrants().save(path)
        content = bytearray(path.read_bytes())
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
        path.write_bytes(content)

    return save


def png(header: bytes, rows: bytes, *more: tuple[bytes, bytes]) -> Save:
    """A PNG of the chunks given, for what Pillow does not write."""
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return written(b"\x89PNG\r\n\x1a\n" + body)


def deep_rows() -> bytes:
    """The quadrants with 16 bits a channel; the lower ones differ."""
    pixels = (np.asarray(quadrants(), np.uint16) * 256 + 77).astype(">u2")
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def folder(path: Path) -> None:
    path.mkdir()


RGB_HEADER = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
RGB_ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(quadrants()))
SEEN: dict[str, tuple[Save, tuple[Colour, ...]]] = {
    "81 megapixels.jpg": (large(9000, 9000), GREYS),
    "108 megapixels.jpg": (large(12000, 9000), GREYS),
    "200 megapixels, on its side.jpg": (large(16320, 12240, 6), tuple(GREYS[i] for i in (2, 0, 3, 1))),
    "95 megapixels.png": (saved(quadrants(10000, 9500, "L"), compress_level=1), GREYS),
    "progressive.jpg": (saved(quadrants(), quality=95, progressive=True, subsampling=0), COLOURS),
    "on its side.jpg": (saved(quadrants(), exif=exif(6), quality=95, subsampling=0), UPRIGHT),
    "mirrored.png": (saved(quadrants(), exif=exif(2)), (GREEN, RED, WHITE, BLUE)),
    "upside down.webp": (saved(quadrants(), exif=exif(3), lossless=True), (WHITE, BLUE, GREEN, RED)),
    "an orientation that there is not.jpg": (
        saved(quadrants(), exif=exif(9), quality=95, subsampling=0),
        COLOURS,
    ),
    "broken EXIF.jpg": (saved(quadrants(), exif=b"Exif\0\0garbage!", quality=95, subsampling=0), COLOURS),
    "one pixel wide.png": (saved(quadrants(1, 400)), (GREEN, GREEN, WHITE, WHITE)),
    "one pixel.png": (saved(Image.new("RGB", (1, 1), RED)), (RED,) * 4),
    "a line.png": (saved(quadrants(3000, 2)), COLOURS),
    "animated.gif": (animated(), COLOURS),
    "animated.webp": (animated(lossless=True), COLOURS),
    "animated.png": (animated(), COLOURS),
    "two views.mpo": (animated(quality=95, subsampling=0), COLOURS),
    "palette, one colour transparent.gif": (palette(transparency=1), (RED, WHITE, BLUE, WHITE)),
    "palette, one colour transparent.png": (palette(transparency=1), (RED, WHITE, BLUE, WHITE)),
    "palette, alpha of each colour.png": (palette(transparency=bytes([0, 9, 99, 255])), COLOURS),
    "one colour transparent.png": (
        png(RGB_HEADER, RGB_ROWS, (b"tRNS", struct.pack(">HHH", *BLUE))),
        (RED, GREEN, WHITE, WHITE),
    ),
    "transparent all over.png": (saved(with_alpha("RGBA", 0)), COLOURS),
    "grey and alpha.png": (saved(with_alpha("LA", 100)), GREYS),
    "16 bits a channel.png": (
        png(struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0), deep_rows()),
        COLOURS,
    ),
    "two colours.png": (
        saved(quadrants(mode="L").point([0] * 128 + [255] * 128).convert("1")),
        (BLACK, BLACK, WHITE, WHITE),
    ),
    "for print.tif": (saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0))), (RED,) * 4),
    "for print.jpg": (saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), quality=95), (RED,) * 4),
    "a png.jpg": (saved(quadrants(), format="PNG"), COLOURS),
    "no extension": (saved(quadrants(), format="BMP"), COLOURS),
    "names 50% (1) [x] 'é' 🙂\n#.png": (saved(quadrants(), format="PNG"), COLOURS),
    "new.avif": (saved(quadrants(), quality=100, subsampling="4:4:4"), COLOURS),
    "pages.tif": (animated(compression="tiff_lzw"), COLOURS),
}  # fmt: skip
REFUSED: dict[str, tuple[Save, str]] = {
    "empty.jpg": (written(b""), "it is empty"),
    "page.jpg": (written("<html>404</html>"), "cannot identify"),
    "drawing.svg": (written("<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot identify"),
    "phone.heic": (written(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)), "cannot identify"),
    "cut short.jpg": (cut_short, "truncated"),
    "cut short.png": (cut_short, "truncated"),
    "grey of 16 bits.png": (saved(Image.new("I;16", (8, 8), 60000)), "its mode I;16 has more than 8 bits"),
    "depth.tif": (saved(Image.new("F", (8, 8), 0.5)), "its mode F has more than 8 bits"),
    "claims 4 gigapixels.jpg": (claims(65000, 65000), "it is 65000 x 65000 pixels"),
    "claims 400 megapixels.jpg": (claims(20000, 20000), "it is 20000 x 20000 pixels"),
    "claims 400 megapixels.png": (
        png(struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0), b"\0"),
        "it is 20000 x 20000 pixels",
    ),
    "a folder.png": (folder, "directory"),
    "a name with\0.png": (lambda path: None, "null"),
}


def corners(reader: Pictures, path: Path) -> np.ndarray:
    """[4, 3]: the colours in the middle of the four quadrants that the reader makes."""
    pixels = reader.to_rgb(reader.read(path)).astype(int)
    assert pixels.shape == (8, 8, 3)
    return pixels[[1, 1, 6, 6], [1, 6, 1, 6]]


@pytest.mark.parametrize("name", list(SEEN))
def test_it_is_seen_as_transformers_sees_it(name: str, tmp_path: Path) -> None:
    save, colours = SEEN[name]
    save(tmp_path / name)
    np.testing.assert_allclose(corners(Pictures(8, 8), tmp_path / name), colours, atol=12)


@pytest.mark.parametrize("name", list(REFUSED))
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    save, reason = REFUSED[name]
    save(tmp_path / name)
    with pytest.raises(SampleError, match=reason) as caught:
        Pictures(8, 8).read(tmp_path / name)
    assert "\n" not in caught.value.reason and len(caught.value.reason) < 200 + len(str(tmp_path))


def test_a_wide_picture_is_padded_to_a_square_with_the_mean_colour(tmp_path: Path) -> None:
    quadrants(32, 16).save(tmp_path / "a.png")
    reader = Pictures(16, 16, mean=(0.2, 0.4, 0.6), pad_to_square=True)
    pixels = reader.to_rgb(reader.read(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels[[0, 15]], np.broadcast_to((51, 102, 153), (2, 16, 3)))
    np.testing.assert_array_equal(pixels[[6, 6, 9, 9], [3, 12, 3, 12]], COLOURS)


@pytest.mark.parametrize(
    ("size", "message"), [((40000, 2), "40000 x 40000"), ((3, 30000), "30000 x 30000")], ids=["wide", "tall"]
)
def test_a_square_that_would_not_fit_into_memory_is_refused(
    size: tuple[int, int], message: str, tmp_path: Path
) -> None:
    quadrants(*size).save(tmp_path / "a.png")
    with pytest.raises(SampleError, match=message):
        Pictures(8, 8, pad_to_square=True).read(tmp_path / "a.png")


def test_a_middle_of_a_line_that_would_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    quadrants(60000, 2).save(tmp_path / "a.png")
    with pytest.raises(SampleError, match="become 336 x 10080000, which are more than"):
        Pictures(336, 336, shortest_edge=336).read(tmp_path / "a.png")
