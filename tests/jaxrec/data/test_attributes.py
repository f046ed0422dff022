"""Item attributes: reading, alignment to a vocabulary, and every bad input."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import (
    DataFormatError,
    ItemAttributes,
    Vocabulary,
    read_item_attributes_csv,
    read_item_attributes_json,
)

ITEMS = Vocabulary.create("item", ["10", "20", "30"], first_index=1)
LIST = st.lists(st.integers(1, 5), max_size=4)


@settings(deadline=None, max_examples=30)
@given(values=st.dictionaries(st.sampled_from(["10", "20", "30", "40", "50"]), LIST))
def test_json_is_aligned_and_unknown_items_are_counted(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("attributes") / "a.json"
    path.write_text(json.dumps(values))
    read = read_item_attributes_json(path, ITEMS, feature="brand")
    expected = [[str(v) for v in dict.fromkeys(values.get(raw, []))] for raw in ITEMS.ids]
    assert read.features() == {"brand": expected}
    assert read.values["brand"][0] == ()
    assert read.unknown_items == len({"40", "50"} & set(values))


def test_csv_columns_are_split_quoted_and_merged(tmp_path):
    path = tmp_path / "movies.csv"
    path.write_text(
        'movieId,title,genres\n20,"Piano, The",Drama| Music |\n99,Gone,Drama\n10,Heat,Crime\n'
        "\n20,Again,Drama|War\n"
    )
    read = read_item_attributes_csv(
        path, ITEMS, item_column="movieId", features={"genres": "|", "title": None}
    )
    assert read.features() == {
        "genres": [["Crime"], ["Drama", "Music", "War"], []],
        "title": [["Heat"], ["Piano, The", "Again"], []],
    }
    assert read.unknown_items == 1


def test_alignment_to_the_items_left_after_filtering():
    attributes = ItemAttributes({"f": [(), ("a",), ("b",), ("c",)]}, ITEMS)
    left = ITEMS.select(np.array([3, 1]))
    assert attributes.aligned_to(left).features() == {"f": [["c"], ["a"]]}
    more = Vocabulary.create("item", ["30", "new"], first_index=1)
    assert attributes.aligned_to(more).features() == {"f": [["c"], []]}


def test_wrong_number_of_entries_is_an_error():
    with pytest.raises(ValueError, match="feature 'f' has 3 entries; expected 4"):
        ItemAttributes({"f": [("a",), ("b",), ("c",)]}, ITEMS)


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty"),
        ('{"10": [1],\n oops}', 2, None, "not valid JSON"),
        ("[1]", None, None, "expected an object, found list"),
        ('{"10": 3}', None, "10", "expected a list"),
        ('{"10": [1], "20": [1.5]}', None, "20", r"found \[1\.5\]"),
    ],
)
def test_bad_json(tmp_path, text, line, field, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_item_attributes_json(path, ITEMS)
    assert (caught.value.line, caught.value.field) == (line, field)


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty; expected a header with 'id'"),
        ("id,genres\n", None, None, "the file is empty; expected rows"),
        ("movie,genres\n1,a\n", None, "id", "no column 'id'; the file has 'movie', 'genres'"),
        ("id,genre\n1,a\n", None, "genres", "no column 'genres'"),
        ("id,genres\n10,a\n20,b,c\n", 3, None, "expected 2 fields, found 3"),
    ],
)
def test_bad_csv(tmp_path, text, line, field, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_item_attributes_csv(path, ITEMS, item_column="id", features={"genres": "|"})
    assert (caught.value.line, caught.value.field) == (line, field)


def test_no_features_asked_for(tmp_path):
    with pytest.raises(ValueError, match="features is empty"):
        read_item_attributes_csv(tmp_path / "a.csv", ITEMS, item_column="id", features={})
