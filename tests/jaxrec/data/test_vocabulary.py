"""Vocabularies: numbering, errors, files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import Vocabulary
from jaxrec.data.vocabulary import number_values

IDS = st.lists(st.text(max_size=5), unique=True, max_size=12)


@settings(deadline=None, max_examples=40)
@given(ids=IDS, first_index=st.sampled_from([0, 1]))
def test_numbers_and_ids_are_inverse_also_through_a_file(tmp_path_factory, ids, first_index):
    path = tmp_path_factory.mktemp("vocabulary") / "items.npz"
    made = Vocabulary.create("item", ids, first_index=first_index)
    made.save(path)
    for vocabulary in (made, Vocabulary.load(path)):
        assert len(vocabulary) == len(ids)
        assert [vocabulary.index_of(raw) for raw in ids] == list(
            range(first_index, first_index + len(ids))
        )
        assert [vocabulary.raw_of(first_index + i) for i in range(len(ids))] == ids
        assert vocabulary.kind == "item"
    assert [p.name for p in path.parent.iterdir()] == ["items.npz"]


def test_unknown_ids_and_numbers_are_named():
    items = Vocabulary.create("item", ["7", "8"], first_index=1)
    with pytest.raises(ValueError, match="unknown item id '9': it is not among the 2 items"):
        items.index_of("9")
    with pytest.raises(ValueError, match="unknown item id 'x'"):
        items.indices_of(["7", "x"])
    with pytest.raises(ValueError, match=r"item number 0 is outside 1\.\.2 \(0 is padding\)"):
        items.raw_of(0)
    with pytest.raises(ValueError, match=r"item number 3 is outside 1\.\.2\."):
        items.raw_of(3)
    assert items.indices_of(["8", "7"]).tolist() == [2, 1]
    assert "7" in items
    assert "9" not in items


def test_repeated_ids_are_named():
    with pytest.raises(ValueError, match="user id 'b' is given twice"):
        Vocabulary.create("user", ["a", "b", "c", "b"], first_index=0)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "items.npz"
    Vocabulary.create("item", ["old"], first_index=1).save(path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        Vocabulary.create("item", ["new"], first_index=1).save(path)
    assert Vocabulary.load(path).ids.tolist() == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["items.npz"]


def test_another_npz_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", kind=np.array("item"))
    with pytest.raises(ValueError, match="is not a vocabulary: it lacks ends, first_index, text"):
        Vocabulary.load(tmp_path / "other.npz")


@settings(deadline=None)
@given(values=st.lists(st.integers(-5, 5)), first_index=st.sampled_from([0, 1]))
def test_values_are_numbered_by_first_appearance(values, first_index):
    numbers, distinct = number_values(np.array(values, dtype=np.int64), first_index=first_index)
    order = list(dict.fromkeys(values))
    assert distinct.tolist() == order
    assert numbers.tolist() == [first_index + order.index(value) for value in values]
