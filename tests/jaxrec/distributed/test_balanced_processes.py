"""Two processes of two devices each exchange samples as one process with four ranks does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from balanced_worker import CONFIG, DEVICES, digests, rank_source

from jaxrec.distributed import BalancedBatches, InProcess

PROCESSES = 2
WORKER = Path(__file__).parent / "balanced_worker.py"
ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_processes_agree_with_one():
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(number), str(PROCESSES), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    printed = []
    try:
        for worker in workers:
            out, errors = worker.communicate(timeout=280)
            assert worker.returncode == 0, errors[-2_000:]
            printed += [line for line in out.splitlines() if line.startswith("batch ")]
    finally:
        for worker in workers:
            worker.kill()
    ranks = PROCESSES * DEVICES
    whole = BalancedBatches([rank_source(rank) for rank in range(ranks)], InProcess(ranks), CONFIG)
    wanted = [
        f"batch {step} {rank} {digest}"
        for step, batches in enumerate(whole)
        for rank, digest in enumerate(digests(batches))
    ]
    assert len(wanted) > 3 * ranks
    assert sorted(printed) == sorted(wanted)
