"""Reads one picture into normalised pixels, or says why it cannot."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from hetjax.data.conversations import SampleError
from hetjax.data.settings import ItemSpec

MAX_PIXELS = 2**26  # 200 MB decoded, per worker; a file of a few kB can claim more


def read(path: Path, item: ItemSpec) -> np.ndarray:
    """float32 [height, width, 3]: RGB, resized (bicubic), in 0..1, less the mean, divided by std.

    Raises SampleError with the path and the reason.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it is {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            colours: Image.Image = image
            if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8, and give a white picture
                raise ValueError(f"its mode {image.mode} has more than 8 bits a channel; convert it to 8")
            if "transparency" in image.info:
                colours = image.convert("RGBA")  # straight to RGB warns; the colours are the same
            rgb = colours.convert("RGB").resize((item.width, item.height), Image.Resampling.BICUBIC)
    except FileNotFoundError as error:
        raise SampleError(str(path), "there is no such file") from error
    except Exception as error:  # decoders meet broken bytes with OSError, SyntaxError, ValueError, struct.error, ...
        raise SampleError(str(path), f"cannot be read as a picture: {error}") from error
    pixels = np.asarray(rgb, np.float32) / np.float32(255)
    return (pixels - np.asarray(item.mean, np.float32)) / np.asarray(item.std, np.float32)


def blank(microbatch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The microbatch with every picture in the mean colour of its normalisation: what is left is what the text says."""
    return {k: np.zeros_like(v) if k.endswith(".pixels") else v for k, v in microbatch.items()}


def to_rgb(pixels: np.ndarray, item: ItemSpec) -> np.ndarray:
    """uint8 [height, width, 3], as the encoder's picture looks."""
    colours = pixels * np.asarray(item.std, np.float32) + np.asarray(item.mean, np.float32)
    return np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8)
