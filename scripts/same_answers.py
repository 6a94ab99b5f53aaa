"""Asks a run and its export, opened by transformers, the same held-out questions, and compares their greedy answers.

    hetjax convert to_hf runs/captions --out runs/captions-hf
    python scripts/same_answers.py runs/captions runs/captions-hf data/cache/tuxpaint/captions.test.json

Needs the extra `torch`. Exit status 0: every answer is the same; 1: one is not.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hetjax import generate
from hetjax.data import sounds


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("export", help="what `hetjax.convert to_hf` made of it")
    parser.add_argument("questions", help="LLaVA JSON")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="questions, evenly spread (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N")
    arguments = parser.parse_args()
    samples = json.loads(Path(arguments.questions).read_text())
    samples = samples[:: max(1, len(samples) // arguments.count)][: arguments.count]
    root = Path(arguments.questions).parent
    ours = generate.load(arguments.workdir)
    fields = {item.field: item.reader for item in ours.chat.items}
    asked = [(s["conversations"][0]["value"], {f: str(root / s[f]) for f in fields if f in s}) for s in samples]
    prompts = [generate.ask(question, **files) for question, files in asked]
    try:
        answers = [answer.text for answer in ours(prompts, max_new_tokens=arguments.max_new_tokens)]
    except ValueError as error:
        raise SystemExit(f"error: {error}; pictures and clips are looked for beside {arguments.questions}") from error
    theirs = Transformers(arguments.export, fields)
    different = 0
    for sample, (question, files), answer in zip(samples, asked, answers, strict=True):
        other = theirs.answer(question, files, arguments.max_new_tokens)
        different += answer != other
        print(f"{sample['id']}: {answer!r}", "" if answer == other else f"but transformers says {other!r}")
        print(f"    expected {sample['conversations'][1]['value']!r}", flush=True)
    print(f"{len(samples) - different} of {len(samples)} answers are the same")
    return int(different > 0)


class Transformers:
    """An exported folder in transformers, in float32."""

    def __init__(self, folder: str, readers: Mapping[str, Any]) -> None:
        import torch
        import transformers

        architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
        self.torch, self.readers = torch, readers
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, question: str, files: dict[str, str], max_new_tokens: int) -> str:
        """The greedy answer to one question about a picture or a clip."""
        messages = [{"role": "user", "content": question}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=text, return_tensors="pt", **self._items(files))
        with self.torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True)

    def _items(self, files: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "image" in files:
            found["images"] = [Image.open(files["image"])]
        if "audio" in files:  # as much of it as the run's encoder hears
            clip = sounds.read_samples(Path(files["audio"]), self.readers["audio"].max_frames * sounds.HOP)
            found |= {"audio": [clip], "sampling_rate": sounds.RATE}
        return found


if __name__ == "__main__":
    sys.exit(main())
