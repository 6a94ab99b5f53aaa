"""Memory of a decoder on eight devices under each stage of ZeRO and sequence parallelism, from the compiled programs.

    python benchmarks/layout_memory.py

Float32, since a CPU widens whole stacks of bfloat16 weights before a loop; AdamW, rematerialised layers. Nothing runs.
"""

from typing import Any

from synthetic import Workload, emulate

from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from models.decoder import Decoder

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


def main() -> None:
    """Prints one table, in MiB on each device."""
    emulate(DEVICES)
    parts = [*memory.DeviceMemory._fields, "total"]
    print(f"| MiB | {' | '.join(parts)} | backward's workspace |\n|{' --- |' * (len(parts) + 2)}", flush=True)
    for name, sizes in CASES.items():
        trainer = WORK.trainer(Layout(**(dict(dp=DEVICES) | sizes)))
        taken = memory.estimate(trainer)[0]
        backward = trainer.pipeline.stages["llm", 0].memory["backward"].temp_size_in_bytes
        found = [f"{size / 2**20:.1f}" for size in (*taken, taken.total, backward)]
        print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
