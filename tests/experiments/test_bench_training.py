"""The benchmark's cases, and a small run of it; PyTorch's side is checked where it is installed."""

import json

import numpy as np
import pytest

from experiments import bench_training
from experiments.torch_training import PaddedBatch


def test_batches_hold_sequences_of_the_law():
    for name, case in bench_training.cases().items():
        case = bench_training.quick(case)
        batches = case.batches()
        assert len({tuple(part.shape for part in batch) for batch in batches}) == 1
        for batch in batches:
            lengths = np.diff(np.asarray(batch.seq_offsets))
            used = int(lengths.sum())
            assert 0 < used <= case.num_tokens, name
            assert lengths.max() <= case.model.max_len
            assert (np.asarray(batch.item_ids)[:used] > 0).all()
            assert not np.asarray(batch.target_ids)[used:].any()


def test_rates_are_those_of_the_median():
    case = bench_training.quick(bench_training.cases()["ml1m_hstu"])
    timing = bench_training.Timing((2e6,))
    found = bench_training.figures(case, bench_training.Measured(timing, None))
    tokens = np.mean([int(batch.seq_offsets[-1]) for batch in case.batches()])
    assert found["tokens/s"] == pytest.approx(tokens / 2)


@pytest.mark.slow
def test_a_run_is_recorded(tmp_path, monkeypatch, capsys):
    arguments = ["bench_training", "--quick", "--cases", "ml1m_hstu", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--scratch", "--results", str(tmp_path)])
    bench_training.main()
    assert "ours, automatic" in capsys.readouterr().out
    (path,) = tmp_path.glob("bench_training/*.json")
    measured = {row["backend"]: row for row in json.loads(path.read_text())["measurements"]}
    assert measured["ours"]["tokens/s"] > 0
    assert measured["ours"]["peak_bytes"] > 0


@pytest.mark.parametrize("name", ["ml1m_hstu", "ml1m_sasrec"])
def test_the_peer_is_the_same_model(name):
    pytest.importorskip("torch")
    case, checks = bench_training.quick(bench_training.cases()[name]), {}
    batches = case.batches()
    step = bench_training.torch_step(case, batches, checks, compiled=False)
    step().block_until_ready()
    assert checks["torch"] < 1e-4
    padded = PaddedBatch.of(batches[0])
    assert len(padded.places) == int(batches[0].seq_offsets[-1])
