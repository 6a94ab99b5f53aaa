"""The contract between models and the trainer: a module is parts that the core can cut into pipeline stages.

`first` embeds, `layers` are the middle, `last` heads. A stage is any range of that. Parameters are nested dicts of
arrays; `logical` names the dims that a layout may shard. The core sees nothing else of a model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from models.axes import Axes
from models.weight import Use

Batch = Mapping[str, Any]
Params = dict[str, Any]  # nested dicts of arrays
AUXILIARY, ROUTED = "auxiliary", "routed"  # keys of a module's output
Dims = tuple[str | None, ...]  # one logical name per tensor dim; None is never sharded


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a module.

    `init(key)` gives its parameters; it is pure and may be jitted or vmapped.
    `apply(params, x, batch, axes)` runs it on one device's shards:
      first: x is {name: array} of what it `takes` (empty where nothing enters), returns the carry;
      each of layers: x is the carry, and beside it what the layer `takes`; returns the carry alone; batch is what the
             module's `prepare` made of it;
      last:  x is the carry, returns the module's output.
    `takes` names the outputs of other modules that enter here: of a module "vision" that returns "x" and "deep0" these
    are "vision" and "vision.deep0".
    `logical` has the structure of the parameters, with a `Dims` tuple for each leaf.
    `uses` has the paths of those that only ever enter products, or are looked up in (see `table` of `ModuleDef`);
    `apply` may be given a `Weight` there.
    `balanced`: of a layer with experts, the paths of those that no gradient moves: a number for each expert, which
    falls where more than the mean of a step's tokens went, and rises where fewer did (see `bias_rate` of `ModuleDef`).
    """

    init: Callable[[Any], Params]
    apply: Callable[..., Any]
    logical: Params
    uses: Mapping[tuple[str, ...], Use] = dataclasses.field(default_factory=dict)
    balanced: frozenset[tuple[str, ...]] = frozenset()
    takes: tuple[str, ...] = ()


class Cached(NamedTuple):
    """One array that a layer keeps per token."""

    sizes: tuple[int, ...]
    dims: Dims  # of the sizes


def _same(batch: Batch, axes: Axes) -> Batch:
    return batch


@dataclasses.dataclass(frozen=True)
class ModuleDef:
    """A module as the core sees it.

    layers: the part of each layer. Layers of the same part (the same object), or of a few parts in turn, are scanned
        over stacked parameters. Parts that differ may share a path in their parameters, if what is there has the same
        shape.
    prepare: `prepare(batch, axes)` makes of the batch what the layers are given in its place, a dict of arrays or of
        nested containers of arrays. It runs once per program: what layers need of the batch alone (rotary tables, who
        sees whom) would else be computed, and kept for the backward, by each of them. Left out: the batch itself.
    reads: microbatch key -> logical dims ("batch", "items", "seq" or None), for every array that `apply` or `prepare`
        reads.
    carry: carry key -> logical dims; the arrays are of floating-point numbers.
    output: logical dims of what `last` returns, by key. It may have, the same on all devices, "auxiliary": a number
        that training adds to the microbatch's mean loss; and "routed" [layers with experts, experts]: how many tokens
        went to each, a float without a gradient. Neither crosses to another module.
    bias_rate: by how much a step moves what of the layers is `balanced`.
    divisible: mesh axis -> {what: count}; the axis size must divide every count ({"tp": {"heads": 8}}).
    axes: the mesh axes that the module's code handles; a layout with another axis > 1 is refused.
    heads: query heads of attention that reaches over cp by `models/context.py`, in each of its ways; 0: the module's
        code reaches over cp in its own way, and a layout that asks for another is refused.
    head: of a language model, the leaf of `last` that makes logits of the output "x", which `last` only hands on. Its
        dims are the features and "vocab", in either order.
    vocab: how many ids a language model has; the vocabulary dim of a leaf may be longer, with zeros behind them.
    table: the leaf of `first` that is only ever looked up in. `first` may be given a `Weight` there, and then adds the
        gradient's rows to its tap: the cotangent of that tap is the sum.
    tied: path in `last` -> path in `first` of the leaf that both share ("head" -> "embed").
    cache: what a layer keeps of each token while text is generated. A carry with "cache" asks a layer for it: {} where
        the batch's tokens are the first, and the layer returns theirs; else {key: [batch, slots, *sizes]}, in which
        the layer writes its tokens from the batch's "cache.slot" on, and looks at all slots by its "cache.positions"
        and "cache.segment_ids", [batch, slots]. Empty: the module cannot generate.
    recalls: names of what layers take for tokens that are generated too. The batch then has "NAME.index" of all slots,
        -1 where a token was generated. Such a layer keeps nothing of a token. What else layers take meets prompts only.
    rows: rows per item of an encoder's output, 0 for the language model. width: features of a row.
    config: what the module was made of; hetjax/core/flops.py knows by it what the module computes.
    compute_dtype: precision in which weights enter products; None: their own.
    """

    first: Part
    layers: tuple[Part, ...]
    last: Part
    reads: Mapping[str, Dims]
    carry: Mapping[str, Dims]
    output: Mapping[str, Dims]
    config: Any
    compute_dtype: Any = None
    prepare: Callable[[Batch, Axes], Batch] = _same
    divisible: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    axes: frozenset[str] = frozenset({"dp", "pp", "copies"})
    heads: int = 0
    head: str = ""
    vocab: int = 0
    table: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bias_rate: float = 0.0
    cache: Mapping[str, Cached] = dataclasses.field(default_factory=dict)
    recalls: tuple[str, ...] = ()
    rows: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        if self.table and (self.table,) not in self.first.uses:
            raise ValueError(
                f"ModuleDef.table={self.table!r} is not among the first part's `uses`, so its gradient would be lost; "
                "give its parameter a Use, or leave `table` out"
            )
        if self.head and self.head not in self.last.logical:
            raise ValueError(
                f"ModuleDef.head={self.head!r} is no leaf of the last part, which has {sorted(self.last.logical)}"
            )
        if self.head and self.vocab < 1:
            raise ValueError(f"ModuleDef.vocab={self.vocab}; with a head it must say how many ids there are")

    @property
    def num_layers(self) -> int:
        """Layers between `first` and `last`."""
        return len(self.layers)

    @property
    def gives(self) -> tuple[str, ...]:
        """The keys of the output that enter another module."""
        return tuple(key for key in self.output if key not in (AUXILIARY, ROUTED))

    def takes(self, lo: int, hi: int) -> frozenset[str]:
        """What of other modules enters layers `lo` to `hi`, and the first part if they are the first."""
        return frozenset(self.first.takes if lo == 0 else ()).union(*(layer.takes for layer in self.layers[lo:hi]))
