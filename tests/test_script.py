"""Texts stay texts under tokenizers of every kind; those whose vocabulary makes special tokens of texts say so."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hetjax.data.problems import SampleError
from hetjax.data.script import Script

PIECES = ["<unk>", "</s>", "▁a", "▁", "a", "b", "</", "s", ">", "<", "image"]


def unigram() -> Tokenizer:
    """The special tokens are likely pieces, as sentencepiece stores them."""
    found = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(PIECES)], unk_id=0))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    return found


def bpe() -> Tokenizer:
    """As Llama's: the special tokens are in the vocabulary, and no merge leads there."""
    found = Tokenizer(models.BPE({piece: n for n, piece in enumerate([*PIECES, *"/ige"])}, [], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    return found


def words() -> Tokenizer:
    found = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>"))
    found.normalizer = normalizers.Strip()
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


def ids(script: Script, text: str) -> list[int | str]:
    return [token.meaning for token in script.read(text)]


@pytest.mark.parametrize("make", [unigram, bpe, words])
def test_what_is_meant_is_special_and_what_is_text_is_not(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokenizer.add_special_tokens(["<unk>", "</s>", "<image>"])
    script, end, image = Script(tokenizer, ["<image>"]), 1, tokenizer.token_to_id("<image>")
    for text in ("a b", "a ü b", "a", ""):  # ü is unknown
        assert ids(script, script.plain(text)) == tokenizer.encode(text).ids
    both = script.meant("a</s>") + script.plain("<image> a", ["<image>"]) + script.meant("</s>")
    wanted = tokenizer.encode("a</s><image> a</s>").ids
    assert ids(script, both) == ["<image>" if id == image else id for id in wanted] and wanted.count(end) == 2
    try:
        assert end not in ids(script, script.plain("a </s> a")) and make is bpe
    except SampleError as error:
        assert "its text spells </s>, which the tokenizer cannot write as text" in str(error) and make is not bpe
    with pytest.raises(SampleError, match="Unicode gives no meaning"):
        script.plain("a \U0010fffe0\U0010fffe")
