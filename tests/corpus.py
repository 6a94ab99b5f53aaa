"""Data sets for tests: every picture and every text says which sample it belongs to, and `check` reads it.

Sample n asks "q{n}" and answers "a{n}", once per turn; its picture k is one colour: (n // 256, n % 256, 10 + 40 k).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hetjax.data import DataConfig, ItemSpec, Pictures

WORDS = ("<pad>", "<unk>", "<end>", "is", "so", ",")
VISION = ItemSpec("vision", 4, Pictures(height=6, width=5), slots_per_group=4)
CHART = ItemSpec("chart", 2, Pictures(height=3, width=3), slots_per_group=3, field="plots", placeholder="<plot>")
BOTH = (VISION, CHART)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One sample: pictures per turn for each item, and words that make it longer."""

    pictures: Mapping[str, tuple[int, ...]]  # item name -> count in each turn
    turns: int = 1
    words: int = 0
    broken: bool = False  # its last picture is no picture


def write(directory: Path, specs: Sequence[Spec], items: Sequence[ItemSpec] = BOTH) -> str:
    """The path of a .json file with these samples; pictures and tokenizer.json lie beside it."""
    entries = []
    for n, spec in enumerate(specs):
        entry: dict[str, object] = {"id": f"id-{n}"}
        turns = []
        for turn in range(spec.turns):
            shown = [item for item in items if item.name in spec.pictures]
            marks = "".join(item.placeholder * spec.pictures[item.name][turn] for item in shown)
            turns.append({"from": "human", "value": f"{marks}\n{'so ' * spec.words}q{n}"})
            turns.append({"from": "gpt", "value": f"a{n}"})
        entry["conversations"] = turns
        for item in items:
            names = [f"{item.name}-{n}-{k}.png" for k in range(sum(spec.pictures.get(item.name, ())))]
            for k, name in enumerate(names):
                Image.new("RGB", (8, 8), colour(n, k)).save(directory / name)
            if names and spec.broken:
                (directory / names[-1]).write_bytes(b"not a picture")
            if names:
                entry[item.field] = names[0] if len(names) == 1 else names
        entries.append(entry)
    write_tokenizer(directory, len(specs))
    path = directory / "data.json"
    path.write_text(json.dumps(entries))
    return str(path)


def write_tokenizer(directory: Path, samples: int) -> Tokenizer:
    """A tokenizer with one token for each word of `samples` samples, saved as tokenizer.json."""
    words = [*WORDS, *(f"{letter}{n}" for n in range(samples) for letter in "qa")]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def random_specs(rng: np.random.Generator, count: int) -> list[Spec]:
    """Text-only samples, several pictures of two kinds, several turns, and some broken pictures."""
    specs = []
    for _ in range(count):
        turns = int(rng.integers(1, 3))
        vision, chart = (tuple(int(v) for v in rng.integers(0, high, turns)) for high in (3, 2))
        pictures = {"vision": vision, "chart": chart} if rng.random() < 0.7 else {}
        some = sum(map(sum, pictures.values())) > 0
        specs.append(Spec(pictures, turns, int(rng.integers(0, 6)), broken=some and rng.random() < 0.3))
    return specs


def good(specs: Sequence[Spec]) -> set[int]:
    """Ordinals of the samples without a broken picture."""
    return {n for n, spec in enumerate(specs) if not spec.broken}


def colour(sample: int, picture: int) -> tuple[int, int, int]:
    """The colour of a sample's picture."""
    return sample // 256, sample % 256, 10 + 40 * picture


def expected(n: int, spec: Spec, items: Sequence[ItemSpec]) -> list[tuple[str, bool, object]]:
    """(word, trained on, (item name, picture, row) or None) for every token of a sample, written out by hand."""
    result: list[tuple[str, bool, object]] = []
    seen = {item.name: 0 for item in items}
    for turn in range(spec.turns):
        for item in items:
            for _ in range(spec.pictures.get(item.name, (0,) * spec.turns)[turn]):
                result += [("<pad>", False, (item.name, seen[item.name], row)) for row in range(item.rows)]
                seen[item.name] += 1
        result += [("so", False, None)] * spec.words + [(f"q{n}", False, None)]
        result += [(f"a{n}", True, None), ("<end>", True, None)]
    return result


def check(
    batch: Mapping[str, np.ndarray],
    config: DataConfig,
    specs: Sequence[Spec],
    items: Sequence[ItemSpec],
    tokenizer: Tokenizer,
) -> list[int]:
    """The ordinals in a microbatch. Fails unless every array says exactly what those samples' files say."""
    found = []
    taken: dict[str, set[int]] = {item.name: set() for item in items}
    for row in range(config.samples):
        segments = batch["segment_ids"][row]
        assert np.all(np.diff(segments[segments > 0]) >= 0) and np.all(np.diff((segments > 0).astype(int)) <= 0)
        assert config.pack or segments.max() <= 1
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            text = [tokenizer.id_to_token(t) for t in batch["tokens"][row, places]]
            n = next(int(word[1:]) for word in text if word[0] == "q")
            found.append(n)
            words = expected(n, specs[n], items)
            assert text == [word for word, _, _ in words[:-1]]
            targets = [tokenizer.id_to_token(t) for t in batch["targets"][row, places]]
            assert targets == [word for word, _, _ in words[1:]]
            np.testing.assert_array_equal(batch["weights"][row, places], [trained for _, trained, _ in words[1:]])
            np.testing.assert_array_equal(batch["positions"][row, places], np.arange(len(places)))
            for item in items:
                index = batch[f"{item.name}.index"][row, places]
                for place, (_, _, picture) in zip(index, words[:-1], strict=True):
                    if picture is None or picture[0] != item.name:
                        assert place == -1
                        continue
                    slot, picture_row = divmod(int(place), item.rows)
                    assert picture_row == picture[2]
                    assert slot // item.slots_per_group == row // config.samples_per_group, "a slot of another group"
                    pixels = item.reader.to_rgb({"pixels": batch[f"{item.name}.pixels"][slot]})
                    np.testing.assert_allclose(pixels, np.broadcast_to(colour(n, picture[1]), pixels.shape), atol=1e-3)
                    assert picture_row > 0 or slot not in taken[item.name], "two pictures in one slot"
                    taken[item.name].add(slot)
        empty = segments == 0
        assert not any(batch[key][row, empty].any() for key in ("tokens", "positions", "targets", "weights"))
        assert all((batch[f"{item.name}.index"][row, empty] == -1).all() for item in items)
    for item in items:
        unused = [s for s in range(len(batch[f"{item.name}.pixels"])) if s not in taken[item.name]]
        assert not batch[f"{item.name}.pixels"][unused].any()
    return found
