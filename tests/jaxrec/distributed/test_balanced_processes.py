"""Two processes of two devices each exchange samples as one process with four ranks does."""

from pathlib import Path

import pytest
from balanced_worker import CONFIG, DEVICES, digests, rank_source
from processes import ended, free_port, python, started

from jaxrec.distributed import BalancedBatches, InProcess

PROCESSES = 2
WORKER = Path(__file__).parent / "balanced_worker.py"


@pytest.mark.slow
def test_processes_agree_with_one():
    port, printed = free_port(), []
    calls = [python(WORKER, number, PROCESSES, port) for number in range(PROCESSES)]
    with started(calls) as workers:
        for worker in workers:
            end = ended(worker, timeout=280)
            assert end.code == 0, end.errors[-2_000:]
            printed += [line for line in end.out.splitlines() if line.startswith("batch ")]
    ranks = PROCESSES * DEVICES
    whole = BalancedBatches([rank_source(rank) for rank in range(ranks)], InProcess(ranks), CONFIG)
    wanted = [
        f"batch {step} {rank} {digest}"
        for step, batches in enumerate(whole)
        for rank, digest in enumerate(digests(batches))
    ]
    assert len(wanted) > 3 * ranks
    assert sorted(printed) == sorted(wanted)
