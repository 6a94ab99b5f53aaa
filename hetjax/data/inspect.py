"""Shows a microbatch as the model gets it: tokens, targets, masks, positions, and which picture or clip lies where."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from hetjax.data.items import ItemSpec, count

SHADES = " .:-=+*#%@"  # dark to bright
COLUMNS = 24  # of a thumbnail; a character is about twice as high as wide

Microbatch = Mapping[str, np.ndarray]


def describe(
    microbatch: Microbatch,
    tokenizer: Tokenizer,
    items: Sequence[ItemSpec],
    *,
    groups: int = 1,
    rows: int | None = None,
    colour: bool = False,
) -> str:
    """The first `rows` rows (None: all) as text, with thumbnails of their items, in colour for a terminal."""
    samples, seq_len = microbatch["tokens"].shape
    used, trained = microbatch["segment_ids"] > 0, microbatch["weights"] > 0
    lines = [
        f"microbatch: {samples} rows x {seq_len} positions in {groups} group(s); {used.mean():.0%} of the "
        f"positions used, {trained.sum()} trained on"
    ]
    for item in items:
        slots = len(microbatch[f"{item.name}.{next(iter(item.reader.arrays))}"])
        lines.append(f"{item.name}: {count(microbatch, item)} of {slots} slots used")
    for row in range(samples if rows is None else min(rows, samples)):
        lines.append("")
        lines.append(f"row {row} (group {row * groups // samples}): {used[row].sum()} of {seq_len} positions used")
        for segment in range(1, int(microbatch["segment_ids"][row].max()) + 1):
            lines += _segment(microbatch, tokenizer, items, row, segment, colour)
    return "\n".join(lines)


def write_pictures(microbatch: Microbatch, items: Sequence[ItemSpec], directory: Path) -> list[Path]:
    """The files written: one PNG for each used slot, as its encoder sees it."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for item in items:
        for slot in _slots(microbatch, item):
            written.append(directory / f"{item.name}-{slot:04d}.png")
            Image.fromarray(_rgb(microbatch, item, slot)).save(written[-1])
    return written


def _rgb(microbatch: Microbatch, item: ItemSpec, slot: int) -> np.ndarray:
    return item.reader.to_rgb({array: microbatch[f"{item.name}.{array}"][slot] for array in item.reader.arrays})


def _slots(microbatch: Microbatch, item: ItemSpec, at: tuple[int, slice] | slice = slice(None)) -> list[int]:
    """The slots that any position of `at` takes."""
    index = microbatch[f"{item.name}.index"][at]
    return [int(slot) for slot in np.unique(index[index >= 0] // item.rows)]


def _segment(
    microbatch: Microbatch, tokenizer: Tokenizer, items: Sequence[ItemSpec], row: int, segment: int, colour: bool
) -> Iterator[str]:
    places = np.flatnonzero(microbatch["segment_ids"][row] == segment)
    at = row, slice(places[0], places[-1] + 1)
    targets = microbatch["targets"][at][microbatch["weights"][at] > 0]
    yield f"  segment {segment}: {_text(microbatch, tokenizer, items, at)!r}"
    yield f"    trained on: {tokenizer.decode(targets.tolist(), skip_special_tokens=False)!r}"
    yield f"    {'place':>11} {'position':>11} {'token':>7} {'':16} {'weight':>6} {'target':>7}"
    positions = microbatch["positions"][row]
    place, stop = int(places[0]), int(places[-1]) + 1
    while place < stop:
        lying = _item_at(microbatch, items, row, place)
        if lying:
            item, slot, first, end = lying
            end = min(end, stop)
            spans = f"{place}..{end - 1}", f"{positions[place]}..{positions[end - 1]}"
            rows = f"rows {first}..{first + end - place - 1}"
            yield f"    {spans[0]:>11} {spans[1]:>11}         {item.name} slot {slot}, {rows}"
            place = end
            continue
        token, target = (int(microbatch[k][row, place]) for k in ("tokens", "targets"))
        weight = microbatch["weights"][row, place]
        goal = f"{target:>7} {tokenizer.id_to_token(target)!r}" if weight > 0 else ""
        text_of = repr(tokenizer.id_to_token(token))
        yield f"    {place:>11} {positions[place]:>11} {token:>7} {text_of:16} {weight:>6g} {goal}".rstrip()
        place += 1
    for item in items:
        for slot in _slots(microbatch, item, at):
            yield f"    {item.name} slot {slot}"
            yield from thumbnail(_rgb(microbatch, item, slot), colour=colour)


def _text(microbatch: Microbatch, tokenizer: Tokenizer, items: Sequence[ItemSpec], at: tuple[int, slice]) -> str:
    """The tokens as text, with a placeholder where each picture or clip begins."""
    tokens = microbatch["tokens"][at]
    text, start = np.ones(len(tokens), bool), 0
    shown: dict[int, str] = {}  # place -> placeholder
    for item in items:
        index = microbatch[f"{item.name}.index"][at]
        text &= index < 0
        shown |= dict.fromkeys(np.flatnonzero((index >= 0) & (index % item.rows == 0)).tolist(), item.placeholder)
    decoded = lambda stop: tokenizer.decode(tokens[start:stop][text[start:stop]].tolist(), skip_special_tokens=False)
    pieces = []
    for place in sorted(shown):
        pieces += [decoded(place), shown[place]]
        start = place
    return "".join([*pieces, decoded(len(tokens))])


def _item_at(
    microbatch: Microbatch, items: Sequence[ItemSpec], row: int, place: int
) -> tuple[ItemSpec, int, int, int] | None:
    """(item, slot, its row here, end of the run of its rows) where an item lies, else None."""
    for item in items:
        index = microbatch[f"{item.name}.index"][row]
        if index[place] >= 0:
            slot, first = divmod(int(index[place]), item.rows)
            end = place
            while end < len(index) and index[end] == index[place] + end - place and index[end] // item.rows == slot:
                end += 1
            return item, slot, first, end
    return None


def thumbnail(rgb: np.ndarray, *, colour: bool) -> Iterator[str]:
    """The lines of a small picture: shades of grey as characters, or two colours in each for a terminal."""
    lines = min(max(1, round(COLUMNS / 2 * rgb.shape[0] / rgb.shape[1])), COLUMNS)
    size = COLUMNS, lines * 2 if colour else lines
    small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))
    if not colour:
        for line in small.mean(-1):
            yield "      " + "".join(SHADES[int(v) * len(SHADES) // 256] for v in line)
        return
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(upper, lower, strict=True)
        )
        yield "      " + "".join(cells) + "\x1b[0m"
