"""Reads pictures into normalised pixels, or says why it cannot.

Pixels are those of transformers' SiglipImageProcessor (resized to a square) and CLIPImageProcessor (the shorter side
resized, the middle cut out) behind its `load_image`, bit for bit: the same steps in the same order and precision.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from hetjax.data.items import Abstract, Header, Values
from hetjax.data.problems import SampleError

MAX_PIXELS = 2**26  # 200 MB decoded, per worker; a file of a few kB can claim more

ANIMATED = ("GIF", "PNG", "TIFF", "WEBP")  # and not a telephone's JPEG, which carries a preview


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures of one size, each with all rows of its encoder."""

    height: int  # pixels
    width: int  # pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in 0..1, taken off
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # then divided by
    shortest_edge: int | None = None  # pixels of the shorter side when the middle is cut out; None: nothing is cut off
    noun: ClassVar[str] = "picture"
    rate: ClassVar[str] = "images_per_second"

    def __post_init__(self) -> None:
        for name in ("height", "width", "shortest_edge"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}={getattr(self, name)}; give one number for each of R, G, B")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}; pixels are divided by it, so each must be above 0")

    @property
    def arrays(self) -> Mapping[str, Abstract]:
        """pixels: float32 [height, width, 3]."""
        return {"pixels": ((self.height, self.width, 3), np.dtype(np.float32))}

    @property
    def blank(self) -> Mapping[str, float]:
        """The mean colour of the normalisation."""
        return {"pixels": 0.0}

    def look(self, path: Path) -> Header:
        """A picture's size and mode are in its header. Raises SampleError with the path and the reason."""
        with self._open(path) as image:
            several = image.format in ANIMATED and _has_several(image)
        return Header(cut=f"its picture {path} has several frames, of which the first is taken" if several else "")

    def read(self, path: Path) -> Values:
        """The pixels: upright, RGB without transparency, resized (bicubic), in 0..1, less the mean, divided by std.

        Raises SampleError with the path and the reason.
        """
        with self._open(path) as image:
            colours: Image.Image = image
            if "transparency" in image.info:
                colours = image.convert("RGBA")  # straight to RGB warns; the colours are the same
            rgb = self._fitted(ImageOps.exif_transpose(colours).convert("RGB"))
        pixels = (np.asarray(rgb, np.float64) * (1 / 255)).astype(np.float32)
        return {"pixels": (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)}

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Image.Image]:
        """The picture, of which the header is read. What goes wrong with it becomes a SampleError."""
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it is {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
                if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8, and give a white picture
                    raise ValueError(f"its mode {image.mode} has more than 8 bits a channel; convert it to 8")
                self._check_fits(image)
                yield image
        except FileNotFoundError as error:
            raise SampleError(str(path), "there is no such file") from error
        except Exception as error:  # decoders meet broken bytes with OSError, SyntaxError, ValueError, struct.error...
            raise SampleError(str(path), f"cannot be read as a picture: {error}") from error

    def _check_fits(self, image: Image.Image) -> None:
        """Raises ValueError for a picture that is so long that it grows beyond all bounds."""
        if self.shortest_edge is None:
            return
        longest_edge = self._longest_edge(image)
        if self.shortest_edge * longest_edge > MAX_PIXELS:
            resized = f"{self.shortest_edge} x {longest_edge}"
            raise ValueError(
                f"{image.width} x {image.height} pixels become {resized}, which are more than {MAX_PIXELS}"
            )

    def _longest_edge(self, image: Image.Image) -> int:
        """Pixels of the longer side when the shorter has `shortest_edge`."""
        assert self.shortest_edge is not None
        return int(self.shortest_edge * max(image.size) / min(image.size))

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The picture, or its middle, in height x width; black where the resized one is smaller than that."""
        if self.shortest_edge is None:
            return image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        longest_edge = self._longest_edge(image)
        upright = image.width <= image.height
        size = (self.shortest_edge, longest_edge) if upright else (longest_edge, self.shortest_edge)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        box = (left, top, left + self.width, top + self.height)
        return image.resize(size, Image.Resampling.BICUBIC).crop(box)

    def to_rgb(self, values: Values) -> np.ndarray:
        """uint8 [height, width, 3], as the encoder's picture looks."""
        colours = values["pixels"] * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8)


def _has_several(image: Image.Image) -> bool:
    """Whether there are frames behind the first; what is broken behind it does no harm."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False
