"""Arrays by name: nested dicts, as Orbax stores them, and flat ones ("llm/layers/0003/attention/q")."""

from collections.abc import Iterator, Mapping
from typing import Any


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is named by path."""
    tree: dict[str, Any] = {}
    for name, leaf in names.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
