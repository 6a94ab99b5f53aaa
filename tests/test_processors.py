"""Pictures and texts become the very pixels and ids that transformers' processors make of the same files and folder.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hetjax.data import DataConfig, ItemSpec, Pictures, Template, tokens
from hetjax.hf import pictures

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
READERS = {
    "siglip": Pictures(24, 24),
    "siglip, other colours": Pictures(16, 16, CLIP_MEAN, CLIP_STD),
    "clip": Pictures(24, 24, CLIP_MEAN, CLIP_STD, shortest_edge=24),
    "clip, of a larger picture": Pictures(21, 21, CLIP_MEAN, CLIP_STD, shortest_edge=32),
    "clip, padded with black": Pictures(24, 24, CLIP_MEAN, CLIP_STD, shortest_edge=17),
    "llava, padded to a square": Pictures(24, 24, CLIP_MEAN, CLIP_STD, pad_to_square=True),
    "llava, the middle of a padded square": Pictures(21, 21, CLIP_MEAN, CLIP_STD, shortest_edge=32, pad_to_square=True),
    "siglip 2": Pictures(24, 24, resampling="bilinear"),
}


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, size, np.uint8)


def palette(image: Image.Image, **options: Any) -> Callable[[Path], None]:
    return lambda path: image.convert("P", palette=Image.Palette.ADAPTIVE).save(path, **options)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    Image.fromarray(noise(20, 31, 3)).save(path, exif=exif)


FILES: dict[str, Callable[[Path], None]] = {
    "rgb.png": Image.fromarray(noise(33, 50, 3)).save,
    "tall.png": Image.fromarray(noise(61, 23, 3)).save,
    "tiny.png": Image.fromarray(noise(3, 2, 3)).save,
    "square.png": Image.fromarray(noise(24, 24, 3)).save,
    "long.png": Image.fromarray(noise(5, 301, 3)).save,
    "photo.jpg": Image.fromarray(noise(40, 57, 3)).save,
    "cmyk.jpg": Image.fromarray(noise(30, 41, 4), "CMYK").save,
    "rgba.png": Image.fromarray(noise(29, 35, 4)).save,
    "grey.png": Image.fromarray(noise(31, 27)).save,
    "grey-alpha.png": Image.fromarray(noise(31, 27, 2), "LA").save,
    "bits.png": Image.fromarray(noise(37, 26)).convert("1").save,
    "palette.png": palette(Image.fromarray(noise(30, 44, 3))),
    "palette-transparent.png": palette(Image.fromarray(noise(30, 44, 3)), transparency=bytes(range(200))),
    "animated.gif": lambda path: Image.fromarray(noise(30, 44, 3)).save(
        path, save_all=True, append_images=[Image.fromarray(noise(30, 44, 3)[::-1])], disposal=2
    ),
    "rgb-transparent.png": lambda path: Image.fromarray(noise(9, 9, 3) // 128 * 128).save(
        path, transparency=(0, 0, 128)
    ),
    "grey-transparent.png": lambda path: Image.fromarray(noise(31, 27) // 64 * 64).save(path, transparency=128),
    "lab.tif": Image.new("LAB", (9, 7), (120, 30, 200)).save,
    "colour-transparent.gif": palette(Image.fromarray(noise(30, 44, 3)), transparency=7),
    "rotated.jpg": rotated,
}


@pytest.mark.parametrize("name", list(READERS))
def test_pixels_are_those_of_transformers_bit_for_bit(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    (tmp_path / pictures.FILE).write_text(json.dumps(pictures.write(reader)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert pictures.read({pictures.FILE: tmp_path / pictures.FILE}) == reader
    for file, save in FILES.items():
        save(tmp_path / file)
        image = transformers.image_utils.load_image(str(tmp_path / file))
        theirs = processor(image, return_tensors="np")
        assert reader.look(tmp_path / file).rows == 0
        ours = reader.read(tmp_path / file)
        np.testing.assert_array_equal(ours["pixels"], theirs["pixel_values"][0].transpose(1, 2, 0), err_msg=file)


CLIP_HUB = dict(
    crop_size=24, do_center_crop=True, do_normalize=True, do_resize=True, feature_extractor_type="CLIPFeatureExtractor",
    image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD), resample=3, size=24,
)  # fmt: skip
LLAVA_HUB = dict(image_processor_type="LlavaImageProcessorFast", do_pad=True, size=dict(shortest_edge=24), crop_size=24)
SIGLIP_HUB = dict(image_processor_type="SiglipImageProcessor", size=dict(height=24, width=24), image_mean=[0.5] * 3)
FORMS: dict[str, tuple[dict[str, Any], Pictures]] = {
    "clip, first form": (CLIP_HUB, READERS["clip"]),
    "clip, defaults": (
        dict(image_processor_type="CLIPImageProcessorFast"),
        Pictures(224, 224, CLIP_MEAN, CLIP_STD, shortest_edge=224),
    ),
    "clip, a square first": (CLIP_HUB | dict(size=dict(height=24, width=24)), Pictures(24, 24, CLIP_MEAN, CLIP_STD)),
    "clip, a number for a square": (CLIP_HUB | dict(default_to_square=True), Pictures(24, 24, CLIP_MEAN, CLIP_STD)),
    "clip, pairs": (CLIP_HUB | dict(size=[24, 24], crop_size=[24, 24]), Pictures(24, 24, CLIP_MEAN, CLIP_STD)),
    "clip by its model": ({k: v for k, v in CLIP_HUB.items() if "type" not in k}, READERS["clip"]),
    "llava, of which no picture is padded": (
        dict(image_processor_type="LlavaImageProcessor", size=dict(shortest_edge=24), crop_size=24),
        READERS["clip"],
    ),
    "llava, padded": (LLAVA_HUB, dataclasses.replace(READERS["clip"], pad_to_square=True)),
    "llava, padded and not cut": (LLAVA_HUB | dict(do_center_crop=False), READERS["llava, padded to a square"]),
    "siglip 2": (SIGLIP_HUB | dict(resample=2), READERS["siglip 2"]),
    "siglip": (SIGLIP_HUB, READERS["siglip"]),
    "siglip, a number for a square": (SIGLIP_HUB | dict(size=24, default_to_square=True), READERS["siglip"]),
    "siglip, as they are": (SIGLIP_HUB | dict(do_normalize=False), Pictures(24, 24, (0.0,) * 3, (1.0,) * 3)),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_the_hub_are_read_as_transformers_reads_them(form: str, tmp_path: Path) -> None:
    config, reader = FORMS[form]
    (tmp_path / pictures.FILE).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert pictures.read({pictures.FILE: tmp_path / pictures.FILE}) == reader
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    FILES["rgb.png"](tmp_path / "a.png")
    theirs = processor(Image.open(tmp_path / "a.png"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(reader.read(tmp_path / "a.png")["pixels"], theirs)


def test_transformers_5_s_own_files_are_read(tmp_path: Path) -> None:
    (tmp_path / pictures.NESTED).write_text(json.dumps({"image_processor": SIGLIP_HUB, "image_token": "<image>"}))
    assert pictures.read({pictures.NESTED: tmp_path / pictures.NESTED}) == READERS["siglip"]
    (tmp_path / pictures.NESTED).write_text(json.dumps({"image_token": "<image>"}))
    assert pictures.read({pictures.NESTED: tmp_path / pictures.NESTED}) is None and pictures.read({}) is None


# -- texts -----------------------------------------------------------------------------------------------------------

TEXTS = ["what is it ?", "a red  circle,\nand a blue one .", "is it so ? yes .", "whatsoever it isn't, naïve café"]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(prepend: str) -> Tokenizer:
    """As Llama's: a space is a mark, and stands before the first piece alone, or before each."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return tokenizer


