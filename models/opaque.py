"""Functions that a program holds as one primitive: what looks at its equations, as the policies of `jax.checkpoint` do,
sees neither their loops nor their kernels."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Results = Callable[..., Sequence[tuple[tuple[int, ...], Any]]]


def opaque(name: str, run: Callable[..., Sequence[jax.Array]], results: Results, *, narrow: bool = False) -> Any:
    """`run(*arrays, **settings)` as a primitive called `name`, with settings that can be hashed.

    `results`, given the same, yields (shape, dtype) of what `run` returns; all vary over the mesh as the first array
    does. `run` itself is given arrays that vary over nothing, as kernels need them; with `narrow` also without 64 bits.
    """
    primitive = jax.extend.core.Primitive(name)
    primitive.multiple_results = True

    def abstract(*given: Any, **settings: Any) -> list[Any]:
        mesh, varying = given[0].sharding.mesh, given[0].manual_axis_type
        whole = lambda shape: NamedSharding(mesh, P(*[None] * len(shape)))
        return [
            jax.core.ShapedArray(shape, dtype, sharding=whole(shape), manual_axis_type=varying)
            for shape, dtype in results(*given, **settings)
        ]

    def lower(context: Any, *given: Any, **settings: Any) -> Any:
        bare = lambda arrays: [jax.core.ShapedArray(a.shape, a.dtype) for a in arrays]
        context = context.replace(avals_in=bare(context.avals_in), avals_out=bare(context.avals_out))
        with jax.enable_x64(False) if narrow else contextlib.nullcontext():
            return mlir.lower_fun(functools.partial(run, **settings), multiple_results=True)(context, *given)

    @functools.cache
    def compiled(**settings: Any) -> Callable[..., Sequence[jax.Array]]:
        return jax.jit(functools.partial(primitive.bind, **settings))

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *given, **settings: compiled(**settings)(*given))
    mlir.register_lowering(primitive, lower)
    return primitive
