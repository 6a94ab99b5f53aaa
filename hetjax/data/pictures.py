"""Reads pictures into normalised pixels, or says why it cannot.

Pixels are those of transformers' SiglipImageProcessor (resized to a square), CLIPImageProcessor (the shorter side
resized, the middle cut out) and LlavaImageProcessor (padded to a square before) behind its `load_image`, bit for bit:
the same steps in the same order and precision.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from hetjax.data import photos
from hetjax.data.items import Abstract, Header, Values
from hetjax.data.photos import Photo
from hetjax.data.problems import SampleError

METHODS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures of one size, each with all rows of its encoder."""

    height: int  # pixels
    width: int  # pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in 0..1, taken off
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # then divided by
    shortest_edge: int | None = None  # pixels of the shorter side when the middle is cut out; None: nothing is cut off
    pad_to_square: bool = False  # with the mean colour, before all else
    resampling: str = "bicubic"  # or bilinear
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
        if self.resampling not in METHODS:
            raise ValueError(f"resampling={self.resampling!r}; it must be one of {', '.join(METHODS)}")
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
        with _explained(path):
            several = photos.look(path, self._surplus)
        return Header(cut=f"its picture {path} has several frames, of which the first is taken" if several else "")

    def read(self, path: Path) -> Values:
        """The pixels: upright, RGB without transparency, padded if asked, resized, in 0..1, less the mean, by std.

        Raises SampleError with the path and the reason.
        """
        with _explained(path):
            rgb = self._fitted(photos.read(path, self._surplus))
        pixels = (np.asarray(rgb, np.float64) * (1 / 255)).astype(np.float32)
        return {"pixels": (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)}

    def _surplus(self, size: photos.Size) -> float:
        """Pixels on a side of a picture of this size for one that the model sees."""
        length = max(size) if self.pad_to_square else min(size)
        return length / (self.shortest_edge or max(self.height, self.width))

    def _fitted(self, photo: Photo) -> Image.Image:
        """The picture, or its middle, in height x width; black where the resized one is smaller than that."""
        method = METHODS[self.resampling]
        if self.pad_to_square:
            red, green, blue = (int(255 * m) for m in self.mean)
            photo = photos.padded(photo, (red, green, blue))
        if self.shortest_edge is None:
            return photo.resized((self.width, self.height), method)
        longest_edge = int(self.shortest_edge * max(photo.size) / min(photo.size))
        if self.shortest_edge * longest_edge > photos.MAX_PIXELS:
            width, height = photo.size
            resized = f"{self.shortest_edge} x {longest_edge}"
            raise ValueError(f"{width} x {height} pixels become {resized}, which are more than {photos.MAX_PIXELS}")
        upright = photo.size[0] <= photo.size[1]
        size = (self.shortest_edge, longest_edge) if upright else (longest_edge, self.shortest_edge)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        box = (left, top, left + self.width, top + self.height)
        return photo.resized(size, method).crop(box)

    def to_rgb(self, values: Values) -> np.ndarray:
        """uint8 [height, width, 3], as the encoder's picture looks."""
        colours = values["pixels"] * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What goes wrong with a picture becomes a SampleError."""
    try:
        yield
    except FileNotFoundError as error:
        raise SampleError(str(path), "there is no such file") from error
    except Exception as error:  # decoders meet broken bytes with OSError, SyntaxError, ValueError, struct.error...
        reason = str(error) or type(error).__name__
        raise SampleError(str(path), f"cannot be read as a picture: {reason}") from error
