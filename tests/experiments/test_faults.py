"""The experiment on faults, at its smallest: one kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.readme import fault_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bits(tmp_path):
    call = [sys.executable, "-m", "experiments.faults", "--kills", "1", "--no-others", "--scratch"]
    call += ["--epochs", "1", "--devices", "1", "--folder", tmp_path / "jobs"]
    call += ["--results", tmp_path / "results"]
    done = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [path] = (tmp_path / "results" / "faults").glob("*.json")
    [measured] = json.loads(path.read_text())["measurements"]
    assert measured["workload"] == "kill"
    assert measured["value"] == 0
    assert 0 < measured["seconds until all had ended"][0] < 60


def test_rows_gather_the_jobs_of_a_fault():
    def job(fault, value, *seconds):
        return {"workload": fault, "value": value, "seconds until all had ended": seconds}

    kills, spare = fault_rows(
        [job("kill", 0, 3.0, 9.0), job("fewer_devices", 2e-7), job("kill", 0, 5.0)]
    )
    assert kills["times"] == "3"
    assert "5.0 (9.0)" in kills.values()
    assert kills["final weights"] == "the same bits"
    assert spare["final weights"] == "within 2e-07"
