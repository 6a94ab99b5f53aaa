"""Opens a picture file as transformers does: upright, in RGB, and to the bit while it has at most LARGE pixels.

A larger JPEG, as phones make them, is decoded at a half, a quarter or an eighth of its sides where that leaves GAP of
its pixels for each that the model sees: the resizing that follows has the last word, and its result is that of the
whole picture but for a few of 255 steps at sharp edges. Other formats are decoded whole.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

LARGE = 2**26  # pixels
MAX_PIXELS = 2**27  # that are decoded: about 1 GB for a moment, with the copy that is turned or converted
MAX_REDUCED = 2**28  # of a file that is decoded at a reduced size
GAP = 3
ANIMATED = ("GIF", "PNG", "TIFF", "WEBP")  # and not a telephone's JPEG, which carries a preview
ON_ITS_SIDE, RIGHT_FIRST, BOTTOM_FIRST = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)  # EXIF's orientations

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom

_OPENING = threading.Lock()
_DECODING = threading.Lock()  # one large picture at a time, else each worker would take the memory of one


class Photo(NamedTuple):
    """A picture, whole or at a reduced size."""

    image: Image.Image  # upright, RGB
    size: Size  # of the whole picture
    box: Box  # where it lies in `image`, which is rounded up to whole pixels

    def resized(self, size: Size, method: Image.Resampling) -> Image.Image:
        """The picture in another size."""
        return self.image.resize(size, method, box=self.box)


class Opened(NamedTuple):
    """A picture of which the header is read and accepted."""

    image: Image.Image
    size: Size
    reduction: int  # by which its sides are divided when it is decoded


def look(path: Path, surplus: Callable[[Size], float]) -> bool:
    """Whether frames follow the first, as the header tells. `surplus` and raises as `read`."""
    with _opened(path, surplus) as (image, _, _):
        return image.format in ANIMATED and _has_several(image)


def read(path: Path, surplus: Callable[[Size], float]) -> Photo:
    """The picture in a file. `surplus`: pixels on a side of a picture of that size for one that the model sees.

    Raises what Pillow raises for broken bytes, and ValueError for what it would change in silence or is too large.
    """
    with _opened(path, surplus) as (image, size, reduction):
        if math.prod(size) <= LARGE:
            return _whole(image)
        with _DECODING:
            return _whole(image) if reduction == 1 else _reduced(image, size, reduction)


@contextlib.contextmanager
def _opened(path: Path, surplus: Callable[[Size], float]) -> Iterator[Opened]:
    with path.open("rb") as file, _open(file) as image:
        if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8, and give a white picture
            raise ValueError(f"its mode {image.mode} has more than 8 bits a channel; convert it to 8")
        size = image.size
        reduction = _reduce(image, surplus(size)) if math.prod(size) > LARGE else 1
        limit = MAX_PIXELS if reduction == 1 else MAX_REDUCED
        if math.prod(size) > limit:
            more = "" if reduction > 1 else f", or a JPEG, of which up to {MAX_REDUCED} are read at a reduced size"
            raise ValueError(f"it is {size[0]} x {size[1]} pixels, more than {limit}; make it smaller{more}")
        yield Opened(image, size, reduction)


def _has_several(image: Image.Image) -> bool:
    """Whether there are frames behind the first; what is broken behind it does no harm."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _open(file: BinaryIO) -> Image.Image:
    """The picture before it is decoded, without the limit of Pillow, which is one for the process."""
    if not file.peek(1):  # type: ignore[attr-defined]  # fills the buffer, so that nobody waits for a slow disk below
        raise ValueError("it is empty")
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        except UnidentifiedImageError as error:  # whose text is about the open file
            raise ValueError("cannot identify its format, which is none that Pillow reads") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reduce(image: Image.Image, surplus: float) -> int:
    """By how much the sides are divided when the picture, which is told so, is decoded."""
    width, height = image.size
    wanted = next((n for n in (8, 4, 2) if n * GAP <= surplus), 1)
    if wanted == 1 or image.draft(None, (width // wanted, height // wanted)) is None:
        return 1
    return wanted


def _whole(image: Image.Image) -> Photo:
    ImageOps.exif_transpose(image, in_place=True)
    rgb = _rgb(image)
    return Photo(rgb, rgb.size, (0, 0, *rgb.size))


def _reduced(image: Image.Image, size: Size, reduction: int) -> Photo:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    ImageOps.exif_transpose(image, in_place=True)
    upright = size[::-1] if orientation in ON_ITS_SIDE else size
    width, height = (n / reduction for n in upright)
    left = image.width - width if orientation in RIGHT_FIRST else 0.0
    top = image.height - height if orientation in BOTTOM_FIRST else 0.0
    return Photo(_rgb(image), upright, (left, top, left + width, top + height))


def _rgb(image: Image.Image) -> Image.Image:
    """The colours, those of alpha 0 too; but white for the one that GIF and PNG name as transparent.

    So do transformers' `load_image` and, behind it, the `convert_to_rgb` of its processors."""
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB warns; the colours are the same
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb.info.get("transparency") is None:
        return rgb
    white = Image.new("RGBA", rgb.size, "white")
    return Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")


def padded(photo: Photo, colour: tuple[int, int, int]) -> Photo:
    """The picture in the middle of a square, as LLaVA-1.5 was trained. Raises ValueError if that is too large."""
    side = max(photo.size)
    reduction = side / max(photo.box[2] - photo.box[0], photo.box[3] - photo.box[1])
    if math.ceil(side / reduction) ** 2 > MAX_PIXELS:
        raise ValueError(
            f"padded to a square it is {side} x {side} pixels, which are more than {MAX_PIXELS}; cut it into pieces"
        )
    margins = [(side - n) // 2 / reduction for n in photo.size]
    place = [math.ceil(margin - start) for margin, start in zip(margins, photo.box, strict=False)]
    left, top = (p + start - margin for p, start, margin in zip(place, photo.box, margins, strict=False))
    right, bottom = left + side / reduction, top + side / reduction
    square = Image.new("RGB", (math.ceil(right), math.ceil(bottom)), colour)
    square.paste(photo.image, (place[0], place[1]), None if reduction == 1 else _share(photo))
    return Photo(square, (side, side), (left, top, right, bottom))


def _share(photo: Photo) -> Image.Image:
    """How much of each pixel is the picture's, in 255ths, where the shorter side begins and ends."""
    axis = int(photo.size[0] > photo.size[1])
    start, end = photo.box[axis], photo.box[axis + 2]
    pixels = np.arange(photo.image.size[axis])
    share = np.clip(np.minimum(pixels + 1, end) - np.maximum(pixels, start), 0, 1)
    line = np.rint(255 * share).astype(np.uint8)
    return Image.fromarray(line[:, None] if axis else line[None]).resize(photo.image.size)
