"""What lies beside a Hugging Face model's weights and decides its prompts: tokenizer, template, processor."""

import logging
from typing import Any

from tokenizers import Tokenizer

from hetjax.data import ItemSpec, Pictures
from hetjax.data.items import Reader
from hetjax.generate.chat import FolderChat
from hetjax.hf import audio, pictures, processor, prompts
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.source import Extras, Source, read_json
from models.vit import ViT
from models.whisper import Whisper

LOG = logging.getLogger(__name__)


def chat(source: Source, extras: Extras, date: str | None) -> FolderChat:
    """How the folder's prompts are made, on a `date` (None: today). Raises ConvertError for what is not supported."""
    files, tokenizer = extras.files, prompts.tokenizer(extras.files, source.path)
    encoders = {name: model for name, model in source.models.items() if not hasattr(model, "vocab_size")}
    items = [_item(source, extras, name, model, tokenizer) for name, model in encoders.items()]
    whole = bool(encoders)
    kind = registry.WHOLE_OF_KIND.get((extras.config or {}).get("model_type", ""))
    template = prompts.template(files, kind.chat_template if kind else None, whole=whole)
    ignored = prompts.ignored(files, whole=whole)
    if ignored:
        LOG.warning("%s: not used, as in transformers: %s", source.path, ignored)
    told, model = _json(extras, prompts.CONFIG), (extras.config or {}).get("model_type", "")
    other = prompts.otherwise(_json(extras, prompts.TOKENIZER), told, model)
    if other:
        LOG.warning(
            "%s: ids are those of its tokenizer.json, as in transformers 4; AutoTokenizer of version 5 reads it as %s",
            *(source.path, other),
        )
    return FolderChat(tokenizer, template, items, specials=prompts.specials(files), processor=whole, date=date)


def longest(extras: Extras) -> int | None:
    """Positions that the model was made for."""
    config = extras.config or {}
    return (config.get("text_config") or config).get("max_position_embeddings")


def _json(extras: Extras, name: str) -> dict[str, Any]:
    return read_json(extras.files[name]) if name in extras.files else {}


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
