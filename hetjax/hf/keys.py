"""Where every parameter of ours lies in a Hugging Face folder, by the tables of the families.

Names are those of a checkpoint without module ("layers/attention/q" of layer 3 is "layers/0003/attention/q"). Keys are
those of the hub and of transformers 4.x files (layout A), the one spelling that every version reads. Files of
transformers 5 (layout C) and state dicts in memory (B) spell some of them otherwise: `canonical` translates.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hetjax.hf.families import registry
from hetjax.hf.families.family import Table
from hetjax.hf.parts import Model, Parts
from hetjax.hf.pattern import Pattern, parse
from hetjax.hf.source import Sliceable
from hetjax.run.names import flat

PROJECTOR = "multi_modal_projector."
BUFFERS = re.compile(r".*(embeddings\.position_ids|rotary_emb\.inv_freq)")  # constants that old files carry


class Place(NamedTuple):
    """One array of ours in a folder: a tensor, or one for each of the rows of its first dim."""

    keys: tuple[str, ...]  # in layout A
    pattern: Pattern  # of a tensor
    shape: tuple[int, ...]  # ours
    by_row: bool = False

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape, in our dims, of what a tensor holds."""
        return self.shape[1:] if self.by_row else self.shape

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.pattern.torch_shape(self.inner)

    def to_torch(self, array: Sliceable, row: int) -> np.ndarray:
        """The values of the tensor `keys[row]`."""
        inside = (slice(None),) * len(self.inner)
        return self.pattern.to_torch(array[(slice(row, row + 1), *inside)][0] if self.by_row else array[inside])


def places(parts: Parts) -> dict[str, Place]:
    """Name ("llm/layers/0003/attention/q") -> where the array lies, for every array of the models."""
    found: dict[str, Place] = {}
    for module, model in parts.models.items():
        table = _table(parts, module)
        for name, shape in shapes(model).items():
            layer = re.match(r"layers/(\d+)/", name)
            general = name.replace(f"/{layer[1]}/", "/", 1) if layer else name
            if general not in table:
                continue
            key, pattern = table[general]
            if layer:
                key = key.replace(".N.", f".{int(layer[1])}.")
            by_row = ".E." in key
            each = tuple(key.replace(".E.", f".{row}.") for row in range(shape[0] if by_row else 1))
            found[f"{module}/{name}"] = Place(each, parse(pattern), shape, by_row)
    return found


def prefix(parts: Parts, module: str) -> str:
    """What stands before the keys of a module."""
    whole = registry.whole_of(parts)
    return ("" if whole is None else whole.holders[module]) + registry.family_of(parts.models[module]).prefix


def _table(parts: Parts, module: str) -> Table:
    whole = registry.whole_of(parts)
    own = _prefixed(registry.family_of(parts.models[module]).keys, prefix(parts, module))
    return own | _prefixed(whole.projector, PROJECTOR) if whole is not None and module == whole.encoder else own


def _prefixed(table: Table, prefix: str) -> dict[str, tuple[str, str]]:
    return {name: (prefix + key, pattern) for name, (key, pattern) in table.items()}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shape of every array that the model stores, by name: its layers one by one, a tied head not at all."""
    import jax  # here: the tables are read without it

    definition = model.module("float32")
    key = jax.eval_shape(lambda: jax.random.key(0))  # abstract: settings are read before the backend starts
    found: dict[str, tuple[int, ...]] = {}
    kept = functools.cache(lambda init: list(flat(jax.eval_shape(init, key))))
    layers = {f"layers/{i:04d}": part for i, part in enumerate(definition.layers)}
    for name, part in {"first": definition.first, **layers, "last": definition.last}.items():
        found |= {f"{name}/{path}": tuple(leaf.shape) for path, leaf in kept(part.init)}
    return {name: shape for name, shape in found.items() if name.removeprefix("last/") not in definition.tied}


def canonical(key: str, parts: Parts) -> str:
    """The key as layout A spells it."""
    whole = registry.whole_of(parts)
    if whole is None:
        (model,) = parts.models.values()
        return registry.family_of(model).canonical(key)
    if key.startswith("model."):  # in memory: model.language_model.layers..., and the head beside it
        key = key.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    elif key == "lm_head.weight":
        key = whole.holders["llm"] + key
    holder, encoder = whole.holders[whole.encoder], registry.family_of(parts.models[whole.encoder])
    return holder + encoder.canonical(key.removeprefix(holder)) if key.startswith(holder) else key


def idle(keys: Iterable[str], parts: Parts) -> list[str]:
    """Those of `keys` (layout A) that belong to the folder's encoder, or to what is beside it, and not to the model."""
    return [] if parts.encoder is None else [key for key in keys if is_idle(key, parts)]


def is_idle(key: str, parts: Parts) -> bool:
    """Whether a key of a folder that holds `parts` may be that of a tensor which no model of ours reads."""
    assert parts.encoder is not None
    family, before = registry.family_of(parts.models[parts.encoder]), prefix(parts, parts.encoder)
    if key.startswith(before) and family.idle.fullmatch(key.removeprefix(before)):
        return True
    return not parts.whole and family.beside.fullmatch(key) is not None
