"""What several processes have to agree on before they train."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jaxlib

import hetjax
import models
from hetjax.core.trainer import Trainer


def decides(workdir: Path, configuration: str, trainers: Sequence[Trainer]) -> Mapping[str, str]:
    """What has to be the same in all processes, but for the data."""
    sources = sorted(path for root in (hetjax, models) for path in Path(root.__path__[0]).rglob("*.py"))
    return {
        "software": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {sys.version.split()[0]}",
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "configuration": configuration,
        "workdir": str(workdir.absolute()),
        "order of tasks": "\n".join(str(task) for each in trainers for task in each.pipeline.schedule.order),
    }
