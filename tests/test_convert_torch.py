"""What transformers computes from a folder is what we compute from it: every family, and encoders alone.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

from pathlib import Path

import beside_torch
import families
import hf_folders
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from beside_torch import in_transformers, torch

from hetjax import convert
from hetjax.hf.stored import open_source

pytestmark = beside_torch.QUIET
SLOW = {
    *("mixtral, one kv head, a window, tied", "qwen3_moe", "qwen3_moe, dense layers", "clip + mixtral"),
    *("clip + qwen2", "siglip + qwen3", "siglip + mixtral", "clip + qwen3_moe"),
    *("qwen2_audio, tied", "qwen2_audio of llama"),
}
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in families.ALL]


@pytest.mark.parametrize("family", MARKED)
def test_output_loss_and_every_gradient_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", families.ALL[family])
    source, model = open_source(folder), in_transformers.load(folder)
    microbatch = families.microbatch(source.models)
    expected = beside_torch.theirs(model, source, microbatch)
    beside_torch.assert_same(beside_torch.ours(source, microbatch), expected, source)


@pytest.mark.parametrize("case", ["clip + llama", pytest.param("siglip + qwen2, tied", marks=pytest.mark.slow)])
def test_in_bfloat16_logits_and_gradients_are_off_by_the_rounding_that_transformers_has(
    case: str, tmp_path: Path
) -> None:
    folder = hf_folders.write(tmp_path / "folder", families.SEEING[case], dtype=ml_dtypes.bfloat16)
    source = open_source(folder)
    microbatch = families.microbatch(source.models)
    exact, rough = (
        beside_torch.theirs(in_transformers.load(folder, dtype), source, microbatch)
        for dtype in (torch.float32, torch.bfloat16)
    )
    got = beside_torch.ours(source, microbatch, jnp.bfloat16)
    off = lambda found: np.linalg.norm(found.output - exact.output)
    assert 0.1 * off(rough) <= off(got) <= 1.5 * off(rough)
    off = lambda found: np.sqrt(sum(np.sum((found.gradients[k] - exact.gradients[k]) ** 2) for k in got.gradients))
    assert 0.1 * off(rough) <= off(got) <= 1.5 * off(rough)


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_audio of llama, tied"])
def test_qwen2_audio_comes_back_with_the_same_bytes_and_says_the_same(family: str, tmp_path: Path) -> None:
    folder, out = hf_folders.write(tmp_path / "folder", families.HEARING[family]), tmp_path / "out"
    assert convert.main(["from_hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert convert.main(["to_hf", str(tmp_path / "ckpt"), "--out", str(out)]) == 0
    assert not list(hf_folders.differing(hf_folders.read(out), hf_folders.read(folder)))
    inputs = families.for_transformers(families.microbatch(open_source(folder).models))
    with torch.no_grad():
        before, after = (in_transformers.run(in_transformers.load(d), inputs)[0] for d in (folder, out))
    assert torch.equal(before, after)
