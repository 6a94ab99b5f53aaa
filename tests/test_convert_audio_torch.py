"""What transformers hears in a folder is what we hear in it: Whisper's encoder and Qwen2-Audio, clips of any length.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

from pathlib import Path
from typing import Any

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import AUDIO_TOKEN, hearing, qwen2_audio, text, whisper
from test_convert_torch import by_key, load, whole

from hetjax import convert
from hetjax.graph import Graph, Module, vlm
from hetjax.hf import keys
from hetjax.hf.stored import open_source
from hetjax.layout import Layout
from hetjax.reference import apply_module, mean_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TIED = dict(tie_word_embeddings=True)
FRAMES = np.array([16, 13, 6, 0], np.int32)  # two clips in the first sample, one in the second, an empty slot
SAMPLE = (0, 0, 1)


def clips(mels: int = 5) -> dict[str, np.ndarray]:
    mel = np.random.default_rng(0).normal(size=(4, 16, mels)).astype(np.float32)
    return {"audio.mel": mel, "audio.frames": FRAMES}


def batch(model: Any) -> dict[str, np.ndarray]:
    """Two samples with clips of several lengths in them, text between and behind."""
    tokens = np.random.default_rng(0).integers(0, AUDIO_TOKEN, (2, 18)).astype(np.int32)
    index = np.full((2, 18), -1, np.int32)
    place = [1, 1]
    for slot, sample in enumerate(SAMPLE):
        rows = model.rows_of(int(FRAMES[slot]))
        at = slice(place[sample], place[sample] + rows)
        tokens[sample, at], index[sample, at] = AUDIO_TOKEN, slot * model.rows + np.arange(rows)
        place[sample] += rows + 2
    targets = np.roll(tokens, -1, 1)
    weights = (targets != AUDIO_TOKEN).astype(np.float32)
    weights[:, -1] = 0
    positions, segments = np.tile(np.arange(18, dtype=np.int32), (2, 1)), np.ones((2, 18), np.int32)
    text = dict(tokens=tokens, positions=positions, segment_ids=segments, targets=targets, weights=weights)
    return text | {"audio.index": index} | clips()


def torch_outputs(model: Any, microbatch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """(loss, logits) of transformers."""
    tokens = torch.tensor(microbatch["tokens"], dtype=torch.long)
    labels = torch.where(tokens == AUDIO_TOKEN, -100, tokens)
    heard = np.arange(16) < FRAMES[:3, None]
    out = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        labels=labels,
        input_features=torch.tensor(microbatch["audio.mel"][:3].transpose(0, 2, 1).copy()),
        feature_attention_mask=torch.tensor(heard.astype(np.int64)),
    )
    return out.loss, out.logits


def graph(models: dict[str, Any]) -> Graph:
    tower = Module("audio", models["audio"].module(jnp.float32), Layout())
    return vlm((tower,), Module("llm", models["llm"].module(jnp.float32, encoders=("audio",)), Layout()))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2, tied")]


@pytest.mark.parametrize("name", ["qwen2", "llama, tied", *SLOW])
def test_qwen2_audio_s_logits_loss_and_every_gradient_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, *tied = name.split(", ")
    folder = hf_folders.write(tmp_path / "folder", qwen2_audio(text(kind, **(TIED if tied else {}))))
    if tied:  # as our export writes it: the class ties nothing
        tensors = hf_folders.read(folder)
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
        hf_folders.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source, model = open_source(folder), load(folder)
    microbatch = batch(source.models["audio"])
    model.model.audio_tower.embed_positions.requires_grad_(True)  # transformers never trains them
    expected, expected_logits = torch_outputs(model, microbatch)
    expected.backward()

    net, params = graph(dict(source.models)), whole(source)
    arrays = {k: jnp.asarray(v) for k, v in microbatch.items()}
    rows = apply_module(net.encoders[0].definition, params["audio"], {}, arrays)["x"]
    y = apply_module(net.sink.definition, params["llm"], {"audio": rows}, arrays)
    loss, grads = jax.value_and_grad(lambda p: mean_loss(net, p, arrays))(params)
    np.testing.assert_allclose(np.asarray(y["x"] @ y["head"]), expected_logits.detach().numpy(), atol=1e-5)
    assert abs(float(loss) - expected.item()) <= 1e-5
    wanted = {keys.canonical(n, source.parts): p.grad.numpy() for n, p in model.named_parameters()}
    if tied:
        wanted["language_model.model.embed_tokens.weight"] += wanted.pop("language_model.lm_head.weight")
    got = dict(by_key(source, grads))
    assert got.keys() == wanted.keys()
    norm = np.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
    for key, g in got.items():
        scale = max(float(np.linalg.norm(wanted[key])), 0.01 * norm)
        assert np.linalg.norm(g - wanted[key]) / scale <= 1e-4, key

    assert convert.main(["from_hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert convert.main(["to_hf", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), hf_folders.read(folder)))
    with torch.no_grad():
        assert torch.equal(torch_outputs(load(tmp_path / "out"), microbatch)[1], expected_logits)


@pytest.mark.parametrize(
    "config", [whisper(), whisper(architectures=["WhisperModel"]), hearing()], ids=lambda c: c["architectures"][0]
)
def test_an_encoder_alone_gives_the_features_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", config)
    source, model = open_source(folder), load(folder)
    params, heard = whole(source)["audio"], clips()
    definition = source.models["audio"].module(jnp.float32)
    params["last"]["projector"] = {"weight": jnp.eye(16), "bias": jnp.zeros(16)}
    heard["audio.frames"] = np.full(4, 16, np.int32)
    got = apply_module(definition, params, {}, {k: jnp.asarray(v) for k, v in heard.items()})["x"]
    encoder = model.get_encoder() if config["model_type"] == "whisper" else model
    with torch.no_grad():
        expected = encoder(torch.tensor(heard["audio.mel"].transpose(0, 2, 1).copy())).last_hidden_state
    np.testing.assert_allclose(np.asarray(got), expected.numpy(), atol=1e-5)
