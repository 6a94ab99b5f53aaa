"""Generation: the cache computes what the whole sequence does, draws follow their distribution, bad input is named."""

import json
from pathlib import Path
from typing import Any

import answering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hf_folders import llava, text, vision
from safetensors.numpy import load_file, save_file

from hetjax import generate
from hetjax.core import stacks
from hetjax.generate import __main__ as command
from hetjax.generate import cached
from hetjax.generate.generator import bucket
from hetjax.generate.sample import Draw, Sampling, kept, pick
from hetjax.judge.reference import apply_module
from models.axes import ONE_DEVICE
from models.decoder import Decoder
from models.moe import Experts

Arrays = dict[str, np.ndarray]
PROMPTS, NEW = (5, 9, 2), 7  # tokens
EXPERTS = dict(experts=Experts(count=4, per_token=2, width=8, dense_layers=(1,)))  # three runs of layers


def params_of(model: Decoder, dtype: Any) -> Any:
    definition = model.module(dtype)
    keys = jax.random.split(jax.random.key(0), model.num_layers)
    params = {
        "first": definition.first.init(jax.random.key(1)),
        "layers": stacks.init(definition.layers, keys),
        "last": definition.last.init(jax.random.key(2)),
    }
    if model.tied:
        params["last"]["head"] = params["first"]["embed"]
    return jax.tree.map(lambda a: a.astype(dtype), params)


def row_batch(tokens: np.ndarray, lengths: np.ndarray) -> Arrays:
    """Rows of `lengths` tokens, padded behind."""
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    inside = place < lengths[:, None]
    return dict(tokens=tokens, positions=place * inside, segment_ids=inside.astype(np.int32), lengths=lengths)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-11), pytest.param(jnp.float32, 1e-5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "changes", [dict(), dict(sliding_window=3, tied=True), EXPERTS], ids=["whole", "window", "moe"]
)
def test_every_step_of_the_cache_gives_the_logits_of_the_whole_sequence(
    dtype: Any, tolerance: float, changes: dict[str, Any], x64: None
) -> None:
    model = tiny.decoder(num_layers=3, **changes)
    definition, params = model.module(dtype), params_of(model, dtype)
    lengths = np.array(PROMPTS, np.int32)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, max(PROMPTS) + NEW)).astype(np.int32)

    batch = row_batch(tokens[:, : max(PROMPTS)], lengths)
    prefill = jax.jit(lambda batch: cached.prefill(definition, params, {}, batch, ONE_DEVICE, NEW))
    step = jax.jit(lambda *inputs: cached.step(definition, params, *inputs, ONE_DEVICE))
    logits, memory = prefill(batch)
    got = [logits]
    for n in range(NEW):
        inputs = memory, tokens[np.arange(3), lengths + n], lengths + n, jnp.int32(max(PROMPTS) + n)
        logits, memory = step(*inputs)
        got.append(logits)

    everything = {k: jnp.asarray(v) for k, v in row_batch(tokens, lengths + NEW).items()}
    y = apply_module(definition, params, {}, everything)
    whole = np.asarray(y["x"] @ y["head"])
    for n, logits in enumerate(got):
        np.testing.assert_allclose(logits, whole[np.arange(3), lengths - 1 + n], rtol=0, atol=tolerance)


