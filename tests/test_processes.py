"""Several processes train as one does: bit for bit where no collective crosses between them, else to rounding."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import in_processes
import numpy as np
import pytest
from in_processes import CASES, Found, run

from hetjax.core.alive import HOST
from hetjax.launch import free_ports

DEVICES = 8
SAME_BITS = [  # no stage spans two of four processes, or sums over more than two devices, which Gloo takes in turns
    "encoder on its own process",
    "pp 2 across, tied",
    "pp 4 across, tied; encoder on its own",
    "pp 2 vpp 2 across, tied",
    "replicas on two processes",
    "1 process and 3",
    "pp 2 across, tied, offloaded",
    "replicas on two processes, offloaded",
]


def launch(
    names: list[str],
    processes: int,
    folder: Path,
    *,
    seconds: float,
    devices: int = DEVICES,
    checkpoints: str = "",
) -> list[dict[str, Found]]:
    """What each of so many processes, with their part of the devices, finds of these cases; `folder` is made."""
    folder.mkdir()
    port = free_ports(1 + processes)
    script, outs = Path(in_processes.__file__), [folder / f"{n}.pickle" for n in range(processes)]
    with contextlib.ExitStack() as stack:
        running = []
        for n, out in enumerate(outs):
            log = stack.enter_context((folder / f"{n}.log").open("w"))
            sizes = [str(size) for size in (processes, n, devices // processes)]
            command = [sys.executable, str(script), f"127.0.0.1:{port}", *sizes, str(out), checkpoints, *names]
            where = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
            env = os.environ | {"PYTHONPATH": where}
            running.append(stack.enter_context(ended(subprocess.Popen(command, stdout=log, stderr=log, env=env))))
        for process in running:
            process.wait(seconds)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
    assert [process.returncode for process in running] == [0] * processes, logs
    return [pickle.loads(out.read_bytes()) for out in outs]


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """The process, which is over behind it, however it comes to that."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def check(name: str, parts: list[Found], *, same_bits: bool) -> Found:
    """Every process's part of a case against one process that has all devices and offloads nothing, which it gives."""
    case = CASES[name]
    one = run(dataclasses.replace(case, offload=False))
    kinds = {kind for part in parts for kind in part["memories"]}
    assert kinds == ({HOST} if case.offload else {"device"}), name
    assert np.isfinite(one["loss"]).all(), name
    numbers, held = ("loss", "norm"), set()
    sizes: dict[str, float] = {}  # of parameters, and of momenta, by stage
    for key in filter(is_leaf, one):
        largest = max(np.abs(a).max() for a in one[key].values())
        sizes[owner(key)] = max(sizes.get(owner(key), 0.0), float(largest))
    for part in parts:
        for key in numbers:
            np.testing.assert_allclose(part[key], one[key], rtol=0 if same_bits else 1e-6, err_msg=name)
        for key in filter(is_leaf, part):
            held.add(key)
            close = 0.0 if same_bits else (1e-6 if key.startswith("params") else 1e-5) * sizes[owner(key)]
            for block, values in part[key].items():
                np.testing.assert_allclose(values, one[key][block], rtol=0, atol=close, err_msg=f"{name}: {key}")
        owned = set(part["compiled"]) - set(part["replicas"])
        assert {owner(key).partition("/")[2] for key in filter(is_leaf, part)} == owned, name
    assert held == set(filter(is_leaf, one)), name
    for part in parts:
        assert part["whole"].keys() == one["whole"].keys() != set()
        for key, values in part["whole"].items():
            largest = max(np.abs(a).max() for k, a in one["whole"].items() if owner(k) == owner(key))
            close = 0.0 if same_bits else 1e-5 * largest
            np.testing.assert_allclose(values, one["whole"][key], rtol=0, atol=close, err_msg=f"{name}: {key}")
    for array, rows in one["reads"].items():
        assert sorted({row for part in parts for row in part["reads"][array]}) == rows
        for part in parts:  # who has none of an encoder's first stages reads none of its files
            first = {f"{array.partition('.')[0]}/0", *part["replicas"]}
            assert bool(part["reads"][array]) == bool(first & set(part["compiled"]))
    return one


def is_leaf(key: str) -> bool:
    return "[" in key


def owner(key: str) -> str:
    """KIND/module/number of the stage whose leaf it is."""
    return key.partition("[")[0]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    apart, spanning = "pp 2 across, tied", "pp 2 over two processes each, tied, offloaded"
    parts = launch([apart, spanning], 2, tmp_path / "two", seconds=240)
    for name in (apart, spanning):
        one = check(name, [part[name] for part in parts], same_bits=name == apart)
    assert [part[apart]["compiled"] for part in parts] == [["vision/0", "llm/0"], ["llm/1"]]
    assert [part[spanning]["compiled"] for part in parts] == [["vision/0", "llm/0"], ["vision/0", "llm/1"]]
    slots = list(range(len(one["reads"]["vision.pixels"])))
    assert [part[apart]["reads"]["vision.pixels"] for part in parts] == [slots, []]
    assert [part[spanning]["reads"]["vision.pixels"] for part in parts] == [
        slots[: len(slots) // 2],
        slots[len(slots) // 2 :],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_under_all_placements(processes: int, tmp_path: Path) -> None:
    parts = launch(list(CASES), processes, tmp_path / "all", seconds=3000)
    for name in CASES:
        check(name, [part[name] for part in parts], same_bits=processes == 4 and name in SAME_BITS)


@pytest.mark.slow
def test_checkpoints_know_no_processes(tmp_path: Path) -> None:
    saved = str(tmp_path / "checkpoints")
    whole = [run(CASES["colocated over all"], str(tmp_path / "alone")) for _ in range(2)]
    colocated, overlapping = "colocated over all, offloaded", "overlapping, zero 2 and 3, offloaded"
    (first, *_) = launch([colocated], 4, tmp_path / "four", seconds=600, checkpoints=saved)
    np.testing.assert_allclose(first[colocated]["loss"], whole[0]["loss"], rtol=1e-6)
    shutil.copytree(saved, tmp_path / "one")
    shutil.copytree(saved, tmp_path / "replicas")
    one = run(CASES["encoder on its own process"], str(tmp_path / "one"))
    np.testing.assert_allclose(one["loss"], whole[1]["loss"], rtol=1e-6)
    for part in launch([overlapping], 3, tmp_path / "three", seconds=600, devices=6, checkpoints=saved):
        np.testing.assert_allclose(part[overlapping]["loss"], whole[1]["loss"], rtol=1e-6)
        assert part[overlapping]["memories"] in ([HOST], [])  # the third one drives no device of a stage
    replicas = "replicas across, gpipe"
    for part in launch([replicas], 4, tmp_path / "more", seconds=600, checkpoints=str(tmp_path / "replicas")):
        np.testing.assert_allclose(part[replicas]["loss"], whole[1]["loss"], rtol=1e-6)
