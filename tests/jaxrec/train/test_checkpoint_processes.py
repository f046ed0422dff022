"""Two processes share a folder; see `checkpoint_worker.py` for what they try."""

from pathlib import Path

import pytest
from checkpoint_worker import assert_same, placed
from processes import ended, free_port, python, started

from jaxrec.sharding import make_mesh
from jaxrec.train import CheckpointStore

WORKER = Path(__file__).parent / "checkpoint_worker.py"


@pytest.mark.slow
def test_two_processes_save_restore_and_fail_as_one(tmp_path):
    mesh = make_mesh({"data": 8})
    folder, single = tmp_path / "run", tmp_path / "single"
    with CheckpointStore(single) as store:
        store.save(7, placed(7, mesh), iterator_state={}, config={})
    port = free_port()
    calls = [python(WORKER, port, number, folder, single) for number in range(2)]
    with started(calls) as processes:
        results = [ended(process) for process in processes]
    for result in results:
        assert "all held" in result.out, result.errors
        assert result.code == 0, result.errors
    for saved, step in ((folder, 3), (single, 8)):  # and one process goes on, on 8 devices and 1
        with CheckpointStore(saved) as store:
            for devices in (8, 1):
                restored = store.restore(placed(0, make_mesh({"data": devices})))
                assert restored.step == step
                assert_same(restored.state, step)