def test_draws_follow_what_temperature_top_k_and_top_p_leave() -> None:
    logits = np.log(np.array([[0.05, 0.4, 0.15, 0.3, 0.1]], np.float32))
    draw = lambda **changes: Draw(**(dict(temperature=1.0, top_k=5, top_p=1.0, seed=0, prompt=None) | changes))
    left = lambda **changes: np.flatnonzero(np.isfinite(np.asarray(kept(jnp.asarray(logits), draw(**changes)))[0]))
    assert left().tolist() == [0, 1, 2, 3, 4]
    assert left(top_k=2).tolist() == [1, 3]
    assert left(top_p=0.6).tolist() == [1, 3]  # 0.4 alone is too little
    assert left(top_p=0.71).tolist() == [1, 2, 3]
    assert left(top_p=1e-6).tolist() == [1]
    assert left(top_k=3, top_p=0.8).tolist() == [1, 3]  # of the three kept, 0.4 and 0.3 are 82 %
    assert left(top_p=0.5, temperature=0.25).tolist() == [1]

    count = 20000
    many = np.repeat(logits, count, 0)
    wanted = np.array([0, 0.4, 0.15, 0.3, 0]) ** 2  # temperature 1/2 squares the odds
    rows = draw(temperature=0.5, top_k=3, prompt=np.arange(count, dtype=np.int32))
    tokens = np.asarray(pick(jnp.asarray(many), 5, ONE_DEVICE, rows, 3))
    shares = np.bincount(tokens, minlength=5) / count
    np.testing.assert_allclose(shares, wanted / wanted.sum(), atol=0.015)  # four standard errors
    again = np.asarray(pick(jnp.asarray(many[:7]), 5, ONE_DEVICE, rows._replace(prompt=rows.prompt[:7]), 3))
    np.testing.assert_array_equal(tokens[:7], again)
    padded = jnp.pad(jnp.asarray(many), ((0, 0), (0, 3)), constant_values=9.0)
    np.testing.assert_array_equal(tokens, np.asarray(pick(padded, 5, ONE_DEVICE, rows, 3)))
    assert (tokens != np.asarray(pick(jnp.asarray(many), 5, ONE_DEVICE, rows, 4))).any()
    assert (tokens != np.asarray(pick(jnp.asarray(many), 5, ONE_DEVICE, rows._replace(seed=1), 3))).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("hf") / "folder", llava(text("llama"), vision("siglip")))


@pytest.fixture(scope="module")
def model(folder: Path) -> generate.Generator:
    return generate.load(folder)


def test_drawn_answers_depend_on_the_seed_and_not_on_layout_or_batch(
    folder: Path, model: generate.Generator, tmp_path: Path
) -> None:
    asked = answering.prompts(tmp_path, vision=True)
    tokens = lambda model, **changes: [
        a.tokens
        for a in model(
            asked,
            max_new_tokens=8,
            sampling=Sampling(temperature=1.0, top_k=20, seed=changes.pop("seed", 5)),
            **changes,
        )
    ]
    drawn = tokens(model)
    assert tokens(model, batch_size=2) == drawn
    assert tokens(generate.load(folder, dp=2, tp=2)) == drawn
    assert tokens(model, seed=6) != drawn
    assert len({tuple(t) for t in tokens(model)}) == len(asked)


def test_an_answer_stops_at_an_end_token_and_others_go_on(
    model: generate.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering.prompts(tmp_path, vision=True)
    drawn = Sampling(temperature=1.0, top_k=20)
    whole = model(asked, max_new_tokens=20, sampling=drawn)
    assert all(len(a.tokens) == 20 and not a.ended for a in whole)
    end = whole[0].tokens[5]
    cut = lambda tokens: tokens[: tokens.index(end)] if end in tokens else tokens
    monkeypatch.setattr(model.engine, "stops", (end,))
    answers = model(asked, max_new_tokens=20, sampling=drawn)
    assert [a.tokens for a in answers] == [cut(a.tokens) for a in whole]
    assert [a.ended for a in answers] == [end in a.tokens for a in whole]
    assert answers[0].ended and not all(a.ended for a in answers)


def test_what_is_stored_in_float64_answers_in_float64(tmp_path: Path, x64: None) -> None:
    directory = answering.folder(tmp_path / "folder", text("llama"))
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v.astype(np.float64) for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    jax.config.update("jax_enable_x64", False)  # as it is before the first array
    model = generate.load(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.engine.params)} == {np.dtype(np.float64)}
    assert len(model(["w3", "w4"], max_new_tokens=2)) == 2


