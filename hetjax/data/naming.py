"""Which values of an entry name a file, whatever their key: by its words, and by what the value looks like."""

import collections
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

NOTHING: tuple[Any, ...] = (None, "", [], {}, False)  # what a key holds where there is no file
WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of image_path, image-path, imagePath, imageURL, IMAGE, image_1
MEDIA = re.compile(
    "(image|img|picture|photo|video|audio).*|(pic|sound|speech|voice|wav|movie|vision|pixel|frame|clip|media)s?"
)
# words of a key that tells something about a file, or holds a text of its own
ABOUT = re.compile(
    "(id|size|width|height|shape|ratio|rate|duration|type|format|hash|token|caption|description|title|text|question"
    "|answer|prompt|query|num|count|index|score|source|origin|license|tool|reasoning|thinking)s?"
)
TURNS = ("conversations", "conversation", "messages")  # keys under which an entry may have its turns
TEXTS = (*TURNS, "value", "content", "system", "system_prompt")  # read elsewhere
FILE = re.compile(
    r"data:(image|video|audio)/.*"
    r"|.*\.(png|jpe?g|jfif|gif|webp|bmp|tiff?|svg|hei[cf]|avif|wav|mp3|flac|ogg|opus|m4a|aac|wma"
    r"|mp4|m4v|mkv|avi|mov|webm|mpe?g|wmv|flv|3gp)([?#]\S*)?",
    re.I,
)


def files(value: Mapping[str, Any], read: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of what names a file and is not `read`; keys of nested objects have those around them in front."""
    waiting = collections.deque((k, v) for k, v in value.items() if k not in read and k not in TEXTS)
    while waiting:  # no recursion: entries may be nested deeply
        key, named = waiting.popleft()
        words = [word.lower() for word in WORD.findall(key.rpartition(".")[2])]
        media, about = (any(map(kind.fullmatch, words)) for kind in (MEDIA, ABOUT))
        if named in NOTHING or (about and not media):
            continue
        if (media and not about and isinstance(named, (str, list, dict))) or _looks_like_one(named):
            yield key, named
        elif isinstance(named, dict):
            waiting.extend((f"{key}.{inner}", below) for inner, below in named.items())
        elif isinstance(named, list):
            waiting.extend((key, below) for below in named)


def _looks_like_one(value: Any) -> bool:
    return isinstance(value, str) and FILE.fullmatch(value) is not None
