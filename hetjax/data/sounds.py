"""Reads clips into log-mel features, or says why it cannot: the values of Whisper's own feature extractor.

A clip is one channel at 16 kHz. Frame t is centred on sample 160 t; the context behind the clip is silence, of which
only the frames that touch the clip are computed.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import soundfile

from hetjax.data.items import Abstract, Header, Values
from hetjax.data.problems import SampleError

RATE = 16000  # samples a second
HOP, WINDOW = 160, 400  # samples
WHOLE = 30 * RATE  # samples of Whisper's context, at whose end the signal is mirrored
FLOOR = 1e-10  # of a bin's energy
RANGE = 8.0  # decades below the loudest bin that are kept
SILENCE = -1.5  # value of a bin where the whole clip is silent
ON_LONG = ("truncate", "skip")
CUT = re.compile(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", re.M)  # libsndfile's log of a .wav or .aiff: bytes
UNKNOWN_LENGTH = 0x7FFFF000  # bytes; what programs that write to a pipe promise is this or more


@dataclasses.dataclass(frozen=True)
class Sounds:
    """Clips of speech or any other sound, each with as many rows as its length asks for."""

    num_mels: int  # bins of a frame
    frames: int  # of the microbatch's array, 10 ms each
    max_frames: int  # of a clip
    rows_of: Callable[[int], int]  # rows of a clip of so many frames
    on_long: str = "truncate"  # a clip of more than max_frames: truncate or skip
    noun: ClassVar[str] = "clip"
    rate: ClassVar[str] = "clips_per_second"

    def __post_init__(self) -> None:
        if self.on_long not in ON_LONG:
            raise ValueError(f"on_long_clip={self.on_long!r}; it must be one of {', '.join(ON_LONG)}")
        if self.max_frames > WHOLE // HOP:
            raise ValueError(
                f"a context of {self.max_frames} frames; clips are read up to Whisper's 30 s, which are "
                f"{WHOLE // HOP}: set the model's max_frames to at most that"
            )

    @property
    def arrays(self) -> Mapping[str, Abstract]:
        """mel: float32 [frames, num_mels]. frames: int32, how many of them are the clip's own."""
        return {"mel": ((self.frames, self.num_mels), np.dtype(np.float32)), "frames": ((), np.dtype(np.int32))}

    @property
    def blank(self) -> Mapping[str, float]:
        """A silent clip of the same length."""
        return {"mel": SILENCE}

    def look(self, path: Path) -> Header:
        """The rows of a clip, by the length and rate in its header. Raises SampleError with the path and the reason."""
        with _open(path) as file:
            length = _length(file)
        most = self.max_frames * HOP
        if length > most and self.on_long == "skip":
            why = f"it is longer than {most / RATE:g} s and on_long_clip='skip'; raise max_frames or cut it"
            raise SampleError(str(path), why)
        own = -(-min(length, most) // HOP)
        rows = self.rows_of(own)
        if rows < 1 or not own:
            raise SampleError(str(path), f"it has {length} samples at {RATE} Hz, too few for one row")
        cut = f"its clip {path} of {length / RATE:.1f} s is cut at {most / RATE:g} s" if length > most else ""
        return Header(rows, cut)

    def read(self, path: Path) -> Values:
        """The features of a clip. Raises SampleError with the path and the reason."""
        samples = read_samples(path, self.max_frames * HOP)
        own = np.asarray(-(-len(samples) // HOP), np.int32)
        return {"mel": log_mel(samples, self.num_mels, self.frames), "frames": own}

    def to_rgb(self, values: Values) -> np.ndarray:
        """uint8 [num_mels, frames, 3]: the clip's own frames as a spectrogram, low sounds below."""
        mel = values["mel"][: max(1, int(values["frames"]))].T[::-1]
        low, high = mel.min(), mel.max()
        grey = np.rint((mel - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)


def read_samples(path: Path, count: int) -> np.ndarray:
    """The first `count` samples of a file that libsndfile reads (wav, flac, ogg, mp3, ...), float32, channels averaged.

    They are as many as its header promises, with silence for a few that lack. Raises SampleError with the path and the
    reason.
    """
    with _open(path) as file:
        length, rate = min(_length(file), count), file.samplerate
        # one sample more, for a header that says too little; resampling looks a little further
        wanted = (count + 1) * rate // RATE + rate // 10
        found = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
        if len(found) < 0.95 * min(wanted, file.frames):
            raise ValueError(f"it ends after {len(found)} samples of {file.frames}")
        if not np.isfinite(found).all():
            raise ValueError("some of its samples are not finite")
    if rate != RATE:
        from scipy.signal import resample_poly  # here: slow to import, and most data are at 16 kHz

        common = np.gcd(rate, RATE)
        found = resample_poly(found, RATE // common, rate // common).astype(np.float32)
    found = found[:length]
    return np.pad(found, (0, length - len(found)))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    """The clip, of which the header is read. What goes wrong with it becomes a SampleError."""
    if not os.path.isfile(path):  # `Path.is_file` raises for long names
        raise SampleError(str(path), "there is no such file")
    try:
        with soundfile.SoundFile(path) as file:
            cut = CUT.search(file.extra_info)
            if cut and int(cut[1]) < UNKNOWN_LENGTH:
                raise ValueError(f"it ends after {cut[2]} bytes of sound of {cut[1]}")
            yield file
    except Exception as error:  # libsndfile's errors, and what broken headers make of the sizes
        raise SampleError(str(path), f"cannot be read as a sound: {error}") from error


def _length(file: soundfile.SoundFile) -> int:
    """Samples at `RATE` that the header promises: what `resample_poly` makes of them."""
    return -(-file.frames * RATE // file.samplerate)


def log_mel(samples: np.ndarray, num_mels: int, frames: int) -> np.ndarray:
    """float32 [frames, num_mels]: the first frames of the features of `samples` [at most 30 s] and silence behind.

    log10 of the mel bins' energies, cut off 8 below the loudest, plus 4, over 4 (arXiv:2212.04356, section 2.2).
    """
    padded = np.pad(samples.astype(np.float64), (0, min(WINDOW, WHOLE - len(samples))))
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: WHOLE // HOP]
    spectrum = np.fft.rfft(windows * np.hanning(WINDOW + 1)[:-1])
    energy = (spectrum.real**2 + spectrum.imag**2) @ filters(num_mels)
    found = np.log10(np.maximum(energy, FLOOR))
    lowest = max(found.max() - RANGE, np.log10(FLOOR))
    result = np.full((frames, num_mels), (lowest + 4) / 4, np.float32)
    count = min(frames, len(found))
    result[:count] = (np.maximum(found[:count], lowest) + 4) / 4
    return result


@functools.cache
def filters(num_mels: int) -> np.ndarray:
    """[201, num_mels]: triangles of equal area over the frequencies, evenly spaced on Slaney's mel scale up to 8 kHz.

    Malcolm Slaney, Auditory Toolbox (1998): linear below 1 kHz, logarithmic above.
    """
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, num_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
