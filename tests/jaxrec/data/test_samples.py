"""Batches against a naive reference, token by token."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import SampleIndex, SequenceDataset, make_batch, make_query_batch
from jaxrec.ops.jagged import JaggedBatch

SEQUENCES = st.lists(st.lists(st.integers(1, 9), max_size=8), max_size=6)
MODES = st.sampled_from(["sequences", "windows", "prefixes"])


def make(sequences: list[list[int]]) -> SequenceDataset:
    times = [[100 * row + place for place in range(len(s))] for row, s in enumerate(sequences)]
    return SequenceDataset.from_sequences(sequences, num_items=9, timestamps=times)


def naive_samples(sequences, mode, max_len):
    """(inputs, their times, targets) of every sample, in order."""
    samples = []
    for row, sequence in enumerate(sequences):
        times = [100 * row + place for place in range(len(sequence))]
        if mode == "sequences" and len(sequence) >= 2:
            samples.append(
                (sequence[:-1][-max_len:], times[:-1][-max_len:], sequence[1:][-max_len:])
            )
        if mode == "windows":
            ends = range(len(sequence) - 1, 0, -max_len)
            spans = [(max(0, end - max_len), end) for end in reversed(ends)]
            samples += [(sequence[a:b], times[a:b], sequence[a + 1 : b + 1]) for a, b in spans]
        if mode == "prefixes":
            for end in range(1, len(sequence)):
                inputs = sequence[:end][-max_len:]
                samples.append((inputs, times[:end][-max_len:], [sequence[end]]))
    return samples


def unpack(batch: JaggedBatch, mode) -> list[tuple[list[int], list[int], list[int]]]:
    """The samples of a batch, read by way of offsets and target positions."""
    ends = np.asarray(batch.seq_offsets)[1:]
    found = []
    for start, end in zip(batch.seq_offsets[:-1], ends, strict=True):
        inputs = batch.item_ids[start:end].tolist()
        if inputs:
            real = np.asarray(batch.target_ids) != 0
            inside = real & (batch.target_positions >= start) & (batch.target_positions < end)
            targets = batch.target_ids[inside].tolist()
            positions = batch.target_positions[inside].tolist()
            assert positions == ([end - 1] if mode == "prefixes" else list(range(start, end)))
            found.append((inputs, batch.timestamps[start:end].tolist(), targets))
    return found


@settings(deadline=None, max_examples=100)
@given(sequences=SEQUENCES, mode=MODES, max_len=st.integers(1, 9), data=st.data())
def test_batches_equal_the_naive_reference(sequences, mode, max_len, data):
    samples = SampleIndex(make(sequences), mode, max_len)
    expected = naive_samples(sequences, mode, max_len)
    assert len(samples) == len(expected)
    numbers = st.integers(0, len(samples) - 1) if len(samples) else st.nothing()
    ids = data.draw(st.lists(numbers, max_size=5 if len(samples) else 0))
    budget, slots = 5 * 9, 6
    batch = make_batch(samples, ids, token_budget=budget, max_sequences=slots)
    assert unpack(batch, mode) == [expected[i] for i in ids]

    used = sum(len(expected[i][0]) for i in ids)
    targets = slots if mode == "prefixes" else budget
    assert [len(field) for field in batch] == [budget, slots + 1, targets, targets, budget]
    assert all(field.dtype == np.int32 for field in batch)
    assert batch.seq_offsets[-1] == used
    assert not batch.item_ids[used:].any()
    assert not batch.timestamps[used:].any()
    assert (np.asarray(batch.target_ids) != 0).sum() == (len(ids) if mode == "prefixes" else used)


@settings(deadline=None, max_examples=50)
@given(
    sequences=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6),
    max_len=st.integers(1, 9),
    data=st.data(),
)
def test_queries_ask_at_the_last_token(sequences, max_len, data):
    rows = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=4))
    targets = np.arange(1, len(sequences) + 1, dtype=np.int32)
    settings_ = {"max_len": max_len, "token_budget": 40, "max_sequences": 5}
    batch = make_query_batch(make(sequences), rows, targets=targets, **settings_)
    for slot, row in enumerate(rows):
        start, end = batch.seq_offsets[slot : slot + 2]
        assert batch.item_ids[start:end].tolist() == sequences[row][-max_len:]
        assert batch.target_positions[slot] == end - 1
        assert batch.target_ids[slot] == row + 1
    assert not batch.target_ids[len(rows) :].any()
    unknown = make_query_batch(make(sequences), rows, **settings_)
    assert not unknown.target_ids.any()
    np.testing.assert_array_equal(unknown.target_positions, batch.target_positions)


def test_an_empty_history_is_named():
    histories = make([[1], [], [2]])
    with pytest.raises(ValueError, match="the history in row 1 is empty"):
        make_query_batch(histories, [0, 1], max_len=3, token_budget=9, max_sequences=3)


@pytest.mark.parametrize(
    ("ids", "budget", "slots", "message"),
    [
        ([0, 5], 9, 3, "sample 5 does not exist; there are 5 samples"),
        ([-1], 9, 3, "sample -1 does not exist"),
        ([0, 1, 2], 9, 2, "3 sequences do not fit in max_sequences=2"),
        ([2, 1], 4, 2, "5 tokens do not fit in token_budget=4"),
    ],
)
def test_batches_that_cannot_be(ids, budget, slots, message):
    samples = SampleIndex(make([[1, 2, 3, 4], [5, 6, 7]]), "prefixes", 9)
    with pytest.raises(ValueError, match=message):
        make_batch(samples, ids, token_budget=budget, max_sequences=slots)


def test_bad_rows():
    with pytest.raises(ValueError, match="row 3 does not exist; there are 1 histories"):
        make_query_batch(make([[1]]), [3], max_len=3, token_budget=9, max_sequences=3)


def test_256_prefixes_take_about_a_millisecond_at_most():
    rng = np.random.default_rng(0)
    dataset = SequenceDataset.from_sequences(rng.integers(1, 100, (500, 60)).tolist(), num_items=99)
    samples = SampleIndex(dataset, "prefixes", 50)
    ids = rng.integers(len(samples), size=256)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        make_batch(samples, ids, token_budget=12_800, max_sequences=256)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3  # 0.1 ms in itself; the rest is for the type checks and slow hosts
