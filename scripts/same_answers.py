"""Asks a run and its export, opened by transformers, the same held-out questions, and compares their greedy answers.

    hetjax convert to_hf runs/captions --out runs/captions-hf
    python scripts/same_answers.py runs/captions runs/captions-hf data/cache/tuxpaint/captions.test.json

Needs the extra `torch`. Exit status 0: every answer is the same; 1: one is not.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hetjax import generate
from hetjax.data import sounds
from hetjax.generate.prompt import placed


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("export", help="what `hetjax.convert to_hf` made of it")
    parser.add_argument("questions", help="a file of conversations, in any spelling of the training data")
    parser.add_argument("--media_root", metavar="DIR", help="where its files lie (default: beside it)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="questions, evenly spread (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N")
    arguments = parser.parse_args()
    ours = generate.load(arguments.workdir)
    items = ours.chat.items
    try:
        prompts = generate.read_prompts(arguments.questions, items, arguments.media_root)
        prompts = prompts[:: max(1, len(prompts) // arguments.count)][: arguments.count]
        answers = [answer.text for answer in ours(prompts, max_new_tokens=arguments.max_new_tokens)]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    theirs = Transformers(arguments.export, {item.field: item.reader for item in items})
    different = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        other = theirs.answer(prompt, placed(prompt, items), arguments.max_new_tokens)
        different += answer != other
        print(f"{prompt.id}: {answer!r}", "" if answer == other else f"but transformers says {other!r}", flush=True)
    print(f"{len(prompts) - different} of {len(prompts)} answers are the same")
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

    def answer(self, prompt: generate.Prompt, turns: Sequence[str], max_new_tokens: int) -> str:
        """The greedy answer to a prompt, whose `turns` have all their placeholders."""
        messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        messages += [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=text, return_tensors="pt", **self._items(prompt.files))
        with self.torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True)

    def _items(self, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if files.get("image"):
            found["images"] = [Image.open(path) for path in files["image"]]
        if files.get("audio"):  # as much of each as the run's encoder hears
            most = self.readers["audio"].max_frames * sounds.HOP
            found |= {"audio": [sounds.read_samples(Path(path), most) for path in files["audio"]]}
            found |= {"sampling_rate": sounds.RATE}
        return found


if __name__ == "__main__":
    sys.exit(main())
