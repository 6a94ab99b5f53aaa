"""Memory on eight devices, from the compiled programs: of a decoder under each stage of ZeRO and sequence parallelism,
and of a decoder with an encoder on its devices, with what each kind of offload takes from there to the host.

    python benchmarks/layout_memory.py

Float32, since a CPU widens whole stacks of bfloat16 weights before a loop; AdamW, rematerialised layers. Nothing runs.
"""

import dataclasses
from typing import Any

from synthetic import Workload, emulate, offloaded

from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.tasks import OFFLOADS
from hetjax.core.trainer import Trainer
from models.decoder import Decoder
from models.vit import ViT

DEVICES = 8
WORK = Workload(
    llm=Decoder(vocab_size=4096, width=512, num_layers=12, num_heads=8, num_kv_heads=4, mlp_width=1408),
    vision=None,
    samples=DEVICES,
    seq_len=256,
    pictures=0,
    num_microbatches=4,
    remat=Remat.FULL,
    optimizer=OptimizerConfig(),
)
CASES: dict[str, dict[str, Any]] = {
    "nothing in shards": dict(zero_size=1),
    "ZeRO-1": dict(),
    "ZeRO-2": dict(zero=2),
    "ZeRO-3": dict(zero=3),
    "ZeRO-2, shards of 4": dict(zero=2, zero_size=4),
    "ZeRO-3, shards of 4": dict(zero=3, zero_size=4),
    "tp 4": dict(dp=2, tp=4),
    "tp 4, sp": dict(dp=2, tp=4, sp=True),
    "tp 4, sp, ZeRO-3": dict(dp=2, tp=4, sp=True, zero=3),
}


TOWER = ViT(image_size=64, patch_size=8, width=384, num_layers=12, num_heads=6, mlp_width=1536, output_width=512)
TOGETHER = dataclasses.replace(WORK, vision=TOWER, pictures=2 * DEVICES, remat=Remat.NONE)
OFFLOADED: dict[str, tuple[str, ...]] = {
    "nothing offloaded": (),
    **{kind: (kind,) for kind in OFFLOADS},
    "all of these": tuple(OFFLOADS),
}


def main() -> None:
    """Prints both tables, in MiB on each device."""
    emulate(DEVICES)
    head("backward's workspace")
    for name, sizes in CASES.items():
        trainer = WORK.trainer(Layout(**(dict(dp=DEVICES) | sizes)))
        row(name, trainer, trainer.pipeline.stages["llm", 0].memory["backward"].temp_size_in_bytes)
    print()
    head()
    plain = TOGETHER.trainer(Layout(dp=4, tp=2), Layout(dp=DEVICES))
    for name, kinds in OFFLOADED.items():
        row(name, offloaded(plain, kinds))


def head(*more: str) -> None:
    """The first two lines of a table."""
    names = [*memory.DeviceMemory._fields[:-1], "total", "on the host", *more]
    print(f"| MiB | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}", flush=True)


def row(name: str, trainer: Trainer, *more: int) -> None:
    """The first device's."""
    taken = memory.estimate(trainer)[0]
    found = [f"{size / 2**20:.1f}" for size in (*taken[:-1], taken.total, taken.host, *more)]
    print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
