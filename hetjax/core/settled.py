"""What leaves a stage varies over exactly the mesh axes that its partition spec names, or the model has lost values."""

import jax
from jax import lax

from models.axes import vary, varying_axes


def settle(y: jax.Array, names: frozenset[str]) -> jax.Array:
    """`y`, typed as varying over exactly the axes `names`.

    Raises ValueError if the model left it different along another axis of size > 1, which would lose values.
    """
    y = vary(y, names)
    extra = tuple(sorted(varying_axes(y) - names))
    for axis in extra:
        if lax.axis_size(axis) > 1:
            raise ValueError(
                f"a model output of shape {y.shape} differs along {axis}; it may differ along {sorted(names)}"
            )
    return lax.psum(y, extra) if extra else y
