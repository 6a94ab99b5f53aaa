"""Tux Paint's stamps (GPL-2+, the Debian package `tuxpaint-stamps-default`) as LLaVA JSON: pictures with a sentence in
English, and the sentence spoken in up to eight languages.

    captions.train.json  captions.test.json     <image>\\nWhat is this?                   A frog.
    spoken.train.json    spoken.test.json       <audio>\\nWhich language is spoken?       French
    both.train.json      both.test.json         <image>\\n<audio>\\nWhat is this?          In Greek: A frog.

Stamps are held out by their sentence: a sentence of the test files is in no training file, in any language. Training
pictures come mirrored too, where the stamp allows that. Stamps drawn in SVG are left out, which Pillow does not read.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from hetjax.assets import fetch
from hetjax.data.settings import DataError
from hetjax.hf.output import written

PACKAGE = "tuxpaint-stamps-default"
INSIDE = "usr/share/tuxpaint/stamps"
SIZE = 128  # pixels of a side
TEST_SHARE = 0.15  # of the sentences
SPLITS = ("train", "test")
MIRRORED = ".mirrored"
LANGUAGES = {
    "be": "Belarusian", "bg": "Bulgarian", "ca": "Catalan", "el": "Greek", "es": "Spanish", "fr": "French",
    "ro": "Romanian", "ru": "Russian",
}  # fmt: skip
SEEN, HEARD, BOTH = "<image>\nWhat is this?", "<audio>\nWhich language is spoken?", "<image>\n<audio>\nWhat is this?"

Samples = dict[str, list[dict[str, Any]]]


class Stamp(NamedTuple):
    """One stamp: its name, its sentence, and its files without their endings."""

    name: str
    sentence: str
    path: Path

    @property
    def split(self) -> str:
        """The side of the split that its sentence is on."""
        digest = hashlib.sha256(self.sentence.lower().encode()).digest()
        return "test" if int.from_bytes(digest[:4]) < TEST_SHARE * 2**32 else "train"

    @property
    def mirrors(self) -> bool:
        """Whether its mirror image shows the same."""
        settings = self.path.with_suffix(".dat")
        return not (settings.is_file() and "nomirror" in settings.read_text("utf-8", "replace"))


def prepare(out: str | Path, stamps: str | Path | None = None) -> Path:
    """`out` with the JSON files, pictures/ and clips/. Does nothing where it is there; it arrives by rename.

    `stamps`: a directory of stamps to read in place of the package's. Raises DataError."""
    target = Path(out)
    if (target / "captions.train.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        source = fetch.debian(PACKAGE, Path(scratch)) / INSIDE if stamps is None else Path(stamps)
        found = list(find(source))
        if not found:
            raise DataError(f"{source} holds no stamp: no name.txt with a sentence in English beside a name.png")
        with written(target) as new:
            captions, spoken = _captions(found, new), _spoken(found, new)
            both = _both(captions, spoken)
            for name, samples in {"both": both, "spoken": spoken, "captions": captions}.items():
                for split in SPLITS:
                    text = json.dumps(samples[split], ensure_ascii=False, indent=1)
                    (new / f"{name}.{split}.json").write_text(text, encoding="utf-8")
    return target


def find(source: Path) -> Iterator[Stamp]:
    """The stamps with a picture, in the order of their names."""
    for text in sorted(source.rglob("*.txt")):
        sentence = text.read_text("utf-8", "replace").partition("\n")[0].strip()
        if sentence and text.with_suffix(".png").is_file():
            path = text.with_suffix("")
            yield Stamp("_".join(path.relative_to(source).parts), sentence, path)


def _captions(stamps: list[Stamp], out: Path) -> Samples:
    """Writes the pictures: on white, square, one size."""
    (out / "pictures").mkdir(parents=True)
    samples: Samples = {split: [] for split in SPLITS}
    for stamp in stamps:
        picture = _on_white(stamp.path.with_suffix(".png"))
        sides = {"": picture}
        if stamp.split == "train" and stamp.mirrors:
            sides[MIRRORED] = ImageOps.mirror(picture)
        for side, image in sides.items():
            name = f"pictures/{stamp.name}{side}.png"
            image.save(out / name)
            samples[stamp.split].append(_sample(stamp.name + side, SEEN, stamp.sentence, image=name))
    return samples


def _on_white(path: Path) -> Image.Image:
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    return ImageOps.pad(Image.alpha_composite(white, drawn).convert("RGB"), (SIZE, SIZE), color="white")


def _spoken(stamps: list[Stamp], out: Path) -> Samples:
    """Copies the clips of the languages that most stamps are spoken in."""
    (out / "clips").mkdir()
    samples: Samples = {split: [] for split in SPLITS}
    for stamp in stamps:
        for code, language in LANGUAGES.items():
            clip = stamp.path.with_name(f"{stamp.path.name}_desc_{code}.ogg")
            if clip.is_file():
                name = f"clips/{stamp.name}_{code}.ogg"
                shutil.copyfile(clip, out / name)
                samples[stamp.split].append(_sample(f"{stamp.name}_{code}", HEARD, language, audio=name))
    return samples


def _both(captions: Samples, spoken: Samples) -> Samples:
    """Each picture with a clip of its stamp; stamps, and their mirror images, go through the languages in turn."""
    samples: Samples = {split: [] for split in SPLITS}
    for split in SPLITS:
        clips: dict[str, list[dict[str, Any]]] = {}
        for clip in spoken[split]:
            clips.setdefault(clip["id"].rpartition("_")[0], []).append(clip)
        for number, seen in enumerate(captions[split]):
            mine = clips.get(seen["id"].removesuffix(MIRRORED), [])
            if mine:
                heard = mine[number % len(mine)]
                answer = f"In {_answer(heard)}: {_answer(seen)}"
                samples[split].append(_sample(seen["id"], BOTH, answer, image=seen["image"], audio=heard["audio"]))
    return samples


def _answer(sample: dict[str, Any]) -> str:
    return sample["conversations"][1]["value"]


def _sample(name: str, question: str, answer: str, **files: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **files, "conversations": turns}
