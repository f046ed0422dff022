"""The experiment end to end on a dataset of twelve items, and its table."""

import json

import numpy as np
import pytest
from test_settings import write_dataset

from experiments import overarch, report


@pytest.mark.slow
def test_every_over_arch_is_fitted_measured_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(overarch, "load_towers", lambda setting, model, folder: model)
    config = overarch.OverArchExperiment(
        data=write_dataset(tmp_path, users=40),
        candidates=8,
        listed=4,
        num_epochs=1,
        batch_size=4,
        results=tmp_path,
        scratch=True,
    )
    overarch.main(config)
    (path,) = (tmp_path / "overarch").glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    rows = report.overarch_rows(json.loads(path.read_text())["measurements"])
    assert [row["ranked by"] for row in rows] == [
        "dot product", "dot + popularity", "dot + MoL", "dot + MLP", "dot + attention",
    ]  # fmt: skip
    assert rows[0]["recall@10"] == "1.0000"  # at most ten items are left to rank
    assert rows[1]["recall@10"] == "1.0000 (+0.0 %)"


def test_values_are_dot_plus_weighted_overarch():
    dots = np.asarray([[2.0, 1.0, -np.inf]], np.float32)
    asked = overarch.Questions(
        dots, np.asarray([[3, 1, 2]]), dots, np.asarray([1]), np.asarray([1])
    )
    values = overarch.combined(0.5, np.asarray([[0.0, 4.0, 9.0]], np.float32), asked)
    np.testing.assert_allclose(values, [[2.0, 3.0, -np.inf]])
    assert overarch.metrics_of(dots, asked)["ndcg@10"] == pytest.approx(1 / np.log2(3))
    assert overarch.metrics_of(values, asked)["ndcg@10"] == 1


def test_the_report_has_a_table_for_every_command():
    text = report.overarch_section_markdown()
    assert "dot product" in text
    assert "dot + MoL" in text
    assert "--overarchs MoL MLP" in text
