"""What a conversion holds in memory is bounded by the largest tensor, however large the model."""

import os
import subprocess
import sys
from pathlib import Path

import hf_folders
import pytest
from hf_folders import llava, text, vision

pytestmark = pytest.mark.slow

# Runs a command, and prints by how many bytes the process's own memory rose while it ran. Pages of mapped files, which
# the system takes back at will, do not count.
PROBE = """
import sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
from hetjax import convert

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

convert.main([sys.argv[3], sys.argv[1], "--out", sys.argv[2]])  # a small one first: imports and pools
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
status = convert.main(sys.argv[3:])
done.set()
thread.join()
assert status == 0
print("rose by", peak - before)
"""


def rise(warm: tuple[Path, Path], *arguments: object) -> int:
    command = [sys.executable, "-c", PROBE, *map(str, warm), *map(str, arguments)]
    # else the allocator would keep freed tensors of this size for later ones
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.rpartition("rose by")[2])


def test_the_whole_model_is_never_in_memory(tmp_path: Path) -> None:
    small = hf_folders.write(tmp_path / "small", text("llama"))
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8, head_dim=64)
    tower = vision("clip", hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    model = llava(text("llama", vocab_size=8192, **sizes), tower)
    folder = hf_folders.write(tmp_path / "big", model)
    nbytes = [a.nbytes for a in hf_folders.read(folder).values()]
    largest, total = max(nbytes), sum(nbytes)
    found = {
        what: rise((small, tmp_path / f"small {out}"), command, source, "--out", tmp_path / out)
        for what, command, source, out in (
            ("import", "from_hf", folder, "ckpt"),
            ("export", "to_hf", tmp_path / "ckpt", "out"),
            ("state dict", "to_torch", tmp_path / "ckpt", "out.safetensors"),
        )
    }
    assert max(found.values()) <= 4 * largest < 0.25 * total, (found, largest, total)
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), hf_folders.read(folder)))