def llama() -> Tokenizer:
    """As Llama's first form, whose normaliser prepends the mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "marks before the first piece": lambda: pieces("first"),
    "marks before each piece": lambda: pieces("always"),
    "marks by a normaliser": llama,
}
VISION = ItemSpec("vision", 3, Pictures(8, 8))
TURNS = ("<image>\nwhat is it ? it", "a circle .")
TEMPLATE = Template(start="<s>", human_prefix="USER<|im_start|> ", human_suffix=" ASSISTANT:", end_token="</s>")


@pytest.mark.parametrize("placeholder", ["has a token", "gets a token"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ids_are_those_of_transformers_for_texts_special_tokens_and_prompts(
    kind: str, placeholder: str, tmp_path: Path
) -> None:
    tokenizer = KINDS[kind]()
    specials = [*SPECIALS, "<image>"] if placeholder == "has a token" else SPECIALS
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    path = str(tmp_path / "tokenizer.json")
    config = DataConfig("a.json", seq_len=64, samples_per_group=1, tokenizer=path, template=TEMPLATE)
    ours = tokens.load_tokenizer(config, [VISION])
    for text in [*TEXTS, "<s> it is</s> so", "<|im_start|>user\nis it<|im_end|>\n"]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]

    spelled = tokens.Speller(ours, [VISION], TEMPLATE).spell(TURNS[:1], {"vision": [3]})
    prompt = TEMPLATE.start + TEMPLATE.human_prefix + TURNS[0] + TEMPLATE.human_suffix
    expected = theirs(prompt.replace("<image>", "<image>" * 3), add_special_tokens=False)["input_ids"]
    image = theirs.convert_tokens_to_ids("<image>")
    assert spelled.tokens == [tokens.NO_TEXT if token == image else token for token in expected]
    assert spelled.starts == {"vision": [expected.index(image)]} and expected.count(image) == 3
    text = "<s>is it</s> a <|im_start|>circle <|im_end|>"  # of a user, who may write what he likes
    bare = tokens.Speller(ours, [VISION], Template(human_suffix="", end_token="</s>"))
    spelled = bare.spell((text,), {"vision": []})
    assert spelled.tokens == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokens.vocab_size(ours, [VISION]) == 1 + max(id for t, id in theirs.get_vocab().items() if t != "<image>")
