"""easy-VQA (github.com/vzhou842/easy-VQA, MIT) as LLaVA JSON: 64 x 64 pictures of one shape, 13 possible answers.

The PyPI package carries the data; it is read in place and never imported.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hetjax.data.settings import DataError

SPECIAL = ("<pad>", "<unk>", "<end>", "<image>")  # ids 0 to 3
SPLITS = ("test", "train")


def prepare(out_dir: str | Path) -> Path:
    """`out_dir`, holding train.json, test.json (held out), images/ and tokenizer.json.

    Does nothing where they are already there. A killed call leaves nothing that a later one would take for whole:
    every entry arrives by rename, train.json last. Raises DataError if the package is not installed.
    """
    out = Path(out_dir)
    if (out / "train.json").is_file():
        return out
    source = _package_data()
    out.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=out))
    try:
        samples = {split: _convert(source / split, split, building / "images" / split) for split in SPLITS}
        _tokenizer(samples["train"]).save(str(building / "tokenizer.json"))
        for split in SPLITS:
            (building / f"{split}.json").write_text(json.dumps(samples[split]), encoding="utf-8")
        for name in ("images", "tokenizer.json", "test.json", "train.json"):
            try:
                os.rename(building / name, out / name)
            except OSError:  # a directory is not replaced: an earlier or concurrent call brought the same pictures
                if not (out / name).is_dir():
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _package_data() -> Path:
    try:
        found = importlib.metadata.distribution("easy-vqa")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the package easy-vqa is not installed; it comes with the extra `demo`: pip install 'hetjax[demo]'"
        ) from error
    return Path(str(found.locate_file("easy_vqa/data")))


def _convert(source: Path, split: str, images: Path) -> list[dict[str, Any]]:
    """The split's conversations. Copies its pictures to `images`."""
    shutil.copytree(source / "images", images)
    questions = json.loads((source / "questions.json").read_text(encoding="utf-8"))
    return [
        {
            "id": f"{split}-{number}",
            "image": f"images/{split}/{image}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (question, answer, image) in enumerate(questions)
    ]


def _tokenizer(samples: list[dict[str, Any]]) -> Tokenizer:
    """A tokenizer with the words of these samples, in a fixed order."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words: set[str] = set()
    for text in {t["value"].removeprefix("<image>") for s in samples for t in s["conversations"]}:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
