"""What lies beside a Hugging Face model's weights and decides its prompts: tokenizer, template, processor, stops."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from hetjax.data import ItemSpec, Pictures
from hetjax.data.items import Reader
from hetjax.data.tokens import open_tokenizer
from hetjax.generate.chat import FolderChat
from hetjax.hf import audio, pictures, processor
from hetjax.hf.errors import ConvertError
from hetjax.hf.source import Extras, Source, read_json
from models.vit import ViT
from models.whisper import Whisper

SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def chat(source: Source, extras: Extras) -> FolderChat:
    """How the folder's prompts are made. Raises ConvertError for what is missing or not supported."""
    tokenizer = _tokenizer(source, extras)
    encoders = {name: model for name, model in source.models.items() if not hasattr(model, "vocab_size")}
    items = [_item(source, extras, name, model, tokenizer) for name, model in encoders.items()]
    settings = _json(extras, "tokenizer_config.json")
    specials = {name: _text(settings[name]) for name in SPECIALS if settings.get(name)}
    return FolderChat(tokenizer, _template(extras, settings), items, specials=specials, processor=bool(encoders))


def stops(extras: Extras, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer: those of the generation settings, else of the model's, else the tokenizer's."""
    config = extras.config or {}
    for settings in (_json(extras, "generation_config.json"), config.get("text_config") or {}, config):
        found = settings.get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    text = _json(extras, "tokenizer_config.json").get("eos_token")
    found = tokenizer.token_to_id(_text(text)) if text else None
    return [] if found is None else [found]


def longest(extras: Extras) -> int | None:
    """Positions that the model was made for."""
    config = extras.config or {}
    return (config.get("text_config") or config).get("max_position_embeddings")


def _json(extras: Extras, name: str) -> dict[str, Any]:
    return read_json(extras.files[name]) if name in extras.files else {}


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _tokenizer(source: Source, extras: Extras) -> Tokenizer:
    path = extras.files.get("tokenizer.json")
    if path is None:
        raise ConvertError(
            f"{source.path}: tokenizer.json is missing; save the tokenizer with transformers' save_pretrained there"
        )
    return open_tokenizer(path)


def _template(extras: Extras, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else what older files keep in JSON; of several by name the one called default."""
    if "chat_template.jinja" in extras.files:
        return extras.files["chat_template.jinja"].read_text(encoding="utf-8")
    found = _json(extras, "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _item(source: Source, extras: Extras, name: str, model: Any, tokenizer: Tokenizer) -> ItemSpec:
    """What an encoder of the folder reads, as its processor does."""
    reader: Reader
    if isinstance(model, ViT):
        field, reader = "image", _pictures(source, extras, model)
    elif isinstance(model, Whisper):
        field, reader = "audio", audio.reader(_json(extras, pictures.FILE), model, f"{source.path}: {pictures.FILE}")
    else:
        raise ConvertError(f"{source.path}: prompts for a {type(model).__name__} are not supported")
    token = processor.item_token(extras, field)
    placeholder = None if token is None else tokenizer.id_to_token(token)
    if placeholder is None:
        raise ConvertError(f"{source.path}: {field}_token_index={token} is no token of tokenizer.json; get both again")
    return ItemSpec(name, rows=model.rows, reader=reader, field=field, placeholder=placeholder)


def _pictures(source: Source, extras: Extras, model: ViT) -> Pictures:
    """The reader that the picture processor's settings describe. Raises ConvertError for another kind."""
    reader = pictures.read(extras.files)
    if reader is None:
        raise ConvertError(f"{source.path}: {pictures.FILE} is missing; it says how pictures are read")
    if (reader.height, reader.width) != (model.image_size, model.image_size):
        raise ConvertError(
            f"{source.path}: {pictures.FILE} makes pictures of {reader.height} x {reader.width}, but the tower takes "
            f"{model.image_size} x {model.image_size}; get both again"
        )
    return reader