def test_a_shape_compiles_once(model: generate.Generator, compilations: Any) -> None:
    model(["w3 w4 w5", "w6"], max_new_tokens=6)
    compilations.reset()
    model(["w9", "w3 w4 w5 w6"], max_new_tokens=5)
    assert compilations.count == 0


def test_buckets_are_powers_of_two_times_the_least() -> None:
    assert [bucket(n) for n in (1, 16, 17, 33, 64, 65)] == [16, 16, 32, 64, 64, 128]
    assert [bucket(n, 1) for n in (0, 1, 2, 3, 5)] == [1, 1, 2, 4, 8]


def test_the_command_answers_files_of_conversations(folder: Path, tmp_path: Path, capsys: Any) -> None:
    picture = Path(answering.picture(tmp_path / "a.png", 0))
    value = {"id": "x", "image": picture.name, "conversations": [{"from": "human", "value": "<image> w3"}]}
    answered = value | {"id": "y"} | {"conversations": [*value["conversations"], {"from": "gpt", "value": "w9"}]}
    lines = tmp_path / "asked.jsonl"
    lines.write_text(f"{json.dumps(value)}\n\n{json.dumps(answered)}\n")
    flags = [f"--model={folder}", "--max_new_tokens=4"]
    assert command.main([*flags, f"--prompts={lines}"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["id"] == "x" and first["tokens"] == 4 and first["answer"] == second["answer"]
    assert command.main([*flags, "--prompt=<image> w3", f"--image={picture}"]) == 0
    assert capsys.readouterr().out.strip() == first["answer"]


REFUSED = {
    "no such model": (dict(model="nowhere"), "nowhere: no such directory"),
    "no such picture": (dict(image=["gone.png"]), "gone.png: there is no such file"),
    "no encoder": (dict(audio=["a.ogg"]), "audio a.ogg: the model has no encoder for audio; it takes image"),
    "too few pictures": (dict(prompt=["<image> <image> w3"], image=["PICTURE"]), "2 <image>, image names 1 files"),
    "too long": (dict(prompt=["w3 " * 300]), "exceeds the model's 256 positions"),
    "tp": (dict(tp=[3]), "tp=3 does not divide heads=4"),
    "devices": (dict(tp=[4], dp=[4]), "there are 8"),
    "temperature": (dict(temperature=[-1]), "temperature=-1.0; it must be 0"),
    "greedy with top_k": (dict(top_k=[5]), "do nothing at temperature=0"),
    "top_p": (dict(temperature=[1], top_p=[0]), "top_p=0.0; it must be above 0"),
    "no tokens": (dict(max_new_tokens=[0]), "max_new_tokens=0; it must be at least 1"),
    "broken lines": (dict(prompt=[], prompts=["LINES"]), "asked.jsonl:1: line 1 is not JSON"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_answered_is_refused_by_name(case: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    changes, message = REFUSED[case]
    (tmp_path / "asked.jsonl").write_text("{")
    known = {"PICTURE": answering.picture(tmp_path / "a.png", 0), "LINES": str(tmp_path / "asked.jsonl")}
    settings: dict[str, Any] = dict(model=str(folder), prompt=["w3"], max_new_tokens=[4]) | changes
    lists = {name: [v] if isinstance(v, str) else v for name, v in settings.items()}
    assert command.main([f"--{name}={known.get(v, v)}" for name, values in lists.items() for v in values]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_tower_alone_and_a_broken_folder_cannot_answer(tmp_path: Path) -> None:
    answering.folder(tmp_path / "llm", text("llama"))
    (tmp_path / "llm" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        generate.load(tmp_path / "llm")
    answering.hf_folders.write(tmp_path / "tower", vision("clip"))
    with pytest.raises(ValueError, match="holds no language model"):
        generate.load(tmp_path / "tower")
    whole = answering.folder(tmp_path / "whole", llava(text("llama"), vision("clip")))
    settings = whole / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"resample": 3', '"resample": 0'))
    with pytest.raises(ValueError, match=r"resample=0: pictures are resized with one of"):
        generate.load(whole)
