"""The experiment end to end on a dataset of twelve items, and its table."""

import json

import jax
import numpy as np
import pytest
from test_settings import write_dataset

from experiments import overarch, readme
from jaxrec.data import EvalSet, ItemAttributes, SequenceDataset, Vocabulary
from jaxrec.retrieval import ItemIndex


@pytest.mark.slow
def test_every_over_arch_is_fitted_measured_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(overarch, "load_towers", lambda setting, model, folder: model)
    config = overarch.OverArchExperiment(
        data=write_dataset(tmp_path, users=40),
        candidates=8,
        least_passing=3,
        listed=4,
        num_epochs=1,
        batch_size=4,
        results=tmp_path,
        scratch=True,
    )
    overarch.main(config)
    (path,) = (tmp_path / "overarch").glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    rows = readme.overarch_rows(json.loads(path.read_text())["measurements"])
    assert [row["ranked by"] for row in rows] == [
        "dot product", "dot + popularity", "dot + MoL", "dot + MLP", "dot + attention",
    ]  # fmt: skip
    assert rows[0]["recall@10"] == "1.0000"  # at most ten items are left to rank
    assert rows[1]["recall@10"] == "1.0000 (+0.0 %)"
    assert rows[2]["recall@100, filtered"] == "1.0000 (+0.0 %)", "no eligible target is lost"


def test_a_filter_is_an_attribute_of_the_target_that_enough_items_have():
    items = Vocabulary.create("item", ["a", "b", "c"], first_index=1)
    rows = [(), ("x", "y"), ("x",), ("z",)]
    attributes = ItemAttributes({"kind": rows}, items)
    found = overarch.target_filters(attributes, np.array([1, 2, 3]), least=2, seed=0)
    assert found == ['kind:"x"', 'kind:"x"', None]


def test_filtered_questions_keep_to_their_filters_and_histories():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 4)).astype(np.float32)
    kinds = ["x", "y"] * 6  # items 1, 3, … are x
    index = ItemIndex.build(
        vectors, {"kind": kinds}, key=jax.random.key(0), ids=np.arange(1, 13), nlist=2
    )
    histories = SequenceDataset.from_sequences([[1, 3], [2], [5]], num_items=12)
    targets, blank = np.array([7, 8, 9], np.int32), np.zeros((3, 5))
    asked = overarch.Questions(vectors[[6, 7, 8]], blank.astype(int), blank, targets, blank[:, 0])
    eval_set = EvalSet(histories, targets)
    found = overarch.ask_filtered(asked, index, eval_set, ['kind:"x"', None, 'kind:"x"'])
    assert found.target.tolist() == [7, 9]
    assert (found.ids % 2 == 1)[found.ids > 0].all()
    assert np.isneginf(found.dots[found.ids == 0]).all()
    assert not np.isin(found.ids[0], [1, 3]).any()
    assert 5 not in found.ids[1]
    for ids, target, rank in zip(found.ids, found.target, found.rank, strict=True):
        assert rank == (ids.tolist().index(target) if target in ids else 12)


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
    text = readme.overarch_section_markdown()
    assert "dot product" in text
    assert "dot + MoL" in text
    assert "--overarchs MoL MLP" in text
