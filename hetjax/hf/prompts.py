"""Where a folder says how prompts are written: its chat template, the names of its special tokens, its tokenizer.

Each is taken from the file that transformers 5 takes it from, for a processor or for a tokenizer alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hetjax.data.tokens import open_tokenizer
from hetjax.hf import pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.source import read_json

CONFIG, MAP, ADDED, TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JINJA, LEGACY, NAMED = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"

Files = Mapping[str, Path]


def template(files: Files, default: str | None, *, whole: bool) -> str | None:
    """The chat template: of a processor (`whole`), whose class may have a `default`, or of a tokenizer alone.

    None: there is none. Raises ConvertError where transformers could not choose."""
    named = {Path(name).stem: path for name, path in files.items() if name.startswith(NAMED)}
    found: Any = {name: _read(path) for name, path in named.items()}
    if JINJA in files:
        found["default"] = _read(files[JINJA])
    if not whole:
        return _default(found or _json(files, CONFIG).get("chat_template"), files, CONFIG)
    if LEGACY in files:
        if named:
            raise ConvertError(f"{files[LEGACY]} and {NAMED} both hold chat templates; remove one of them")
        found = read_json(files[LEGACY]).get("chat_template")
    nested = _json(files, pictures.NESTED).get("chat_template")
    return _default(found if nested is None else nested, files, JINJA) or default


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path}: a chat template that is not UTF-8 ({error}); save it as UTF-8") from error


def _default(found: Any, files: Files, name: str) -> str | None:
    """Of several templates by name the one called default."""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if not found or isinstance(found, str):
        return found or None
    if "default" not in found:
        where = files[name].parent if name in files else next(iter(files.values())).parent
        raise ConvertError(f"{where}: of its chat templates ({', '.join(found)}) none is called default; rename one")
    return found["default"]


def ignored(files: Files, *, whole: bool) -> str:
    """The file with a chat template that transformers does not look into, in words; "": none."""
    if whole and "chat_template" in _json(files, CONFIG) and not {JINJA, LEGACY} & files.keys():
        return f"{CONFIG}: chat_template (a processor does not read it)"
    if not whole and LEGACY in files:
        return f"{LEGACY} (a tokenizer does not read it)"
    return ""


def otherwise(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], kind: str) -> str:
    """As what AutoTokenizer of transformers 5 makes other ids than tokenizer.json says; "": it makes the same.

    `settings`: tokenizer_config.json; `kind`: the model_type. Version 4 takes the file as it stands, and so do
    PreTrainedTokenizerFast and we."""
    if settings.get("split_special_tokens"):
        return "one with split_special_tokens, to which no token is special"
    name = _class(settings.get("tokenizer_class") or "", kind)
    cutting = tokenizer.get("pre_tokenizer") or {}
    cuts = cutting.get("pretokenizers", [cutting] if cutting else [])
    same = _makes(name, tokenizer.get("normalizer"), cuts, bool(settings.get("add_prefix_space")))
    return "" if same else name


def _class(name: str, kind: str) -> str:
    """The class that AutoTokenizer takes: for some models it is fixed; "": the file as it stands."""
    if kind in ("mistral", "mixtral", "llava"):
        return ""
    if kind == "qwen2":
        return "Qwen2Tokenizer"
    qwen = kind in ("qwen2_moe", "qwen3", "qwen3_moe", "qwen2_audio")
    return name.removesuffix("Fast") or ("Qwen2Tokenizer" if qwen else "")


def _makes(name: str, normal: Any, cuts: Sequence[Mapping[str, Any]], spaced: bool) -> bool:
    """Whether a class, which makes its normalizer and pre-tokenizers itself, makes those of the file."""
    kinds = [cut["type"] for cut in cuts]
    bytes_alone = not spaced and not any(cut.get("add_prefix_space") for cut in cuts)
    if name in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        if name == "LlamaTokenizer" and "ByteLevel" in kinds:
            return True  # which AutoTokenizer sees
        return not normal and kinds == ["Metaspace"] and cuts[0].get("prepend_scheme") == "first"
    if name == "Qwen2Tokenizer":
        same = (normal or {}).get("type") == "NFC" and kinds == ["Split", "ByteLevel"]
        return same and bytes_alone and cuts[0]["pattern"] == {"Regex": QWEN2_WORDS}
    if name == "GPT2Tokenizer":
        return not normal and kinds == ["ByteLevel"] and bytes_alone and cuts[0].get("use_regex", True)
    return name != "GemmaTokenizer" or (normal or {}).get("type") == "Replace"


def specials(files: Files) -> dict[str, str]:
    """The special tokens by the names that templates use: the common ones, and the model's own such as image_token."""
    settings = _settings(files)
    found = {name: _text(settings[name]) for name in NAMES if settings.get(name)}
    own = {name: _text(value) for name, value in settings.items() if _names_a_token(name, value)}
    extra = settings.get("extra_special_tokens")
    named = extra if isinstance(extra, Mapping) else {}
    return found | own | {name: _text(token) for name, token in named.items()}


def tokenizer(files: Files, where: Path) -> Tokenizer:
    """The tokenizer with every token that the files beside it add. Raises ConvertError if it is missing."""
    path = files.get(TOKENIZER)
    if path is None:
        raise ConvertError(
            f"{where}: tokenizer.json is missing; save the tokenizer with transformers' save_pretrained there"
        )
    found, settings = open_tokenizer(path), _settings(files)
    known = {token.content for token in found.get_added_tokens_decoder().values()}
    found.add_tokens([token for token in _added(files, settings) if token.content not in known])
    return found


def _added(files: Files, settings: Mapping[str, Any]) -> list[AddedToken]:
    """Tokens that transformers adds to those of tokenizer.json, in its order."""
    named = [_text(settings[name]) for name in NAMES if settings.get(name)]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named += [_text(token) for token in (extra.values() if isinstance(extra, Mapping) else extra)]
    named += [_text(settings[name]) for name in settings if _names_a_token(name, settings[name])]
    if "added_tokens_decoder" in settings:
        stored = sorted(settings["added_tokens_decoder"].items(), key=lambda entry: int(entry[0]))
        told = [_token(value, value.get("special", False) or value["content"] in named) for _, value in stored]
    else:
        stored = sorted(_json(files, ADDED).items(), key=lambda entry: entry[1])
        told = [AddedToken(text, normalized=text not in named, special=text in named) for text, _ in stored]
    known = {token.content for token in told}
    return told + [AddedToken(text, normalized=False, special=True) for text in named if text not in known]


def _names_a_token(name: str, value: Any) -> bool:
    """Whether a setting is a special token of one kind of model, such as image_token. Objects say that they are one."""
    token = isinstance(value, str) or (isinstance(value, Mapping) and value.get("__type") == "AddedToken")
    return name.endswith("_token") and name not in NAMES and token


def _token(value: Mapping[str, Any], special: bool) -> AddedToken:
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(value["content"], **flags, normalized=bool(value.get("normalized", not special)), special=special)


def _settings(files: Files) -> dict[str, Any]:
    """tokenizer_config.json, over which special_tokens_map.json stands in folders of old, without added tokens."""
    settings = _json(files, CONFIG)
    if "added_tokens_decoder" in settings:
        return settings
    named = _json(files, MAP)
    return settings | {name: _text(value) if name.endswith("_token") else value for name, value in named.items()}


def _json(files: Files, name: str) -> dict[str, Any]:
    return read_json(files[name]) if name in files else {}


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)
