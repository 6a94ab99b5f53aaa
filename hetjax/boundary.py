"""Activations forward and gradients back between the layouts of two stages.

A boundary moves values between two shardings and never changes one: the backward is the same transfer with source and
destination swapped, exact to the bit, so a gradient arrives as it left whatever the two sizes of dp. It never touches
the host and compiles nothing after `programs` ran; `transfer.py` has the routes, `wire.py` the pieces.

An edge carries a dict of arrays. For a vision encoder on devices 0-2 (dp=3) and an LLM on 3-6 (dp=2, tp=2):

    boundary = Boundary({"x": jax.ShapeDtypeStruct((12, 576, 4096), bf16, sharding=vision)}, {"x": llm})
    for name, compile in boundary.programs(): compile()
    y = boundary.forward({"x": x})             # or, for jax to call the mirror: y, pull = jax.vjp(boundary, {"x": x})
    gradient = boundary.backward({"x": gy})

The outputs may share buffers with the inputs (a no-op returns its input): donate neither.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hetjax.transfer import Leaf, Route, make_route

Tree = dict[str, jax.Array]


class Boundary:
    """The transfer of one edge. `source` gives each array's shape, dtype and sharding, `destination` the sharding wanted.

    Floating-point arrays have gradients, which `backward` takes and returns; integer arrays only go forward.
    """

    def __init__(
        self, source: Mapping[str, jax.ShapeDtypeStruct], destination: Mapping[str, NamedSharding]
    ) -> None:
        _check_edge(source, destination)
        self.leaves = {
            name: Leaf(tuple(struct.shape), np.dtype(struct.dtype), struct.sharding, destination[name])
            for name, struct in sorted(source.items())
        }
        self.gradients = {
            name: leaf.mirror for name, leaf in self.leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)
        }
        self._forward = make_route(tuple(self.leaves.values()))
        self._backward = make_route(tuple(self.gradients.values())) if self.gradients else None
        self._differentiable = jax.custom_vjp(self.forward)
        self._differentiable.defvjp(lambda tree: (self.forward(tree), None), lambda _, tree: (self._pull(tree),))

    @property
    def payload_bytes(self) -> int:
        """Bytes that no device which wants them holds: what must cross forward, however it is done."""
        return self._forward.payload_bytes

    @property
    def wire_bytes(self) -> int:
        """Bytes that are put from one device to another, forward: the payload where source and destination are disjoint.

        Colocated edges put none. Overlapping ones may put more than the payload: replicas that hold a block already
        send each other the parts that each lands, before the destination gathers."""
        return self._forward.wire_bytes

    def programs(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, thunk) of every program; a thunk compiles one ahead of time, and may run in any thread."""
        routes = {"forward": self._forward, "backward": self._backward}
        return [
            (f"{direction} {program.name}", program.compile)
            for direction, route in routes.items()
            if route is not None
            for program in route.programs
        ]

    def forward(self, tree: Mapping[str, jax.Array]) -> Tree:
        """The same values on the destination's shardings; returns before they have arrived."""
        return _run(self._forward, self.leaves, tree)

    def backward(self, tree: Mapping[str, jax.Array]) -> Tree:
        """The gradients with respect to `forward`'s inputs, on the source's shardings, of those of its outputs."""
        return _run(self._backward, self.gradients, tree) if self._backward is not None else {}

    def __call__(self, tree: Mapping[str, jax.Array]) -> Tree:
        """`forward`, whose VJP is `backward`. Call it outside of jit: a boundary is several programs."""
        return self._differentiable(dict(tree))

    def _pull(self, tree: Mapping[str, jax.Array]) -> dict[str, jax.Array | None]:
        """`backward` with None, which jax reads as no gradient, for the arrays that have none."""
        moved = self.backward({name: tree[name] for name in self.gradients})
        return {name: moved.get(name) for name in self.leaves}


def _run(route: Route, leaves: Mapping[str, Leaf], tree: Mapping[str, jax.Array]) -> Tree:
    """`tree` through `route`, after a check that each array is what the route's programs were compiled for."""
    if tree.keys() != leaves.keys():
        raise ValueError(f"boundary: got arrays {sorted(tree)}, was built for {sorted(leaves)}")
    arrays = []
    for name, leaf in leaves.items():
        array = tree[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"boundary: {name!r} is {array.dtype}{list(array.shape)}, was built for "
                f"{leaf.dtype}{list(leaf.shape)}; build a boundary per shape"
            )
        if not array.sharding.is_equivalent_to(leaf.source, array.ndim):
            raise ValueError(
                f"boundary: {name!r} arrives as {array.sharding}, was built for {leaf.source}; "
                "pin the producer's out_shardings (or out_specs) to the boundary's source"
            )
        arrays.append(array)
    return dict(zip(leaves, route.run(arrays), strict=True))


def _check_edge(source: Mapping[str, jax.ShapeDtypeStruct], destination: Mapping[str, NamedSharding]) -> None:
    """Refuses an edge that no route carries."""
    if not source or source.keys() != destination.keys():
        raise ValueError(
            f"boundary: source has arrays {sorted(source)}, destination {sorted(destination)}; both need the same, "
            "at least one"
        )
    for side, shardings in (
        ("source", {name: struct.sharding for name, struct in source.items()}),
        ("destination", destination),
    ):
        for name, sharding in shardings.items():
            if not isinstance(sharding, NamedSharding):
                raise ValueError(f"boundary: {side} {name!r} has sharding {sharding}; give it a NamedSharding")
            _check_divides(side, name, tuple(source[name].shape), sharding)
        _check_one_mesh(side, (sharding.mesh for sharding in shardings.values()))


def _check_divides(side: str, name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    for dim, entry in enumerate(sharding.spec):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        ways = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if dim >= len(shape) or shape[dim] % ways:
            raise ValueError(
                f"boundary: {side} {name!r} of shape {list(shape)} cannot be split {ways} ways over {axes} on dim {dim}; "
                "choose sizes that divide"
            )


def _check_one_mesh(side: str, meshes: Iterable[Mesh]) -> None:
    distinct = set(meshes)
    if len(distinct) > 1:
        raise ValueError(f"boundary: the {side} arrays are on {len(distinct)} meshes; an edge joins two stages, one mesh each")
