"""A decoder stage's programs as XLA compiles them for an H100: which kernels, and how much memory. No GPU is needed.

    python benchmarks/gpu_programs.py [--size 1b|3b|8b] [--seq_len 4096 32768]

Needs the extra `cuda12` or `cuda13`, whose plugin compiles for a GPU that is only described, and for the kernels of
models/fused.py the extra `fused`. Nothing runs: figures are of `memory_analysis`, of one row on one device (tp 2,
rematerialised layers). "whole" is attention with all its weights in memory, which the language model's would be without
the others.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Mapping
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from mfu import DECODERS
from synthetic import one_row

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from hetjax.core.stage import Stage
from models import attention

# From the data sheet and `cudaGetDeviceProperties`.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 device_memory_size: 84942979072 memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NEVER = 1 << 62
CASES = {  # name -> (packed, cp, whether the kernels of models/fused.py may serve, BLOCKS of the GPU)
    "one document": (False, 1, True, attention.BLOCKS["gpu"]),
    "packed": (True, 1, True, attention.BLOCKS["gpu"]),
    "cp 2": (False, 2, True, attention.BLOCKS["gpu"]),
    "packed, cp 2": (True, 2, True, attention.BLOCKS["gpu"]),
    "packed, blocks": (True, 1, False, attention.BLOCKS["gpu"]),
    "packed, whole": (True, 1, False, (512, NEVER)),
}


def described(topology: str) -> list[jax.Device]:
    """H100 that are only described; `topology` is slices x hosts x devices. Exits where no compiler for them is."""
    try:
        return list(topologies.get_topology_desc(platform="cuda", target_config=H100, topology=topology).devices)
    except Exception as failure:  # what jax raises without a plugin
        raise SystemExit(f"no compiler for GPUs: {failure}; install the extra cuda12 or cuda13") from failure


def compiled(size: str, seq_len: int, *, packed: bool, cp: int) -> Stage:
    """The language model as one stage on a described node of eight H100, forward and backward compiled."""
    definition = DECODERS[size].module(jnp.bfloat16, packed=packed)
    return one_row(definition, Layout(tp=2, cp=cp), Remat.FULL, seq_len, described("1x1x8"))


def kernels(text: str) -> Mapping[str, int]:
    """How often a program calls each library kernel of attention, and how many loops and branches it has."""
    calls = Counter(re.findall(r'custom_call_target="(__cudnn\$fmha\w+|mosaic_gpu\w*)"', text))
    calls |= {name: len(re.findall(rf"\) {name}\(|\] {name}\(", text)) for name in ("while", "conditional")}
    return {name: n for name, n in calls.items() if n}


def main() -> None:
    """Prints a line per form of attention and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=DECODERS, default="1b")
    parser.add_argument("--seq_len", type=int, nargs="+", default=[4096, 32768])
    flags = parser.parse_args()
    print(f"{flags.size}; workspace in MiB per device")
    print(f"{'tokens':>6}  {'attention':<16} {'forward':>9} {'backward':>9}  kernels of the backward")
    for seq_len in flags.seq_len:
        for name, (packed, cp, may, blocks) in CASES.items():
            refusal = attention.refusal if may else lambda *_: "they were not to serve"
            with mock.patch.dict(attention.BLOCKS, gpu=blocks), mock.patch.object(attention, "refusal", refusal):
                stage = compiled(flags.size, seq_len, packed=packed, cp=cp)
            memory = [stage.memory[p].temp_size_in_bytes / 2**20 for p in ("forward", "backward")]
            found = ", ".join(f"{n} {k}" for k, n in kernels(stage.programs["backward"].as_text()).items())
            print(f"{seq_len:>6}  {name:<16} {memory[0]:>9,.0f} {memory[1]:>9,.0f}  {found}", flush=True)


if __name__ == "__main__":
    main()
