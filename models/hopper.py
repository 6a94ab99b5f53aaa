"""Where kernels of tokamax for Hopper GPUs can serve: they are private to one version, so that alone is taken."""

import functools
import importlib
import importlib.metadata
import logging
import re
from typing import Any

import jax.numpy as jnp

LOG = logging.getLogger(__name__)
VERSION = "0.0.17"
TILE = 128  # rows and features of a grouped product's largest tile
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def refusal(device_kind: str, dtype: Any) -> str | None:
    """Why they serve neither this device nor this type; None where they do."""
    if not HOPPER.search(device_kind):
        return f"its kernels are for Hopper GPUs, not {device_kind}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"its kernels are for 16 bits, not {jnp.dtype(dtype)}"
    return None


@functools.cache
def missing(modules: tuple[str, ...]) -> str | None:
    """What of tokamax is not here, where `modules` are needed."""
    try:
        found = importlib.metadata.version("tokamax")
        if found != VERSION:
            return f"tokamax {VERSION} is needed (the extra `fused`), not {found}"
        for name in modules:
            importlib.import_module(name)
    except ImportError as failure:
        return f"tokamax {VERSION} is needed (the extra `fused`, Python 3.12): {failure}"
    return None


@functools.cache
def say(what: str, reason: str) -> None:
    """Logs once that `what` goes without the kernels."""
    LOG.warning("%s in blocks of plain XLA, several times slower than a fused kernel: %s", what, reason)
