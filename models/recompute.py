"""What a backward is given: functions of which it keeps the arguments alone, and computes the rest again.

For what costs less to compute than to write and read: norms, activations, rotary positions, gathers.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Given = ParamSpec("Given")
Result = TypeVar("Result")


def keeps_arguments(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function`, whose backward is given its arguments and nothing else."""
    # without barriers: what is computed again then fuses with what the backward makes of it
    return jax.checkpoint(function, prevent_cse=False)
