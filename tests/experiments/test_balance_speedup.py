import json

import pytest

from experiments import balance_speedup


@pytest.mark.slow
def test_two_processes_balance_measure_and_record(tmp_path):
    settings = balance_speedup.Settings(
        processes=2, samples=3, steps=3, repeats=1, lengths=(8, 16, 64), width=8, num_blocks=1,
        calibration=(((4, 8),), ((2, 16), (1, 64)), ((1, 64),), ((3, 8), (2, 64))),
    )  # fmt: skip
    checks = balance_speedup.run(settings, scratch=True, folder=tmp_path)
    assert checks["loss_difference"] < 1e-5  # the same samples, on other ranks
    (path,) = (tmp_path / "balance_speedup").glob("*.json")
    result = json.loads(path.read_text())
    read, balanced = result["measurements"]
    assert balanced["slowest / mean rank"] > 0
    assert read["measured, ms"] / balanced["measured, ms"] == checks["speed_up"]
