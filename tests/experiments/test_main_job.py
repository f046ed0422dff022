"""The experiments as a user runs them, on data small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ended, free_port, started

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """300 users who walk through 150 items in cycles: easy to learn, unlike popularity."""
    folder = tmp_path_factory.mktemp("data")
    lines = [
        f"u{u} " + " ".join(str((7 * u + step) % 150 + 1) for step in range(5 + u % 8))
        for u in range(300)
    ]
    (folder / "sequences.txt").write_text("\n".join(lines) + "\n")
    attributes = {str(i): [i % 2 + 1, i % 10 + 3, i % 70 + 13] for i in range(1, 151)}
    (folder / "item2attributes.json").write_text(json.dumps(attributes))
    return folder


def command(name, *arguments):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]


def run(*call):
    done = subprocess.run(call, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_can_be_interrupted_and_ends_with_its_figures(dataset, tmp_path):
    call = command(
        "quickstart", "--data", dataset, "--folder", tmp_path / "run", "--num-epochs", "40"
    )
    log = tmp_path / "run/log.jsonl"
    with subprocess.Popen(call, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not (log.exists() and '"eval"' in log.read_text()):
            assert time.monotonic() < deadline, "no evaluation within two minutes"
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) != 0
    done_before = len(log.read_text().splitlines())
    output = run(*call)
    assert "resuming after step" in output
    last = output.splitlines()[-1]
    assert last.startswith("SASRec HR@10 ")
    accuracy = json.loads((tmp_path / "run/accuracy.json").read_text())
    assert accuracy["sasrec"]["hr@10"] > 3 * accuracy["popularity"]["hr@10"]
    retrieval = json.loads((tmp_path / "run/retrieval.json").read_text())
    assert len(retrieval["filters"]) >= 5
    assert all(row["with exact"] == 1 for row in retrieval["filters"])
    assert (tmp_path / "run/report.html").read_text().count("data:image/png") == 5
    assert len(log.read_text().splitlines()) > done_before


@pytest.mark.slow
def test_train_sequence_trains_every_seed(dataset, tmp_path):
    output = run(
        *command("train_sequence", "beauty-best", "--data", dataset, "--folder", tmp_path),
        *("--seeds", "0", "1", "--num-epochs", "2", "--scratch", "--results", str(tmp_path / "r")),
    )
    result = json.loads(next((tmp_path / "r/train_sequence").glob("*.json")).read_text())
    hit_rate = next(m for m in result["measurements"] if m["metric"] == "hr@10")
    assert len(hit_rate["samples"]) == 2
    assert result["config"]["model"]["num_attributes"] == 82
    assert result["data"]["name"] == dataset.name
    assert "BSARec" in output
    assert (tmp_path / "beauty-best/seed-1/log.jsonl").exists()


@pytest.mark.slow
def test_two_processes_train_a_setting_and_the_first_records_it(dataset, tmp_path):
    call = command(
        "train_sequence", "beauty-sasrec", "--data", dataset, "--num-epochs", "1", "--scratch",
        "--distributed", "--sources", "2", "--folder", tmp_path / "runs",
        "--results", tmp_path / "results", "--launch.num-processes", "2",
        "--launch.coordinator", f"localhost:{free_port()}",
    )  # fmt: skip
    calls = [[*call, "--launch.process-id", str(number)] for number in range(2)]
    with started(calls) as processes:
        first, second = (ended(process, timeout=250) for process in processes)
    assert first.code == second.code == 0, first.errors + second.errors
    assert "2 processes, told by arguments; 2 devices" in first.out
    assert "recorded in" in first.out
    assert "recorded in" not in second.out
    [path] = (tmp_path / "results/train_sequence").glob("*.json")
    config = json.loads(path.read_text())["config"]
    assert config["setting"] == "beauty-sasrec-distributed"
    assert config["processes"] == 2
