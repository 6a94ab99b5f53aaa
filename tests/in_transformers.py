"""Runs folders in whatever transformers the interpreter has; needs nothing of hetjax. As a script it takes a name for
what it writes, and directories, in each of which lie

model/      an export: it must load with every key and no other, and `inputs.npz` go through it -> NAME.npz (output,
            scalar), and NAME.gradients.npz (of the scalar, by transformers' own names)
picture.png, sound.npy (of 16 kHz) not in all: the processor of model/ makes ids and pixels, or features, of it
            -> NAME.made.npz
"""

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TEXT = "what {} is it ? <end> so , <end>"
MADE = ("input_ids", "pixel_values", "input_features", "feature_attention_mask")


def load(directory: Path, dtype: Any = torch.float32) -> Any:
    """transformers' model, which must find every key and no other. All its parameters are trained, also the
    position table of audio encoders, which transformers leaves as it is."""
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, name).from_pretrained(
            directory, dtype=dtype, output_loading_info=True, attn_implementation="eager"
        )
    found = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    assert not found, (directory, found)
    return model.eval().requires_grad_(True)


def run(model: Any, inputs: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """(logits, loss) of a language model; (features, their mean in fixed random directions) of an encoder alone."""
    given = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in inputs.items()}
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()}
    if "input_ids" in given:
        out = model(**given)
        return out.logits, out.loss
    if "pixel_values" in given:  # as vision-language models read a tower: before its last norm
        features = model(**given, output_hidden_states=True).hidden_states[-1]
    else:
        encoder = model.get_encoder() if model.config.model_type == "whisper" else model
        features = encoder(**given).last_hidden_state
    return features, (features * torch.tensor(directions(tuple(features.shape)))).mean()


def directions(shape: tuple[int, ...]) -> np.ndarray:
    """What features of a shape are multiplied by to become a number."""
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def main(name: str, directories: list[str]) -> None:
    """Writes the results beside what they are made of."""
    transformers.logging.set_verbosity_error()
    for directory in map(Path, directories):
        model = load(directory / "model", "auto")
        output, scalar = run(model, np.load(directory / "inputs.npz"))
        scalar.backward()
        np.savez(directory / f"{name}.npz", output=output.detach().float().numpy(), scalar=scalar.item())
        gradients = {key: p.grad.float().numpy() for key, p in model.named_parameters() if p.grad is not None}
        np.savez(directory / f"{name}.gradients.npz", **gradients)
        processed = _processed(directory)
        if processed:
            np.savez(directory / f"{name}.made.npz", **{k: processed[k] for k in MADE if k in processed})


def _processed(directory: Path) -> Mapping[str, np.ndarray]:
    """What the processor makes of the picture or the sound beside the model, if there is one."""
    picture, sound = directory / "picture.png", directory / "sound.npy"
    if not picture.exists() and not sound.exists():
        return {}
    process = transformers.AutoProcessor.from_pretrained(directory / "model")
    if picture.exists():
        images = [transformers.image_utils.load_image(str(picture))]
        return process(images=images, text=TEXT.format("<image>"), return_tensors="np")
    return process(audio=[np.load(sound)], text=[TEXT.format("<audio>")], sampling_rate=16000, return_tensors="np")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2:])
