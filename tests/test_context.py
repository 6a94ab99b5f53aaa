"""However attention reaches over cp, values and gradients are those of one device, and it sends what the docs say."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import runs
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
    "fewer key heads than devices, packed": Case(cp=4, kv=2),
    "neither divides the other, a window": Case(cp=4, heads=12, kv=6, window=5, remat=True),
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


def on_mesh(case: Case, context: str, ask: Any = outputs) -> Any:
    """The program of all devices: (q, k, v, g, positions, segments) -> the output and the gradients, or what `ask`
    wants of (function, q, k, v, g)."""
    shape = (2, case.cp, case.tp)
    mesh = Mesh(np.array(jax.devices()[: 2 * case.cp * case.tp]).reshape(shape), ("dp", "cp", "tp"))
    axes = Axes(cp=Axis(("cp",), case.cp), tp=Axis(("tp",), case.tp), context=context)

    def program(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> Arrays:
        zigzag = case.cp if case.rule == "packed" else None
        sight = sight_of(case, places, tuple(axes.cp.gather(a, 1) for a in places), zigzag)
        sight = sight and jax.tree.map(axes.tp.vary, prepared(sight, axes))
        function = lambda q, k, v: attend_across(q, k, v, sight, axes)
        return ask(jax.checkpoint(function) if case.remat else function, q, k, v, g)

    heads, tokens = P("dp", "cp", "tp"), P("dp", "cp")
    return jax.shard_map(program, mesh=mesh, in_specs=(heads,) * 4 + (tokens,) * 2, out_specs=heads)


DEFAULT = {
    (RING, "neither divides the other, a window"),
    (RING, "masked clips"),
    (HEADS, "neither divides the other, a window"),
    (HEADS, "masked clips"),
}


@pytest.mark.parametrize(
    ("context", "name"),
    [
        case if case in DEFAULT else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product((RING, HEADS), CASES)
    ],
)
def test_values_and_gradients_are_those_of_one_device(
    context: str, name: str, monkeypatch: pytest.MonkeyPatch, x64: None
) -> None:
    case, rng = CASES[name], np.random.default_rng(3)
    given = arrays(rng, LENGTH, LENGTH, h=case.heads, kv=case.kv, d=4)
    seen = places(case, rng)
    expected = jax.jit(functools.partial(outputs, lambda *x: whole(*x, sight_of(case, seen, seen))))(*given)
    monkeypatch.setitem(attention.BLOCKS, "cpu", (4, 1))  # several blocks on each device, some of which are skipped
    order = zigzag(LENGTH, case.cp) if case.rule == "packed" else np.arange(LENGTH)
    found = jax.jit(on_mesh(case, context))(*(a[:, order] for a in (*given, *seen)))
    close(tuple(a[:, np.argsort(order)] for a in found), expected, 1e-11)


# -- what is sent, and kept --------------------------------------------------------------------------------------------


def traced(case: Case, context: str, ask: Any = outputs) -> Any:
    """`on_mesh` as a jaxpr, in bfloat16."""
    heads = case.heads, case.kv, case.kv, case.heads
    given = [jax.ShapeDtypeStruct((2, LENGTH, h, 4), jnp.bfloat16) for h in heads]
    return jax.make_jaxpr(on_mesh(case, context, ask))(
        *given, *[jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)] * 2
    ).jaxpr


SHARES = {  # of its operand that a device sends
    "all_gather": lambda cp: cp - 1,
    "reduce_scatter": lambda cp: Fraction(cp - 1, cp),
    "all_to_all": lambda cp: Fraction(cp - 1, cp),
    "ppermute": lambda cp: 1,
}
ROW = re.compile(r"^\| `(\w+)` \| `([^`]*)` \| `([^`]*)` \|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, str]]:
    """How attention reaches over cp -> the formulas of docs/parallel.md: bytes of a forward, and of a backward."""
    page = (runs.ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    return {context: (forward, backward) for context, forward, backward in ROW.findall(page)}


def sent(jaxpr: Any, cp: int) -> Fraction:
    """Bytes that each of `cp` devices sends in a run of a program, but for positions and segments."""
    total = Fraction(0)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        assert not name.startswith(("psum", "pmax")), "nothing is summed over cp"
        inside = sum(sent(inner, cp) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        assert name != "while" or not inside, "a device that skips blocks must not send in their loop"
        total += inside * (equation.params["length"] if name == "scan" else 1)
        if name in SHARES:
            given = [v.aval for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            total += sum(a.size * a.dtype.itemsize for a in given) * SHARES[name](cp)
    return total


@pytest.mark.parametrize("context", CONTEXTS)
def test_each_sends_the_bytes_that_the_page_says(context: str) -> None:
    for case in (Case(cp=2), Case(cp=4, heads=12, kv=6, tp=1, rule="none"), Case(cp=4, kv=2)):
        given = [
            jax.ShapeDtypeStruct((2, LENGTH, h, 4), jnp.bfloat16) for h in (case.heads, case.kv, case.kv, case.heads)
        ]
        given += [jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)] * 2
        forward, both = (
            sent(traced(case, context, ask), case.cp)
            for ask in (lambda function, q, k, v, g: function(q, k, v), outputs)
        )
        sizes = dict(n=LENGTH // case.cp, h=case.heads, kv=case.kv, d=4, w=2, cp=case.cp, lcm=math.lcm)  # a row each
        assert [forward, both - forward] == [eval(formula, sizes) for formula in documented()[context]]


def bodies(jaxpr: Any) -> Iterator[Any]:
    """The bodies of the scans of a program."""
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from ([inner] if equation.primitive.name == "scan" else [])
            yield from bodies(inner)


def test_a_ring_sends_what_it_has_not_worked_on() -> None:
    """In each step what is sent came in with the step, and so need not wait for its products."""
    case = Case(cp=4)
    sends = [
        (body, [equation for equation in body.eqns if equation.primitive.name == "ppermute"])
        for body in bodies(traced(case, RING))
    ]
    assert sorted(len(found) for _, found in sends if found) == [2, 4]  # keys and values, then their gradients too
    assert all(equation.invars[0] in body.invars for body, found in sends for equation in found)


@pytest.mark.parametrize("rule", ["packed", "none"])
def test_a_ring_keeps_nothing_of_the_keys_of_others(rule: str) -> None:
    case, kept = Case(cp=4, rule=rule), []

    def ask(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Arrays:
        pull = jax.vjp(function, q, k, v)[1]
        kept.extend(leaf.size for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating))
        return pull(g)

    traced(case, RING, ask)
    tokens = LENGTH // case.cp
    queries, keys = (tokens * h * 4 for h in (case.heads, case.kv))
    assert sorted(kept) == sorted([queries, keys, keys, queries, tokens * case.heads])  # q, k, v, output, log-sum-exp
