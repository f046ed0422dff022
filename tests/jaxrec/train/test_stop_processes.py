"""A signal to one of two processes stops both after the same step."""

from pathlib import Path

import pytest
from processes import ended, free_port, python, started

from jaxrec.distributed import EXIT_PREEMPTED
from jaxrec.train import read_log

WORKER = Path(__file__).parent / "stop_worker.py"


@pytest.mark.slow
def test_one_signal_stops_all_after_the_same_step(tmp_path):
    port = free_port()
    with started([python(WORKER, port, number, tmp_path) for number in range(2)]) as processes:
        results = [ended(process, timeout=250) for process in processes]
    for result in results:
        assert result.code == EXIT_PREEMPTED, result.errors
        assert "same bits" in result.out
    stops = [[line for line in r.out.splitlines() if "stopped" in line] for r in results]
    assert stops[0] == stops[1]
    assert stops[0][0].startswith("stopped SIGTERM")
    logs = [read_log(tmp_path / run) for run in ("whole", "parts")]
    assert logs[0] == logs[1]
