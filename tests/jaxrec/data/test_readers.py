"""Round trips of every text format, and one test for each way a file can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import (
    DataFormatError,
    Interactions,
    read_events_jsonl,
    read_movielens,
    read_sequences,
)

RAW_ID = st.text("abcXYZ0189_-é", min_size=1, max_size=4).filter(lambda text: text != "0")
SEQUENCES = st.dictionaries(
    RAW_ID, st.lists(RAW_ID, min_size=1, max_size=6), min_size=1, max_size=6
)
EVENTS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=30
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def by_user(interactions: Interactions) -> dict[str, list[str]]:
    """Raw item ids of each raw user id, in order."""
    found: dict[str, list[str]] = {}
    for user, item in zip(interactions.user_index, interactions.item_index, strict=True):
        raw_user = interactions.users.raw_of(int(user))
        found.setdefault(raw_user, []).append(interactions.items.raw_of(int(item)))
    return found


def expected_events(events: list[tuple[int, int, int]]) -> dict[str, list[str]]:
    """Naive reading: first of each (user, item, time), then by time with file order for ties."""
    kept = list(dict.fromkeys(events))
    return {
        str(user): [str(item) for u, item, _ in sorted(kept, key=lambda e: e[2]) if u == user]
        for user in {event[0] for event in kept}
    }


@settings(deadline=None, max_examples=40)
@given(sequences=SEQUENCES)
def test_sequences_round_trip(tmp_path_factory, sequences):
    folder = tmp_path_factory.mktemp("sequences")
    text = "".join(f"{user} {' '.join(items)}\n" for user, items in sequences.items())
    read = read_sequences(write(folder, "a.txt", text), user_column=True)
    assert by_user(read) == sequences
    assert list(read.users.ids) == list(sequences)
    assert read.timestamps is None
    first_seen = list(dict.fromkeys(item for items in sequences.values() for item in items))
    assert list(read.items.ids) == first_seen
    assert read.items.index_of(first_seen[0]) == 1
    singles = sum(len(items) == 1 for items in sequences.values())
    assert read.report.single_event_users == singles

    text = "".join(f"{' '.join(items)}\n" for items in sequences.values()) + "\n\n"
    read = read_sequences(write(folder, "b.txt", text), user_column=False)
    lines = {str(line): items for line, items in enumerate(sequences.values(), start=1)}
    assert by_user(read) == lines


@settings(deadline=None, max_examples=40)
@given(events=EVENTS)
def test_jsonl_round_trip(tmp_path_factory, events):
    folder = tmp_path_factory.mktemp("jsonl")
    lines = []
    for session in dict.fromkeys(event[0] for event in events):
        rows = [{"aid": i, "ts": t * 10, "type": "clicks"} for s, i, t in events if s == session]
        lines.append(json.dumps({"session": session, "events": rows}))
    path = write(folder, "events.jsonl", "\n".join(lines))
    read = read_events_jsonl(path, time_unit="s")
    assert by_user(read) == expected_events(events)
    assert read.report.rows_read == len(events)
    assert read.report.duplicates_dropped == len(events) - len(set(events))
    assert len(read) == len(set(events))


@settings(deadline=None, max_examples=40)
@given(events=EVENTS, dat=st.booleans())
def test_movielens_round_trip(tmp_path_factory, events, dat):
    folder = tmp_path_factory.mktemp("movielens")
    sep = "::" if dat else ","
    header = "" if dat else "userId,movieId,rating,timestamp\n"
    text = header + "".join(f"{u}{sep}{i}{sep}3.5{sep}{t}\n" for u, i, t in events)
    read = read_movielens(write(folder, "ratings", text))
    assert by_user(read) == expected_events(events)
    assert read.timestamps is not None
    for user in range(read.num_users):
        times = read.timestamps[read.user_index == user]
        assert (np.diff(times) >= 0).all()


def test_movielens_columns_may_stand_in_any_order_and_ratings_are_filtered(tmp_path):
    text = "timestamp,rating,movieId,extra,userId\r\n5,4.0,7,x,1\r\n6,2.5,8,x,1\r\n7,3,9,x,2\r\n"
    read = read_movielens(write(tmp_path, "ratings.csv", text), min_rating=3)
    assert by_user(read) == {"1": ["7"], "2": ["9"]}
    assert (read.report.rows_read, read.report.rows_filtered) == (3, 1)


def test_jsonl_sorts_by_time_keeps_file_order_of_ties_and_counts(tmp_path):
    events = [(1, 900), (2, 100), (3, 900), (1, 900), (4, 500)]
    rows = [{"aid": aid, "ts": ts, "type": "clicks"} for aid, ts in events]
    rows.append({"aid": 9, "ts": 1, "type": "carts"})
    path = write(tmp_path, "x.jsonl", json.dumps({"session": "s", "events": rows}))
    read = read_events_jsonl(path, types=["clicks"])
    assert by_user(read) == {"s": ["2", "4", "1", "3"]}
    report = read.report
    assert (report.rows_read, report.rows_filtered, report.duplicates_dropped) == (6, 1, 1)
    assert report.out_of_order == 2


def test_milliseconds_order_events_and_become_seconds(tmp_path):
    rows = [{"aid": 1, "ts": 5900}, {"aid": 2, "ts": 5100}]
    path = write(tmp_path, "x.jsonl", json.dumps({"session": 1, "events": rows}))
    read = read_events_jsonl(path)
    assert by_user(read) == {"1": ["2", "1"]}
    assert read.timestamps is not None
    assert read.timestamps.tolist() == [5, 5]


def test_sequences_keep_repeats_and_zero_on_request(tmp_path):
    path = write(tmp_path, "a.txt", "7 0 3 3 0\n")
    read = read_sequences(path, user_column=True, zero_is_item=True)
    assert by_user(read) == {"7": ["0", "3", "3", "0"]}
    assert read.items.index_of("0") == 1
    assert read.report.duplicates_dropped == 0


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty"),
        ("\n\n", None, None, "the file is empty"),
        ("1 2\n\n3 4\n", 2, None, "the line is empty"),
        ("1 2 3\n2 5 0 0\n", 2, "item 2", "zero_is_item=True"),
        ("1 2\n2\n", 2, "items", "the user has no items"),
        ("1,2,3\n", 1, None, "Use read_table"),
        ("1 2\n3 4\n1 5\n", 3, "user", "user '1' already stands on line 1"),
    ],
)
def test_bad_sequences(tmp_path, text, line, field, message):
    path = write(tmp_path, "bad.txt", text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_sequences(path, user_column=True)
    assert (caught.value.line, caught.value.field) == (line, field)
    assert str(path) in str(caught.value)
    if line is not None:
        assert f"line {line}" in str(caught.value)


def test_bytes_that_are_not_utf8_are_placed(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("1 2\n3 caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataFormatError, match="line 2: byte 6 is not UTF-8"):
        read_sequences(path, user_column=True)


def test_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbf5 6\n")
    assert by_user(read_sequences(path, user_column=True)) == {"5": ["6"]}


GOOD = '{"session": 1, "events": [{"aid": 1, "ts": 1, "type": "clicks"}]}\n'


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty"),
        (GOOD + "{oops\n", 2, None, "not valid JSON"),
        (GOOD + "[1]\n", 2, None, "expected an object with session and events"),
        ('{"events": []}\n', 1, "session", "the key is missing"),
        ('{"session": 1}\n', 1, "events", "the key is missing"),
        ('{"session": 1.5, "events": []}\n', 1, "session", "found 1.5"),
        ('{"session": 1, "events": {}}\n', 1, "events", "expected a list"),
        ('{"session": 1, "events": [3]}\n', 1, "events[0]", "expected an object"),
        (
            GOOD + '{"session": 1, "events": [{"aid": 1, "ts": 2, "type": "clicks"}, {"ts": 1}]}',
            2,
            "events[1].aid",
            "the key is missing",
        ),
        ('{"session": 1, "events": [{"aid": null, "ts": 1}]}', 1, "events[0].aid", "None"),
        ('{"session": 1, "events": [{"aid": 1, "ts": "x"}]}', 1, "events[0].ts", "'x'"),
        ('{"session": 1, "events": [{"aid": 1, "ts": 1}]}', 1, "events[0].type", "missing"),
        (
            '{"session": 1, "events": [{"aid": 1, "ts": 1, "type": []}]}',
            1,
            "events[0].type",
            r"found \[\]",
        ),
        (GOOD.replace("clicks", "orders"), None, "type", r"the file has \['orders'\]"),
    ],
)
def test_bad_jsonl(tmp_path, text, line, field, message):
    path = write(tmp_path, "bad.jsonl", text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_events_jsonl(path, types={"clicks"})
    assert (caught.value.line, caught.value.field) == (line, field)


def test_types_given_as_one_string_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"pass \['clicks'\]"):
        read_events_jsonl(write(tmp_path, "x.jsonl", GOOD), types="clicks")


HEADER = "userId,movieId,rating,timestamp\n"


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", None, None, "the file is empty"),
        (HEADER, None, None, "the file is empty; expected ratings"),
        ("userId,movieId,timestamp\n1,2,3\n", None, "rating", "no column 'rating'.*'timestamp'"),
        (HEADER + "1,2,3.5,9\n1,x,3.5,9\n", 3, "movieId", "expected a whole number, found 'x'"),
        (HEADER + "1,2,3.5,9\n\n1,2,good,9\n", 4, "rating", "expected a number, found 'good'"),
        (HEADER + "1,2,3.5,9.5\n", 2, "timestamp", "found '9.5'"),
        (HEADER + "1,2,3.5\n", 2, "timestamp", "expected 4 fields, found 3"),
        (HEADER + "1,2,,9\n", 2, "rating", "found ''"),
        ("1::2::3::4\n1::2::x::4\n", 2, "rating", "found 'x'"),
    ],
)
def test_bad_movielens(tmp_path, text, line, field, message):
    path = write(tmp_path, "ratings", text)
    with pytest.raises(DataFormatError, match=message) as caught:
        read_movielens(path)
    assert (caught.value.line, caught.value.field) == (line, field)


def test_movielens_without_a_rating_high_enough(tmp_path):
    path = write(tmp_path, "ratings.csv", HEADER + "1,2,3.5,9\n")
    with pytest.raises(DataFormatError, match=r"min_rating=6; the highest is 3\.5"):
        read_movielens(path, min_rating=6)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        read_sequences(tmp_path / "nowhere.txt", user_column=True)
