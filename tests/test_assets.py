"""Weights and data from packages: their conversion on small files made here, and the real ones where they are there."""

import functools
import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from hetjax import generate
from hetjax.assets import fetch, smollm2, tuxpaint, whisper_tiny
from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.data import DataError
from hetjax.hf import initial, pretrained
from hetjax.hf.stored import open_source
from hetjax.judge.reference import apply_module

CACHE = Path(__file__).parent.parent / "data" / "cache"
SMOLLM2 = CACHE / "smollm2"


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Forty stamps of twenty sentences; a red corner on transparent black; the odd ones may not be mirrored."""
    root = tmp_path / "stamps" / "animals"
    root.mkdir(parents=True)
    pixels = np.zeros((10, 20, 4), np.uint8)
    pixels[:5, :5] = (255, 0, 0, 255)
    for number in range(40):
        name = root / f"s{number:02d}"
        Image.fromarray(pixels, "RGBA").save(f"{name}.png")
        name.with_suffix(".txt").write_text(f"Animal {number // 2}.\nfr.utf8=Un animal.\n")
        if number % 2:
            name.with_suffix(".dat").write_text("nomirror\n")
        for code in ("fr", "es", "da"):
            Path(f"{name}_desc_{code}.ogg").write_bytes(b"sound")
    (root / "drawn.svg").write_text("<svg/>")
    (root / "drawn.txt").write_text("A drawing.\n")
    return root.parent


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_stamps_become_samples_and_no_sentence_is_on_both_sides_in_any_language(stamps: Path, tmp_path: Path) -> None:
    out = tuxpaint.prepare(tmp_path / "out", stamps)
    sides = {split: read(out / f"captions.{split}.json") for split in tuxpaint.SPLITS}
    answers = {split: {s["conversations"][1]["value"] for s in samples} for split, samples in sides.items()}
    assert answers["train"] and answers["test"] and not answers["train"] & answers["test"]
    assert answers["train"] | answers["test"] == {f"Animal {i}." for i in range(20)}
    held_out = {s["id"] for s in sides["test"]}
    for split in tuxpaint.SPLITS:
        for sample in read(out / f"spoken.{split}.json"):
            stamp, _, code = sample["id"].rpartition("_")
            assert (stamp in held_out) == (split == "test")
            assert sample["conversations"][1]["value"] == {"fr": "French", "es": "Spanish"}[code]
            assert (out / sample["audio"]).read_bytes() == b"sound"
        for sample in read(out / f"both.{split}.json"):
            language = {"fr": "French", "es": "Spanish"}[sample["audio"][-6:-4]]
            seen = next(s for s in sides[split] if s["id"] == sample["id"])
            assert sample["conversations"][1]["value"] == f"In {language}: {seen['conversations'][1]['value']}"
            assert sample["image"] == seen["image"]
            assert Path(sample["audio"]).stem.startswith(sample["id"].removesuffix(".mirrored"))
    mirrored = {s["id"] for s in sides["train"] if s["id"].endswith(".mirrored")}
    assert mirrored == {f"{s['id']}.mirrored" for s in sides["train"] if re.search("s[0-9][02468]$", s["id"])}


def test_pictures_are_square_and_lie_on_white(stamps: Path, tmp_path: Path) -> None:
    out = tuxpaint.prepare(tmp_path / "out", stamps)
    sample = next(s for s in read(out / "captions.train.json") if s["id"].endswith(".mirrored"))
    with Image.open(out / sample["image"]) as image:
        assert image.size == (tuxpaint.SIZE, tuxpaint.SIZE) and image.mode == "RGB"
        assert image.getpixel((5, 40)) == (255, 255, 255) and image.getpixel((124, 40)) == (255, 0, 0)


def test_a_second_call_does_nothing_and_a_failed_one_leaves_nothing(stamps: Path, tmp_path: Path) -> None:
    out = tuxpaint.prepare(tmp_path / "out", stamps)
    assert tuxpaint.prepare(out, tmp_path / "nowhere") == out
    with pytest.raises(DataError, match=r"nowhere holds no stamp: no name\.txt with a sentence"):
        tuxpaint.prepare(tmp_path / "other", tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_an_absent_tool_and_a_failed_download_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip download .*no-such-wheel==0 failed: .*; check the network"):
        fetch.wheel("no-such-wheel==0", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get is not here: tuxpaint-stamps-default is a Debian package"):
        fetch.debian("tuxpaint-stamps-default", tmp_path)


def write_gguf(path: Path, q: np.ndarray, k: np.ndarray) -> None:
    """A llama of one layer, 2 heads of 4, 1 key head, and a vocabulary of 6 words."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["<|end|>", "a", "b", "1", "2", "ab"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {"attn_norm": (8,), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_norm": (8,)}
    shapes |= {"ffn_gate": (4, 8), "ffn_up": (4, 8), "ffn_down": (8, 4)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", random.normal(size=shape).astype(np.float32))
    for name, array, heads in (("attn_q", q, 2), ("attn_k", k, 1)):  # llama.cpp's convert_hf_to_gguf.py, permute()
        stored = array.reshape(heads, 2, 2, 8).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.0.{name}.weight", np.ascontiguousarray(stored))
    writer.add_tensor("token_embd.weight", np.arange(48, dtype=np.float32).reshape(6, 8))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder_with_two_tokens_more_and_its_rotary_pairs_apart(tmp_path: Path) -> None:
    q, k = (np.arange(n * 8, dtype=np.float32).reshape(n, 8) for n in (8, 4))
    write_gguf(tmp_path / "tiny.gguf", q, k)
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    decoder = open_source(tmp_path / "out").models["llm"]
    assert (decoder.vocab_size, decoder.width, decoder.num_kv_heads, decoder.tied) == (64, 8, 1, True)
    assert (decoder.rope_theta, decoder.norm_eps) == (1e5, 1e-5)
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(arrays["model.layers.0.self_attn.q_proj.weight"].astype(np.float32), q)
    np.testing.assert_array_equal(arrays["model.layers.0.self_attn.k_proj.weight"].astype(np.float32), k)
    embed = arrays["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(embed[6:], np.tile(np.arange(20, 28), (58, 1)))
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab<image>12<|end|><audio>").ids == [5, 6, 3, 4, 0, 7]


def write_model_bin(path: Path, key_bias: float, version: int = 6) -> dict[str, np.ndarray]:
    """A whisper of one layer a side, width 64, as CTranslate2 stores it; and its fused projections by name."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"encoder/conv1/weight": np.zeros((64, 80, 3)), "encoder/conv1/bias": np.zeros(64)}
    arrays |= {"encoder/conv2/weight": np.zeros((64, 64, 3)), "encoder/conv2/bias": np.zeros(64)}
    arrays |= {"decoder/embeddings/weight": np.zeros((5, 64))}
    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = np.zeros((6, 64))
        linears = {"self_attention/linear_0": 192, "self_attention/linear_1": 64}
        linears |= {"ffn/linear_0": 64, "ffn/linear_1": 64}
        norms = ["layer_norm", "layer_0/self_attention/layer_norm", "layer_0/ffn/layer_norm"]
        if side == "decoder":
            linears |= {"attention/linear_0": 64, "attention/linear_1": 128, "attention/linear_2": 64}
            norms.append("layer_0/attention/layer_norm")
        for name in norms:
            arrays |= {f"{side}/{name}/{leaf}": random.normal(size=64) for leaf in ("gamma", "beta")}
        for name, rows in linears.items():
            arrays[f"{side}/layer_0/{name}/weight"] = random.normal(size=(rows, 64))
            arrays[f"{side}/layer_0/{name}/bias"] = np.zeros(rows)
    arrays["encoder/layer_0/self_attention/linear_0/bias"][64:128] = key_bias
    text = lambda word: struct.pack("<H", len(word) + 1) + word.encode() + b"\0"
    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays) + 1)
    data += text("encoder/num_heads") + struct.pack("<BBI", 0, 2, 2) + b"\1\0"
    for name, array in arrays.items():
        values = array.astype(np.float16).tobytes()
        dims = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += text(name) + dims + struct.pack("<BI", 4, len(values)) + values
    path.mkdir()
    (path / "model.bin").write_bytes(data + struct.pack("<I", 0))
    (path / "tokenizer.json").write_text("{}")
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def test_a_ctranslate2_file_becomes_a_whisper_folder_with_its_fused_projections_apart(tmp_path: Path) -> None:
    stored = write_model_bin(tmp_path / "tiny", key_bias=0.0)
    whisper_tiny.convert(tmp_path / "tiny", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    layer = "model.encoder.layers.0.self_attn"
    fused = [found[f"{layer}.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(fused), stored["encoder/layer_0/self_attention/linear_0/weight"])
    assert f"{layer}.k_proj.bias" not in found and f"{layer}.v_proj.bias" in found
    crossed = [found[f"model.decoder.layers.0.encoder_attn.{name}_proj.weight"] for name in "kv"]
    np.testing.assert_array_equal(np.concatenate(crossed), stored["decoder/layer_0/attention/linear_1/weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_layers"], config["d_model"], config["max_source_positions"]) == (1, 64, 6)


def test_what_a_whisper_folder_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    write_model_bin(tmp_path / "biased", key_bias=1.0)
    with pytest.raises(DataError, match="encoder/layer_0/self_attention: its keys have a bias"):
        whisper_tiny.convert(tmp_path / "biased", tmp_path / "out")
    write_model_bin(tmp_path / "old", key_bias=0.0, version=5)
    with pytest.raises(DataError, match="version 5 of a WhisperSpec; only version 6"):
        whisper_tiny.convert(tmp_path / "old", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="python scripts/fetch.py smollm2 fetches it")
@pytest.mark.filterwarnings("ignore")
def test_smollm2_computes_what_transformers_computes_from_its_folder() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    chat = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")).encode(tokenizer.decode(ids)).ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0]
    said = answer[len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(said)
    (generated,) = generate.load(SMOLLM2, dtype="float32")([chat[0]["content"]], max_new_tokens=32)
    assert generated.tokens + [theirs.generation_config.eos_token_id] * generated.ended == said

    model = pretrained.decoder(str(SMOLLM2))
    graph = vlm((), Module("llm", model.module(jnp.float32, encoders=()), Layout()))
    tokens = answer.numpy().astype(np.int32)[None]
    whole = np.arange(tokens.shape[1], dtype=np.int32)[None]
    batch = dict(tokens=tokens, positions=whole, segment_ids=np.ones_like(whole))
    batch |= dict(targets=np.zeros_like(whole), weights=np.ones(whole.shape, np.float32))
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in batch.items()}
    sgd = OptimizerConfig(name="sgd")
    trainer = Trainer(TrainSpec(graph, jax.devices(), abstract, groups=1, num_microbatches=1, optimizer=sgd))
    state = initial.state(trainer, initial.open_starts(graph, {"llm": str(SMOLLM2)}))
    params = jax.tree.map(jnp.asarray, trainer.whole(state.params)["llm"])
    y = jax.jit(functools.partial(apply_module, graph.sink.definition))(params, {}, batch)
    ours = np.asarray(y["x"] @ y["head"])
    with torch.no_grad():
        expected = theirs(answer[None]).logits.numpy()
    assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected)
