"""Tiny folders that answer, with tokenizers of every kind, as they are on the hub: what transformers makes of them."""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
import pytest
import soundfile
from hf_folders import llava, qwen2_audio, text, vision
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hetjax.generate import Prompt

VOCAB = 369  # as many as the tokenizer of bytes finds: it has no free id
SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
]
TEXTS = [
    "what is it ? it is a blue circle . is it not ? yes , it is so : a red dog , and a green one .",
    "USER: what is the colour of it ASSISTANT: blue USER: and of the other ASSISTANT: red as a rose",
    "system You are a helpful assistant. user what ? assistant Audio 1: a dog Audio 2: a cat",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT: ' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(scheme: str) -> Tokenizer:
    """As Llama's: words are not cut before they are merged."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def words() -> Tokenizer:
    """Whatever stands between two spaces is one token: so is the end of a prompt with the answer's first word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "pieces, a space in front": lambda: pieces("first"),
    "pieces, a space in front of each": lambda: pieces("always"),
    "words": words,
}


def tokenizer(kind: str) -> Tokenizer:
    """One that knows every special token and has no id to spare beyond its own."""
    made = KINDS[kind]()
    if kind == "words":
        trainer: Any = trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, show_progress=False)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator(TEXTS * 4, trainer)
    return made


def config(name: str, vocab: int) -> dict[str, Any]:
    """Of a model with this class; `vocab` is all its ids."""
    language = text("llama", vocab_size=vocab, max_position_embeddings=256, bos_token_id=None, eos_token_id=None)
    index = SPECIALS.index
    if name == "llava":
        return llava(language, vision("siglip"), image_token_index=index("<image>"), image_seq_length=4)
    if name == "qwen2_audio":
        hearing = dict(num_mel_bins=80, max_source_positions=1500)
        made = qwen2_audio(language, audio_token_index=index("<|AUDIO|>"))
        return made | dict(audio_config=made["audio_config"] | hearing)
    return language


GENERATION = dict(
    eos_token_id=[2, 4], pad_token_id=4, do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.2,
    suppress_tokens=[12, 30], begin_suppress_tokens=[2, 4],
)  # fmt: skip


def folder(directory: Path, name: str, kind: str) -> Path:
    """A folder of random weights; Qwen2-Audio's has its template in the class of its processor."""
    made = tokenizer(kind)
    hf_folders.write(directory, config(name, VOCAB))
    made.save(str(directory / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|im_end|>",
        padding_side="left",
    )
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", GENERATION)
    if name == "llava":
        own = dict(processor_class="LlavaProcessor", image_token="<image>", patch_size=4, num_additional_image_tokens=0)
        write_json(directory / "processor_config.json", own | dict(vision_feature_select_strategy="full"))
        pixels = dict(image_processor_type="SiglipImageProcessor", size=dict(height=8, width=8), resample=3)
        write_json(directory / "preprocessor_config.json", pixels | dict(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    if name == "qwen2_audio":
        heard = dict(feature_extractor_type="WhisperFeatureExtractor", processor_class="Qwen2AudioProcessor")
        sizes = dict(feature_size=80, hop_length=160, n_fft=400, sampling_rate=16000, chunk_length=30)
        write_json(directory / "preprocessor_config.json", heard | sizes | dict(return_attention_mask=True))
    else:
        (directory / "chat_template.jinja").write_text(CHATML if name == "llava" else VICUNA)
    return directory


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def prompts(directory: Path, name: str) -> list[Prompt]:
    """Of one turn and of three, with a file and without."""
    files: dict[str, tuple[str, ...]] = {}
    rng = np.random.default_rng(0)
    if name == "llava":
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(directory / "a.png")
        files = {"image": (str(directory / "a.png"),)}
    if name == "qwen2_audio":
        soundfile.write(directory / "a.wav", 0.1 * rng.normal(size=4000).astype(np.float32), 16000)
        files = {"audio": (str(directory / "a.wav"),)}
    three = ("what is it ?", "blue circle", "and what is the other one ?")
    return [Prompt(("what is it ?",), files), Prompt(three, files), Prompt(three), Prompt(("is it so",))]


def today(monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    """Makes transformers' templates write this date."""
    from transformers.utils import chat_template_utils

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Fixed":
            return cls.fromisoformat(date)

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


class Theirs:
    """What transformers makes of a folder."""

    def __init__(self, directory: Path, name: str, *, loads: bool = True, strings: Sequence[str] = ()) -> None:
        import transformers

        self.name, self.strings = name, strings
        kind = transformers.AutoTokenizer if name == "decoder" else transformers.AutoProcessor
        self.processor = kind.from_pretrained(directory)
        if not loads:
            return
        architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
        self.model = getattr(transformers, architecture).from_pretrained(directory, dtype="float32").eval()

    def inputs(self, asked: Sequence[Prompt]) -> Any:
        """Those of the model for a batch of prompts."""
        texts = [
            self.processor.apply_chat_template(self.messages(p), add_generation_prompt=True, tokenize=False)
            for p in asked
        ]
        if self.name == "decoder":
            found = self.processor(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            found.pop("token_type_ids", None)
            return found
        opened = self.processor.tokenizer.bos_token and texts[0].startswith(self.processor.tokenizer.bos_token)
        kwargs: dict[str, Any] = dict(padding=True, return_tensors="pt", add_special_tokens=not opened)
        images = [Image.open(f) for p in asked for f in p.files.get("image", ())]
        sounds = [soundfile.read(f, dtype="float32")[0] for p in asked for f in p.files.get("audio", ())]
        if images:
            kwargs |= dict(images=images)
        if sounds:
            kwargs |= dict(audio=sounds, sampling_rate=16000)
        found = self.processor(text=texts, **kwargs)
        found.pop("token_type_ids", None)
        return found

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        whole = self.name != "decoder"
        made: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": t}] if whole and role not in self.strings else t}
            for role, t in zip(("user", "assistant") * len(prompt.turns), prompt.turns, strict=False)
        ]
        for field in prompt.files:
            made[0]["content"].insert(0, {"type": field})
        return made

    def ids(self, prompt: Prompt) -> list[int]:
        return self.inputs([prompt])["input_ids"][0].tolist()

    def answers(self, asked: Sequence[Prompt], count: int) -> list[list[int]]:
        """The answers of one batch, up to what ends them."""
        import torch

        inputs = self.inputs(asked)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=count, do_sample=False)
        stops = np.atleast_1d(np.asarray(self.model.generation_config.eos_token_id))
        answers = [row.tolist() for row in out[:, inputs["input_ids"].shape[1] :]]
        return [row[: next((n for n, id in enumerate(row) if id in stops), len(row))] for row in answers]
