"""Arrays by name: nested dicts, as Orbax stores them, and flat ones ("llm/layers/0003/attention/q")."""

from collections.abc import Iterator, Mapping
from typing import Any

from models import paths


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is named by path."""
    return paths.nested({tuple(name.split("/")): leaf for name, leaf in names.items()})


def flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts."""
    for path, leaf in paths.flat(tree).items():
        yield "/".join(path), leaf
