"""What a run or several folders became is opened by transformers, with its processor; a state dict by torch.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

from pathlib import Path
from typing import Any

import beside_torch
import families
import hf_folders
import ml_dtypes
import numpy as np
import pytest
import runs
from beside_torch import in_transformers, torch, transformers
from hf_folders import IMAGE_TOKEN, llava, text, vision
from PIL import Image

from hetjax import convert, train
from hetjax.hf import export
from hetjax.hf.stored import open_source

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = beside_torch.QUIET


def test_a_run_from_scratch_is_opened_by_transformers_with_its_processor(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = runs.settings(steps=1) | {"vit.ViT.feature_layer": -2, "experiment.Encoder.shortest_edge": 9}
    assert train.main(runs.arguments(gin, tmp_path / "run", changes)) == 0
    assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    run = runs.load(gin, changes)
    source, again = open_source(tmp_path / "run"), open_source(tmp_path / "out")

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    made = processor(images=[picture], text="what <image> is it", return_tensors="pt")
    np.testing.assert_array_equal(
        made["pixel_values"][0].numpy().transpose(1, 2, 0),
        run.encoders[0].items.read(tmp_path / "a.png").values["pixels"],
    )
    token = next(iter(again.extras.values())).config["image_token_index"]
    assert (made["input_ids"] == token).sum() == source.models["vision"].rows

    microbatch = families.with_item_token(families.microbatch(source.models), token)
    with torch.no_grad():
        expected, _ = in_transformers.run(in_transformers.load(tmp_path / "out"), families.for_transformers(microbatch))
    _, logits = beside_torch.forward(source, microbatch)(beside_torch.whole(source))
    np.testing.assert_allclose(np.asarray(logits), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_a_decoder_and_a_tower_that_came_apart_are_exported_together(feature_layer: int, tmp_path: Path) -> None:
    llm = open_source(hf_folders.write(tmp_path / "llm", text("qwen2", image_token_index=IMAGE_TOKEN)))
    tower = open_source(hf_folders.write(tmp_path / "tower", vision("siglip"), dtype=np.float16))
    hf_folders.write(tmp_path / "whole", llava(text("qwen2"), vision("siglip"), vision_feature_layer=feature_layer))
    mixed = _Mixed(llm, tower, open_source(tmp_path / "whole"))
    export.to_hf(mixed, tmp_path / "out", dtype="float32")
    microbatch = families.microbatch(mixed.models)
    with torch.no_grad():
        _, expected = in_transformers.run(in_transformers.load(tmp_path / "out"), families.for_transformers(microbatch))
    loss, _ = beside_torch.forward(mixed, microbatch)(beside_torch.whole(mixed))
    assert abs(float(loss) - expected.item()) <= 1e-5


class _Mixed:
    """What a run holds whose decoder and tower started from two folders, and its projector from a third."""

    def __init__(self, llm: Any, tower: Any, rest: Any) -> None:
        self.path, self.models = llm.path, rest.models
        self.extras = {"llm": llm.extras["llm"], "vision": tower.extras["vision"]}
        self._parts = (llm, tower, rest)
        self.arrays = {name: next(s.arrays[name] for s in self._parts if name in s.arrays) for name in rest.arrays}

    def fetch(self, names: list[str]) -> dict[str, Any]:
        return {name: next(s.fetch([name])[name] for s in self._parts if name in s.arrays) for name in names}


def test_a_state_dict_for_torch_has_the_tensors_of_the_folder(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("qwen2", tie_word_embeddings=True), dtype=ml_dtypes.bfloat16)
    assert convert.main(["to_torch", str(folder), "--out", str(tmp_path / "a.pt")]) == 0
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    expected = safetensors.load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())
