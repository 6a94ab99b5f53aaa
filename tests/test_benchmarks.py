"""The GPU run runs through with small sizes on any device, so that nothing silly fails where there is a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

QUICK = ["kernels", "attention packed", "grouped", "mfu vlm auto", "offload"]


def gpu_run(out: Path, *flags: str) -> dict[str, dict]:
    """What each part left; every one must have succeeded."""
    line = [sys.executable, str(runs.ROOT / "benchmarks" / "gpu_run.py"), "--tiny", "--out", str(out), *flags]
    ran = subprocess.run(line, env=runs.environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    results = json.loads((out / "results.json").read_text())
    assert all(r["status"] == 0 and r["figures"] for r in results)
    assert all(f"## {r['part']}\n" in (out / "page.md").read_text() for r in results)
    return {r["part"]: r["figures"] for r in results}


def test_the_gpu_run_leaves_figures_and_a_page(tmp_path: Path) -> None:
    figures = gpu_run(tmp_path, "--only", *QUICK)
    assert set(figures) == set(QUICK)
    assert len(figures["mfu vlm auto"]["kernels"]) == 10
    assert figures["mfu vlm auto"]["seconds"] > 0 and figures["mfu vlm auto"]["predicted_seconds"] > 0
    assert all(row["error"] < 2e-2 and row["leaks"] == 0 for row in figures["kernels"])


@pytest.mark.slow
def test_every_part_of_the_gpu_run_runs_through(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert len(gpu_run(tmp_path, "--seconds", "900")) == 18


def test_a_part_that_runs_out_of_time_costs_no_other(tmp_path: Path) -> None:
    line = [sys.executable, str(runs.ROOT / "benchmarks" / "gpu_run.py"), "--tiny", "--out", str(tmp_path)]
    ran = subprocess.run([*line, "--seconds=0", "--only", *QUICK], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["part"]: r["status"] for r in results} == dict.fromkeys(QUICK)
    assert "| kernels | out of time |" in (tmp_path / "page.md").read_text()


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="without a C++ compiler nothing can sleep natively"
)


@pytest.mark.slow
@needs_compiler
def test_filling_gains_what_it_does_in_simulation() -> None:
    line = [sys.executable, str(runs.ROOT / "benchmarks" / "filled.py"), "--only", "4, 8 microbatches"]
    ran = subprocess.run(line, env=runs.environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


@pytest.mark.slow
@needs_compiler
def test_the_loop_keeps_to_the_plan() -> None:
    line = [sys.executable, str(runs.ROOT / "benchmarks" / "schedules.py"), "--micros=40000", "--repeats=2"]
    words = ["gpipe, pp", "phases, encoder", "one device"]  # far apart, whatever else the machine does
    ran = subprocess.run([*line, "--only", *words], env=runs.environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "4 schedules: rank correlation" in ran.stdout
