"""Nested dicts of leaves by path, tuples of keys, and back."""

from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]


def flat(tree: Mapping) -> dict[Path, Any]:
    """The leaves of nested dicts, by path."""
    found: dict[Path, Any] = {}
    for name, value in tree.items():
        found |= (
            {(name, *path): leaf for path, leaf in flat(value).items()}
            if isinstance(value, Mapping)
            else {(name,): value}
        )
    return found


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dicts whose leaves these are."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def at(tree: Any, path: Path) -> Any:
    """What nested dicts have at `path`, or None."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree
