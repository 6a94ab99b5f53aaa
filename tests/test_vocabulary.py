"""A decoder whose vocabulary is full becomes a vision-language model too: its export has rows for the picture's token.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path

import hf_folders
import numpy as np
import pytest
import runs
from PIL import Image
from tokenizers import Tokenizer

from hetjax import convert, generate, train
from hetjax.data import Loader
from hetjax.hf import vocabulary
from hetjax.hf.parts import Parts
from hetjax.hf.stored import open_source
from hetjax.hf.tensors import Tensor
from models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FULL = 30  # the words of the runs' tokenizer
SIZES = dict(vocab_size=FULL, hidden_size=16, intermediate_size=32, head_dim=4, rms_norm_eps=1e-6)
TOKENIZERS = ("without a token for pictures", "with one that has no row")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_run_from_a_full_vocabulary_answers_in_transformers_as_it_does_here(
    tmp_path: Path, tokenizer: str, tied: bool
) -> None:
    gin = runs.write(tmp_path)
    config = hf_folders.text("llama", **SIZES, max_position_embeddings=77, tie_word_embeddings=tied)
    llama = hf_folders.write(tmp_path / "llama", config)
    path = tmp_path / "train" / "tokenizer.json"
    if tokenizer == TOKENIZERS[1]:
        words = Tokenizer.from_file(str(path))
        words.add_special_tokens(["<image>"])
        assert words.token_to_id("<image>") == FULL
        words.save(str(path))
    path.rename(llama / "tokenizer.json")
    changes = runs.layouts(vision=dict(), llm=dict()) | runs.settings(steps=8, log_every=8, num_microbatches=1)
    changes |= runs.settings(init_from={"llm": str(llama)}) | {"vit.ViT.feature_layer": -2}
    changes |= {"decoder.Decoder.vocab_size": FULL, "decoder.Decoder.tied": tied}
    changes |= {"train/settings.DataConfig.tokenizer": str(llama / "tokenizer.json")}
    assert train.main(runs.arguments(gin, tmp_path / "run", changes)) == 0
    assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    text = written["text_config"]
    assert (written["image_token_index"], text["vocab_size"]) == (FULL, vocabulary.MULTIPLE)
    assert text["max_position_embeddings"] == 77, "the rest is that of the folder"
    rows = hf_folders.read(tmp_path / "out")["language_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(
        rows[:FULL], open_source(tmp_path / "run").fetch(["llm/first/embed"])["llm/first/embed"]
    )
    samples = list(Loader(runs.load(gin, changes).data, [runs.ITEM]).samples.values())
    asked = [(s.turns[0], [str(tmp_path / "train" / name) for name in s.files["vision"]]) for s in samples[:4]]
    prompts = [generate.ask(question, image=pictures) for question, pictures in asked]
    answers = [a.tokens for a in generate.load(tmp_path / "run")(prompts, max_new_tokens=6)]
    assert [in_transformers(tmp_path / "out", *each) for each in asked] == answers
    assert [a.tokens for a in generate.load(tmp_path / "out")(prompts, max_new_tokens=6)] == answers and len(
        set(map(tuple, answers))
    ) > 2


def in_transformers(folder: Path, question: str, pictures: list[str]) -> list[int]:
    """The ids of an answer, without its end."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[Image.open(path) for path in pictures] or None, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return said[: said.index(end)] if end in said else said


@pytest.mark.parametrize("dtype", [np.float32, hf_folders.ml_dtypes.bfloat16])
def test_a_new_row_of_the_head_never_has_the_largest_logit(dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(FULL, 16)).astype(dtype)
    head = Tensor(values.shape, values.dtype, lambda: values)
    parts = Parts(llm=Decoder(vocab_size=FULL, width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=8))
    models, found = vocabulary.grown(parts, {"lm_head.weight": head}, FULL)
    grown = found["lm_head.weight"].read()
    assert models.llm is not None and grown.shape == (models.llm.vocab_size, 16) == (64, 16) and grown.dtype == dtype
    logits = rng.normal(size=(1000, 16)) @ grown.astype(np.float64).T
    assert (logits.argmax(1) < FULL).all()
    assert vocabulary.grown(parts, {"lm_head.weight": head}, FULL - 1)[0] is parts, "an id that is there needs no row"
