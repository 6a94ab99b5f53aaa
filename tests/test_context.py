"""However attention reaches over cp, its values and gradients are those of one device, and it sends what the docs say."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_attention import Arrays, arrays, close, outputs, packed, zigzag

from models import attention
from models.attention import whole
from models.axes import Axes, Axis
from models.context import CONTEXTS, HEADS, RING, attend_across, prepared
from models.sight import Sight

LENGTH = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is asked for, over how many devices of cp and tp."""

    cp: int
    tp: int = 1
    heads: int = 8
    kv: int = 4
    window: int | None = None
    rule: str = "packed"  # packed and causal, in zig-zag order; clips, masked behind their end; or none: all see all
    remat: bool = False


CASES = {
    "fewer key heads than devices, packed": Case(cp=4, kv=2, remat=True),
    "neither divides the other, a window": Case(cp=4, heads=12, kv=6, window=5),
    "heads over tp too, packed": Case(cp=2, tp=2, kv=2),
    "masked clips": Case(cp=4, kv=8, rule="clips"),
    "all see all": Case(cp=2, tp=2, kv=8, rule="none"),
}


def places(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of two rows."""
    if case.rule == "packed":
        return packed(rng, 2, LENGTH)
    number = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    return number, (number < np.array([[7], [LENGTH]])).astype(np.int32)


def sight_of(case: Case, mine: Arrays, all_keys: Arrays, zigzag: int | None = None) -> Sight | None:
    if case.rule == "none":
        return None
    return Sight(*mine, *all_keys, causal=case.rule == "packed", window=case.window, zigzag=zigzag)


def on_mesh(case: Case, context: str) -> Any:
    """The program of all devices: (q, k, v, g, positions, segments) -> the output and the gradients."""
    shape = (2, case.cp, case.tp)
    mesh = Mesh(np.array(jax.devices()[: 2 * case.cp * case.tp]).reshape(shape), ("dp", "cp", "tp"))
    axes = Axes(cp=Axis(("cp",), case.cp), tp=Axis(("tp",), case.tp), context=context)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> Arrays:
        zigzag = case.cp if case.rule == "packed" else None
        sight = sight_of(case, places, tuple(axes.cp.gather(a, 1) for a in places), zigzag)
        sight = sight and jax.tree.map(axes.tp.vary, prepared(sight, axes))
        function = lambda q, k, v: attend_across(q, k, v, sight, axes)
        return outputs(jax.checkpoint(function) if case.remat else function, q, k, v, g)

    heads, tokens = P("dp", "cp", "tp"), P("dp", "cp")
    return jax.shard_map(program, mesh=mesh, in_specs=(heads,) * 4 + (tokens,) * 2, out_specs=(heads,) * 4)


@pytest.mark.parametrize("context", [RING, HEADS])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_device(
    name: str, context: str, monkeypatch: pytest.MonkeyPatch, x64: None
) -> None:
    case, rng = CASES[name], np.random.default_rng(3)
    given = arrays(rng, LENGTH, LENGTH, h=case.heads, kv=case.kv, d=4)
    seen = places(case, rng)
    expected = jax.jit(functools.partial(outputs, lambda *x: whole(*x, sight_of(case, seen, seen))))(*given)
    monkeypatch.setitem(attention.BLOCKS, "cpu", (4, 1))  # several blocks on each device, some of which are skipped
    order = zigzag(LENGTH, case.cp) if case.rule == "packed" else np.arange(LENGTH)
    found = jax.jit(on_mesh(case, context))(*(a[:, order] for a in (*given, *seen)))
    close(tuple(a[:, np.argsort(order)] for a in found), expected, 1e-11)
