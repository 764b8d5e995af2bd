"""The scripts for a machine with a GPU, as far as they run without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def test_benchmark_rehearsed(tmp_path):
    """Every problem is checked and timed, here in small sizes on the CPU, and lands in JSON and a table."""
    done = run("bench/gpu.py", "--rehearse", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert record["torch"] == torch.__version__ and record["gpu"] is None and record["copy GB/s"] > 0
    results = record["results"]
    assert all(row["error"] < 2e-2 and row["ratio"] > 0 and row["GB/s"] > 0 for row in results)
    assert all(set(row["seconds"]) == {"ours NCHW", "ours NHWC", "torch NCHW", "torch NHWC"} for row in results)
    chosen = {name for row in results for name in row["algorithms"]}
    assert chosen == {"implicit_gemm", "winograd", "direct", "depthwise", "inner_product"}
    text = (tmp_path / "gpu-cpu.txt").read_text()
    assert all(row["problem"] in text for row in results) and text in done.stdout


def test_benchmark_keeps_to_its_time(tmp_path):
    done = run("bench/gpu.py", "--rehearse", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0")
    assert done.returncode == 0 and "LEFT OUT" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the stages run")
@pytest.mark.parametrize("stage, message", [("build", "no GPU is visible"), ("check", "unknown stages check")])
def test_stages_say_what_is_wrong(stage, message, tmp_path):
    done = run("tools/gpu.py", "--out", str(tmp_path), stage)
    assert done.returncode != 0 and message in done.stderr + done.stdout


def test_a_failed_stage_does_not_stop_the_next(tmp_path):
    """The benchmark's log and failure are told; what ran before is kept."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the stages run")
    done = run("tools/gpu.py", "--out", str(tmp_path), "bench", "bench")
    assert done.returncode != 0 and done.stdout.count("== bench: FAILED after") == 2
    assert (tmp_path / "bench.log").exists()
