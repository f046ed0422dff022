"""Filtering and splits against naive loops."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrec.data import (
    Interactions,
    SequenceDataset,
    Vocabulary,
    build_interactions,
    dataset_of,
    filter_min_count,
    leave_one_out,
    time_cutoffs,
    time_split,
)

EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 30)), min_size=1, max_size=60
)


def make(events, *, times=True) -> Interactions:
    users = Vocabulary.create("user", [f"u{i}" for i in range(6)], first_index=0)
    items = Vocabulary.create("item", [f"i{i}" for i in range(1, 7)], first_index=1)
    user, item, time = (list(column) for column in zip(*events, strict=True))
    return build_interactions(
        np.array(user, dtype=np.int32),
        np.array(item, dtype=np.int32),
        np.array(time, dtype=np.int64) + 1000 if times else None,
        users=users,
        items=items,
        source="test",
    )


def raw_events(interactions: Interactions) -> list[tuple[str, str]]:
    return [
        (interactions.users.raw_of(int(u)), interactions.items.raw_of(int(i)))
        for u, i in zip(interactions.user_index, interactions.item_index, strict=True)
    ]


def rows(dataset: SequenceDataset) -> list[list[int]]:
    return [dataset.sequence(u).tolist() for u in range(len(dataset))]


def naive_core(events, min_user, min_item, iterate):
    while True:
        kept = [
            (u, i)
            for u, i in events
            if sum(e[0] == u for e in events) >= min_user
            and sum(e[1] == i for e in events) >= min_item
        ]
        if not iterate or kept == events:
            return kept
        events = kept


@settings(deadline=None, max_examples=60)
@given(events=EVENTS, min_user=st.integers(1, 4), min_item=st.integers(1, 4), iterate=st.booleans())
def test_filter_keeps_the_core_and_renumbers(events, min_user, min_item, iterate):
    given_ = make(events)
    expected = naive_core(raw_events(given_), min_user, min_item, iterate)
    if not expected:
        with pytest.raises(ValueError, match=f"no event is left with min_user={min_user}"):
            filter_min_count(given_, min_user=min_user, min_item=min_item, iterate=iterate)
        return
    left = filter_min_count(given_, min_user=min_user, min_item=min_item, iterate=iterate)
    assert raw_events(left) == expected
    assert set(left.item_index.tolist()) == set(range(1, left.num_items + 1))
    assert set(left.user_index.tolist()) == set(range(left.num_users))
    assert left.timestamps is not None
    assert len(left.timestamps) == len(left)


@settings(deadline=None, max_examples=60)
@given(events=EVENTS, times=st.booleans())
def test_leave_one_out(events, times):
    interactions = make(events, times=times)
    whole = rows(dataset_of(interactions))
    split = leave_one_out(interactions)
    assert rows(split.train) == [s[:-2] if len(s) >= 3 else s for s in whole]
    asked = [u for u, s in enumerate(whole) if len(s) >= 3]
    for part, end in ((split.valid, -2), (split.test, -1)):
        assert part.user_index is not None
        assert part.user_index.tolist() == asked
        assert rows(part.histories) == [whole[u][:end] for u in asked]
        assert part.targets.tolist() == [whole[u][end] for u in asked]
    assert split.report.train_only_users == len(whole) - len(asked)
    assert split.report.single_event_users == sum(len(s) == 1 for s in whole)


@settings(deadline=None, max_examples=60)
@given(events=EVENTS)
def test_timestamps_count_from_the_first_event_in_every_part(events):
    interactions = make(events)
    split = leave_one_out(interactions)
    assert interactions.timestamps is not None
    first = int(interactions.timestamps.min())
    for part in (split.train, split.valid.histories, split.test.histories):
        assert part.first_timestamp == first
    for row, user in enumerate(np.asarray(split.test.user_index)):
        own = interactions.timestamps[interactions.user_index == user]
        start, end = split.test.histories.seq_offsets[row : row + 2]
        found = split.test.histories.timestamps[start:end]
        np.testing.assert_array_equal(found, own[:-1] - first)


@settings(deadline=None, max_examples=100)
@given(events=EVENTS, moments=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_time_split(events, moments):
    early, late = sorted(moments)
    assume(early < late)
    interactions = make(events)
    assert interactions.timestamps is not None
    valid_from, test_from = early + 1000, late + 1000
    timed = [
        [
            (int(i), int(t))
            for u, i, t in zip(
                interactions.user_index,
                interactions.item_index,
                interactions.timestamps,
                strict=True,
            )
            if u == user
        ]
        for user in range(6)
    ]

    def ask(begin: int, end: float):
        found = []
        for user, sequence in enumerate(timed):
            known = [item for item, time in sequence if time < begin]
            later = [item for item, time in sequence if begin <= time < end]
            if known and later:
                found.append((user, known, later[0]))
        return found

    expected = {"valid": ask(valid_from, test_from), "test": ask(test_from, float("inf"))}
    train = [[item for item, time in sequence if time < valid_from] for sequence in timed]
    if not (any(train) and expected["valid"] and expected["test"]):
        with pytest.raises(ValueError, match="is empty with valid_from"):
            time_split(interactions, valid_from=valid_from, test_from=test_from)
        return
    split = time_split(interactions, valid_from=valid_from, test_from=test_from)
    assert rows(split.train) == train
    for name, questions in expected.items():
        part = getattr(split, name)
        found = zip(part.user_index.tolist(), rows(part.histories), part.targets, strict=True)
        assert list(found) == questions


def test_time_cutoffs_are_shares_of_events():
    interactions = make([(u, i, 5 * u + i) for u in range(5) for i in range(1, 6)])
    assert interactions.timestamps is not None
    valid_from, test_from = time_cutoffs(interactions, train=0.6, valid=0.2)
    assert abs((interactions.timestamps < valid_from).mean() - 0.6) < 0.05
    assert abs((interactions.timestamps < test_from).mean() - 0.8) < 0.05
    with pytest.raises(ValueError, match="sum below 1"):
        time_cutoffs(interactions, train=0.9, valid=0.1)


def test_time_split_needs_times_in_order():
    with pytest.raises(ValueError, match=r"test has no timestamps.*leave_one_out"):
        time_split(make([(0, 1, 1)], times=False), valid_from=1, test_from=2)
    with pytest.raises(ValueError, match="valid_from=5 must be before test_from=5"):
        time_split(make([(0, 1, 1)]), valid_from=5, test_from=5)


def test_times_in_the_wrong_unit_are_noticed():
    with pytest.raises(ValueError, match=r"timestamps span 3000000000 seconds.*time_unit"):
        dataset_of(make([(0, 1, 0), (0, 2, 3_000_000_000)]))


@pytest.mark.parametrize(
    ("items", "offsets", "message"),
    [
        ([1, 2], [0, 1], "seq_offsets must be non-decreasing from 0 to 2"),
        ([1, 2], [0, 2, 1, 2], "seq_offsets must be non-decreasing"),
        ([1, 0], [0, 2], r"item_ids\[1\] is 0; expected 1\.\.5 \(0 is padding\)"),
        ([6, 1], [0, 2], r"item_ids\[0\] is 6"),
    ],
)
def test_datasets_that_contradict_themselves(items, offsets, message):
    with pytest.raises(ValueError, match=message):
        SequenceDataset(
            np.array(items, dtype=np.int32), np.zeros(2, np.int32), np.array(offsets), num_items=5
        )


def test_rows_out_of_range():
    dataset = SequenceDataset.from_sequences([[1, 2], []], num_items=2)
    assert rows(dataset) == [[1, 2], []]
    assert dataset.lengths.tolist() == [2, 0]
    with pytest.raises(IndexError, match=r"row 2 is outside 0\.\.1"):
        dataset.sequence(2)
