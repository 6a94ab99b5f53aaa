"""Runs exports in whatever transformers the interpreter has; needs nothing of hetjax. In each directory named:

model/      an export: it must load with every key and no other, and `inputs.npz` go through it -> `logits.npy`
picture.png where it is there, the processor of model/ makes ids and pixels of it -> `ids.npy`, `pixels.npy`
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

TEXT = "what <image> is it ? <end> so , <end>"


def main(directories: list[str]) -> None:
    """Writes the results beside what they are made of."""
    transformers.logging.set_verbosity_error()
    for directory in map(Path, directories):
        config = transformers.AutoConfig.from_pretrained(directory / "model")
        model, info = getattr(transformers, config.architectures[0]).from_pretrained(
            directory / "model", dtype="auto", output_loading_info=True, attn_implementation="eager"
        )
        found = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
        assert not found, (directory, found)
        inputs = {k: torch.tensor(v) for k, v in np.load(directory / "inputs.npz").items()}
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            out = model.eval()(**inputs)
        logits = out.logits if "logits" in out else out.last_hidden_state
        np.save(directory / "logits.npy", logits.float().numpy())
        if (directory / "picture.png").exists():
            processor = transformers.AutoProcessor.from_pretrained(directory / "model")
            picture = transformers.image_utils.load_image(str(directory / "picture.png"))
            made = processor(images=[picture], text=TEXT, return_tensors="np")
            np.save(directory / "ids.npy", made["input_ids"])
            np.save(directory / "pixels.npy", made["pixel_values"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
