"""The model as a graph: modules, each with its own layout, and the edges that carry one module's output into another.

    vision ──┐
             ├──> llm ──> loss
    audio  ──┘

Exactly one module, the sink, feeds nothing: it is the language model and yields the loss. Where in it an encoder's
outputs enter, the first part or any layers, its parts say (`Part.takes`).
"""

import dataclasses
from collections.abc import Iterable

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from models.contract import ModuleDef


@dataclasses.dataclass(frozen=True)
class Module:
    """One node: what it computes, where and how it is laid out. `unroll`: its layers are not scanned. `weight_copies`:
    what its products take is made once a step, beside the parameters; else in every program."""

    name: str
    definition: ModuleDef
    layout: Layout
    remat: Remat = Remat.FULL
    unroll: bool = False
    weight_copies: bool = True


@dataclasses.dataclass(frozen=True)
class Edge:
    """`producer`'s output enters `consumer`, in those of its parts that take some of it."""

    producer: str
    consumer: str

    def name(self, key: str) -> str:
        """What the consumer's parts call the producer's output `key`."""
        return self.producer if key == "x" else f"{self.producer}.{key}"


@dataclasses.dataclass(frozen=True)
class Graph:
    """Modules and edges. Raises ValueError unless every module reaches the one sink directly."""

    modules: tuple[Module, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        names = [m.name for m in self.modules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"modules: the name {name!r} is used {names.count(name)} times; give each its own name"
                )
            if not name.isidentifier():
                raise ValueError(f"modules: {name!r} is not a valid name; use letters, digits and underscores")
        for edge in self.edges:
            for end in (edge.producer, edge.consumer):
                if end not in names:
                    raise ValueError(
                        f"edges: {edge.producer} -> {edge.consumer} names {end!r}; the modules are {names}"
                    )
        sinks = [n for n in names if all(e.producer != n for e in self.edges)]
        if len(sinks) != 1:
            raise ValueError(f"edges: exactly one module may feed nothing (the language model); {sinks} feed nothing")
        for name in names:
            consumers = [e.consumer for e in self.edges if e.producer == name]
            if consumers and consumers != sinks:
                raise ValueError(f"edges: {name} feeds {consumers}; an encoder feeds {sinks[0]} and nothing else")
        width = self.sink.definition.width
        for module in self.encoders:
            if module.definition.width != width:
                raise ValueError(
                    f"{module.name}: its output has {module.definition.width} features, "
                    f"{self.sink.name} takes {width}; "
                    f"set {module.name}'s output_width to {width}"
                )
        self._check_entries()

    def _check_entries(self) -> None:
        """Raises ValueError unless all that encoders give is taken, and all that is taken is given."""
        sink = self.sink
        taken = sink.definition.takes(0, sink.definition.num_layers)
        given = {e.name(k): e.producer for e in self.edges for k in self.module(e.producer).definition.gives}
        for name, producer in given.items():
            if name not in taken:
                raise ValueError(
                    f"edges: {producer} gives {name!r}, which no part of {sink.name} takes, they take {sorted(taken)}; "
                    f"let {producer} give these alone, or make {sink.name}'s definition for all that it gives"
                )
        for name in sorted(taken):
            if name not in given:
                raise ValueError(
                    f"edges: {sink.name} takes {name!r}, which no module gives (they give {sorted(given)}); "
                    f"add the module or the output, or make {sink.name}'s definition without it"
                )
            if name in sink.definition.carry:
                raise ValueError(
                    f"modules: {sink.name}'s layers hand each other {name!r}, so no encoder can have that name; "
                    "give it another"
                )

    def module(self, name: str) -> Module:
        """The module of this name."""
        return next(m for m in self.modules if m.name == name)

    @property
    def sink(self) -> Module:
        """The language model."""
        return next(m for m in self.modules if all(e.producer != m.name for e in self.edges))

    @property
    def encoders(self) -> tuple[Module, ...]:
        """Every module but the sink."""
        return tuple(m for m in self.modules if m is not self.sink)


def vlm(encoders: tuple[Module, ...], llm: Module) -> Graph:
    """The graph in which every encoder feeds the language model."""
    return Graph((*encoders, llm), tuple(Edge(e.name, llm.name) for e in encoders))


def deepstack(encoders: Iterable[Module]) -> dict[str, int]:
    """How many outputs each encoder gives beside "x", which a decoder adds behind its first layers."""
    return {encoder.name: len(encoder.definition.gives) - 1 for encoder in encoders}
