"""The table reader: Parquet and CSV with any column names."""

import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import ColumnMap, DataFormatError, read_table

pl = pytest.importorskip("polars", reason="read_table needs polars")

COLUMNS = ColumnMap(user="who", item="what", timestamp="when")
ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=30
)


def write(path, frame):
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


@settings(deadline=None, max_examples=25)
@given(rows=ROWS, suffix=st.sampled_from([".csv", ".parquet"]))
def test_round_trip(tmp_path_factory, rows, suffix):
    who, what, when = zip(*rows, strict=True)
    frame = pl.DataFrame({"unused": who, "when": when, "who": who, "what": what})
    path = write(tmp_path_factory.mktemp("table") / f"t{suffix}", frame)
    read = read_table(path, columns=COLUMNS)
    kept = list(dict.fromkeys(rows))
    assert list(read.users.ids) == list(dict.fromkeys(who))
    assert list(read.items.ids) == [str(item) for item in dict.fromkeys(what)]
    expected = [
        (user, str(item), time)
        for user in dict.fromkeys(who)
        for u, item, time in sorted(kept, key=lambda row: row[2])
        if u == user
    ]
    assert read.timestamps is not None
    found = [
        (read.users.raw_of(int(u)), read.items.raw_of(int(i)), int(t))
        for u, i, t in zip(read.user_index, read.item_index, read.timestamps, strict=True)
    ]
    assert found == expected
    assert read.report.duplicates_dropped == len(rows) - len(kept)


def test_datetimes_and_units_become_seconds(tmp_path):
    moments = [datetime.datetime(2024, 1, 1, 0, 0, s, 900_000) for s in (5, 3)]
    frame = pl.DataFrame({"who": [1, 1], "what": [1, 2], "when": moments})
    read = read_table(write(tmp_path / "a.parquet", frame), columns=COLUMNS)
    assert read.timestamps is not None
    assert read.timestamps.tolist() == [1_704_067_203, 1_704_067_205]
    assert read.item_index.tolist() == [2, 1]

    frame = pl.DataFrame({"who": [1], "what": [1], "when": [1_704_067_203_999]})
    columns = ColumnMap(user="who", item="what", timestamp="when", time_unit="ms")
    read = read_table(write(tmp_path / "b.parquet", frame), columns=columns)
    assert read.timestamps is not None
    assert read.timestamps.tolist() == [1_704_067_203]


def test_without_times_the_order_of_the_file_counts(tmp_path):
    frame = pl.DataFrame({"who": [2, 1, 2], "what": ["x", "y", "x"]})
    read = read_table(write(tmp_path / "a.csv", frame), columns=ColumnMap("who", "what"))
    assert read.timestamps is None
    assert read.user_index.tolist() == [0, 0, 1]
    assert read.item_index.tolist() == [1, 1, 2]


def test_ratings_filter_rows_and_keep_times_aligned(tmp_path):
    frame = pl.DataFrame(
        {"who": [1, 1, 1], "what": [7, 8, 9], "when": [1, 2, 3], "stars": [4.0, 1.0, 5.0]}
    )
    columns = ColumnMap("who", "what", "when", rating="stars", min_rating=4)
    read = read_table(write(tmp_path / "a.csv", frame), columns=columns)
    assert list(read.items.ids) == ["7", "9"]
    np.testing.assert_array_equal(read.timestamps, [1, 3])
    assert (read.report.rows_read, read.report.rows_filtered) == (3, 1)
    with pytest.raises(DataFormatError, match=r"min_rating=9; the highest is 5"):
        read_table(tmp_path / "a.csv", columns=ColumnMap("who", "what", None, "stars", 9))


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty"),
        ("who,what,when\n", None, None, "the file is empty; expected rows"),
        ("who,item,when\n1,2,3\n", None, "what", "no column 'what'; the file has 'who', 'item'"),
        ("who,what,when\n1,2,3\n1,2,soon\n", 3, "when", "a whole number, found 'soon'"),
        ("who,what,when\n1,2,3\n1,2,\n", 3, "when", "a whole number, found nothing"),
        ("who,what,when\n1,2,3\n,2,3\n", 3, "who", "an id, found nothing; fill"),
        ('who,what,when\n1,2,3\n1,"",3\n', 3, "what", "an id, found nothing; fill"),
        ("who,what,when\n1,2,3\n1,2,3,4\n", 3, None, "expected 3 fields, found 4"),
        ('who,what,when\n1,"a\nb",3\n1,2,soon\n', 4, "when", "found 'soon'"),
        ("who,what,when\n1,2,3\n\n1,2,3\n", 3, "who", "an id, found nothing; fill"),
    ],
)
def test_bad_csv(tmp_path, text, line, field, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_table(path, columns=COLUMNS)
    assert (caught.value.line, caught.value.field) == (line, field)
    assert str(path) in str(caught.value)


def test_bad_parquet(tmp_path):
    frame = pl.DataFrame(
        {"who": [1, 1], "what": [1, None], "when": [1.5, 2.0], "stars": [True] * 2}
    )
    path = write(tmp_path / "bad.parquet", frame)
    with pytest.raises(DataFormatError, match="row 2, field 'what': expected an id"):
        read_table(path, columns=ColumnMap("who", "what"))
    frame = frame.with_columns(what=pl.lit(1))
    path = write(tmp_path / "bad.parquet", frame)
    with pytest.raises(DataFormatError, match=r"field 'when'.*found Float64"):
        read_table(path, columns=COLUMNS)
    with pytest.raises(DataFormatError, match=r"field 'stars'.*found Boolean"):
        read_table(path, columns=ColumnMap("who", "what", rating="stars", min_rating=1))
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(DataFormatError, match="not a readable parquet file"):
        read_table(tmp_path / "text.parquet", columns=COLUMNS)


def test_bad_requests(tmp_path):
    with pytest.raises(ValueError, match=r"\.csv or \.parquet file, found suffix '\.tsv'"):
        read_table(tmp_path / "a.tsv", columns=COLUMNS)
    with pytest.raises(ValueError, match="needs the rating column"):
        ColumnMap("who", "what", min_rating=3)
