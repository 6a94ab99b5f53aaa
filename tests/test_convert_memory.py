"""What an import or a conversion holds in memory is bounded by the largest tensor, however large the model."""

import os
import subprocess
import sys
from pathlib import Path

import hf_folders
import pytest
from hf_folders import llava, text, vision

pytestmark = pytest.mark.slow

# Prints by how many bytes the process's own memory rises in `work`, the second of two. Pages of mapped files, which the
# system takes back at will, do not count.
PROBE = """
import sys, threading, time

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

def rise(warm, work):
    warm()  # a small one: imports, pools and programs
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    status = work()
    done.set()
    thread.join()
    assert not status
    print("rose by", peak - before)
"""
CONVERT = """
import jax
jax.config.update("jax_platforms", "cpu")
from hetjax import convert
rise(lambda: convert.main([sys.argv[3], sys.argv[1], "--out", sys.argv[2]]), lambda: convert.main(sys.argv[3:]))
"""
# The parameters are there before, as fresh ones: what an import adds is beside them.
IMPORT = """
import jax
from test_convert import LAYOUTS, initial, open_source, trainer
built = trainer(open_source(sys.argv[1]), LAYOUTS[sys.argv[2]])
starts = initial.open_starts(built.graph, dict.fromkeys(("llm", "vision"), sys.argv[1]))
warm = initial.state(built, starts)
del warm
fresh = built.init()
jax.block_until_ready((fresh.params, fresh.optimizer, fresh.acc))
built.init = lambda: fresh
rise(lambda: None, lambda: jax.block_until_ready(initial.state(built, starts).params) and None)
"""


def rise(code: str, *arguments: object) -> int:
    command = [sys.executable, "-c", PROBE + code, *map(str, arguments)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        # else the allocator would keep freed tensors of this size for later ones
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.rpartition("rose by")[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8, head_dim=64)
    tower = vision("clip", hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    model = llava(text("llama", vocab_size=32768, **sizes), tower)
    return hf_folders.write(tmp_path_factory.mktemp("big") / "model", model, shards=3)


def sizes(folder: Path) -> tuple[int, int]:
    """(the largest tensor, all of them), in bytes."""
    nbytes = [a.nbytes for a in hf_folders.read(folder).values()]
    return max(nbytes), sum(nbytes)


@pytest.mark.parametrize("layouts", ["colocated", "disjoint"])
def test_an_import_holds_less_than_the_largest_tensor_beside_the_parameters(folder: Path, layouts: str) -> None:
    largest, total = sizes(folder)
    found = rise(IMPORT, folder, layouts)
    assert found < largest < 0.2 * total, (found, largest, total)


def test_a_conversion_holds_the_tensor_that_is_moved_and_what_is_written_of_it(tmp_path: Path, folder: Path) -> None:
    small = hf_folders.write(tmp_path / "small", text("llama"))
    largest, total = sizes(folder)
    found = {
        what: rise(CONVERT, small, tmp_path / f"small {out}", command, source, "--out", tmp_path / out)
        for what, command, source, out in (
            ("import", "from_hf", folder, "ckpt"),
            ("export", "to_hf", tmp_path / "ckpt", "out"),
            ("state dict", "to_torch", tmp_path / "ckpt", "out.safetensors"),
        )
    }
    assert max(found.values()) <= 2.5 * largest < 0.5 * total, (found, largest, total)
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), hf_folders.read(folder)))
