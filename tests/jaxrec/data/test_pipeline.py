"""Packing, epochs, resuming at every batch, prefetching, Grain, and evaluation batches."""

import gc
import itertools
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import (
    EvalSet,
    PrefetchIterator,
    SequenceDataset,
    TrainingBatches,
    eval_batches,
    training_batches,
)
from jaxrec.ops.jagged import JaggedBatch

MODES = st.sampled_from(["sequences", "windows", "prefixes"])
SEQUENCES = st.lists(st.lists(st.integers(1, 30), max_size=7), min_size=1, max_size=12).filter(
    lambda sequences: any(len(sequence) >= 2 for sequence in sequences)
)


def distinct_sequences(num: int = 9) -> SequenceDataset:
    """Sequences of 0 to 6 events in which every item occurs once."""
    fresh = itertools.count(1)
    sequences = [[next(fresh) for _ in range(row % 7)] for row in range(num)]
    return SequenceDataset.from_sequences(sequences, num_items=next(fresh))


def batches_of(dataset=None, **changes) -> TrainingBatches:
    options = {"mode": "prefixes", "max_len": 4, "token_budget": 9, "max_sequences": 3, "seed": 5}
    dataset = distinct_sequences() if dataset is None else dataset
    return training_batches(dataset, **{**options, **changes})


def same(a: JaggedBatch, b: JaggedBatch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def samples_in(batches: list[JaggedBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, targets) of every sequence, sorted."""
    found = []
    for batch in batches:
        real = np.asarray(batch.target_ids) != 0
        for start, end in itertools.pairwise(np.asarray(batch.seq_offsets).tolist()):
            inside = real & (batch.target_positions >= start) & (batch.target_positions < end)
            if end > start:
                inputs, targets = batch.item_ids[start:end], batch.target_ids[inside]
                found.append((tuple(inputs.tolist()), tuple(targets.tolist())))
    return sorted(found)


@settings(deadline=None, max_examples=60)
@given(
    sequences=SEQUENCES,
    mode=MODES,
    max_len=st.integers(1, 7),
    spare=st.integers(0, 9),
    max_sequences=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_an_epoch_holds_every_sample_once_within_both_budgets(
    sequences, mode, max_len, spare, max_sequences, shuffle
):
    dataset = SequenceDataset.from_sequences(sequences, num_items=30)
    batches = training_batches(
        dataset,
        mode=mode,
        max_len=max_len,
        token_budget=max_len + spare,
        max_sequences=max_sequences,
        seed=1,
        shuffle=shuffle,
        num_epochs=1,
    )
    packed = list(batches)
    expected = []
    for s in sequences:
        if mode == "prefixes":
            expected += [(tuple(s[:e][-max_len:]), (s[e],)) for e in range(1, len(s))]
        elif mode == "windows":
            spans = [(max(0, end - max_len), end) for end in range(len(s) - 1, 0, -max_len)]
            expected += [(tuple(s[a:b]), tuple(s[a + 1 : b + 1])) for a, b in spans]
        elif len(s) >= 2:
            expected.append((tuple(s[:-1][-max_len:]), tuple(s[1:][-max_len:])))
    assert samples_in(packed) == sorted(expected)
    assert len(packed) == batches.num_batches_per_epoch
    assert batches.num_samples == len(expected)
    for batch, following in itertools.pairwise(packed):
        # Greedy: the first sequence of the next batch did not fit any more.
        used = int(batch.seq_offsets[-1])
        count = int((np.diff(batch.seq_offsets) > 0).sum())
        assert count == max_sequences or used + following.seq_offsets[1] > max_len + spare
    assert all(batch.item_ids.shape == (max_len + spare,) for batch in packed)


def test_epochs_are_shuffled_differently_and_seeds_decide():
    first, second = (list(batches_of(num_epochs=n)) for n in (1, 2))
    assert samples_in(second[len(first) :]) == samples_in(first)
    assert all(same(a, b) for a, b in zip(first, second, strict=False))
    assert not all(same(a, b) for a, b in zip(first, second[len(first) :], strict=False))
    other = list(batches_of(num_epochs=1, seed=6))
    assert not all(same(a, b) for a, b in zip(first, other, strict=False))
    plain = list(batches_of(num_epochs=2, shuffle=False))
    assert plain[0].target_ids.tolist() == [3, 5, 6]  # items 1 and 2 and 4 only start sequences
    assert all(same(a, b) for a, b in zip(plain, plain[len(plain) // 2 :], strict=False))


@pytest.mark.parametrize("mode", ["sequences", "prefixes"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_at_every_batch_gives_the_same_batches(mode, prefetch):
    plan = batches_of(mode=mode, num_epochs=3, prefetch=prefetch)
    iterator = iter(plan)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(batch)
        states.append(iterator.get_state())
    assert len(states) == len(batches) + 1 > 6
    assert [state["batches"] for state in states] == list(range(len(states)))
    for cut, state in enumerate(states):
        resumed = iter(plan)
        next(resumed)  # the place before does not matter
        resumed.set_state(json.loads(json.dumps(state)))
        assert resumed.get_state() == state
        rest = list(resumed)
        assert len(rest) == len(batches) - cut
        assert all(same(a, b) for a, b in zip(rest, batches[cut:], strict=True))
        assert resumed.get_state() == states[-1]


def test_training_may_go_on_for_more_epochs_than_planned():
    short = iter(batches_of(num_epochs=1))
    first = list(short)
    longer = iter(batches_of(num_epochs=2))
    longer.set_state(short.get_state())
    whole = list(batches_of(num_epochs=2))
    assert all(same(a, b) for a, b in zip(first + list(longer), whole, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "taken with seed=6, here it is 5"),
        ({"mode": "sequences"}, "taken with num_samples="),
        ({"max_len": 3}, "taken with max_len=3, here it is 4"),
        ({"token_budget": 8}, "token_budget=8"),
        ({"max_sequences": 2}, "max_sequences=2"),
        ({"shuffle": False}, "shuffle=False"),
        ({"dataset": distinct_sequences(12)}, "taken with num_samples="),
    ],
)
def test_states_of_other_settings_are_refused(changes, message):
    state = iter(batches_of(**changes)).get_state()
    with pytest.raises(ValueError, match=message):
        iter(batches_of()).set_state(state)


def test_broken_states_are_refused():
    iterator = iter(batches_of())
    with pytest.raises(ValueError, match="lacks batches, epoch"):
        iterator.set_state({"position": 0})
    with pytest.raises(ValueError, match="out of range"):
        iterator.set_state({**iterator.get_state(), "position": 10_000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_len": 10}, "token_budget=9 is below max_len=10"),
        ({"max_len": 0}, "max_len is 0"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"dataset": SequenceDataset.from_sequences([[1], []], num_items=1)}, "no training sample"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        batches_of(**changes)


class Faulty:
    """A source that fails at its third batch."""

    def __init__(self):
        self.made = 0

    def __iter__(self):
        return self

    def __next__(self) -> JaggedBatch:
        if self.made == 2:
            raise RuntimeError("the disk is on fire")
        self.made += 1
        return JaggedBatch(*[np.full(1, self.made, np.int32)] * 5)

    def get_state(self):
        return {"made": self.made}

    def set_state(self, state):
        self.made = state["made"]

    def close(self):
        pass


def test_prefetched_errors_surface_where_they_happened():
    iterator = PrefetchIterator(Faulty(), depth=5)
    assert [int(next(iterator).item_ids[0]) for _ in range(2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on fire"):
            next(iterator)
    assert iterator.get_state() == {"made": 2}
    with pytest.raises(ValueError, match="depth is 0"):
        PrefetchIterator(Faulty(), depth=0)


def prefetch_threads() -> int:
    return sum(thread.name == "jaxrec-prefetch" for thread in threading.enumerate())


def test_prefetch_threads_end_on_close_and_when_forgotten():
    iterator = iter(batches_of(prefetch=2))
    expected = list(itertools.islice(batches_of(), 4))
    assert same(next(iterator), expected[0])
    assert prefetch_threads() == 1
    iterator.close()
    assert prefetch_threads() == 0
    assert same(next(iterator), expected[1])  # close pauses; nothing prepared is lost or repeated
    del iterator
    gc.collect()
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetch_threads() == 0


def test_grain_gives_the_same_batches_and_states():
    grain = pytest.importorskip("grain", reason="to_grain needs grain")
    own, wrapped = iter(batches_of(num_epochs=2)), iter(batches_of(num_epochs=2).to_grain())
    for _ in range(4):
        assert same(next(own), next(wrapped))
        assert own.get_state() == wrapped.get_state()
    wrapped.set_state(own.get_state())
    threaded = grain.experimental.ThreadPrefetchIterDataset(
        batches_of(num_epochs=2).to_grain(), prefetch_buffer_size=2
    )
    ahead = iter(threaded)
    ahead.set_state(own.get_state())
    rest = list(own)
    assert rest
    for batch in rest:
        assert same(next(wrapped), batch)
        assert same(next(ahead), batch)
    mapped = batches_of(num_epochs=1).to_grain().map(lambda batch: int(batch.seq_offsets[-1]))
    assert list(mapped) == [int(batch.seq_offsets[-1]) for batch in batches_of(num_epochs=1)]


def test_only_what_needs_grain_or_polars_asks_for_them():
    code = """
import sys
sys.modules["grain"] = sys.modules["polars"] = None
from jaxrec.data import ColumnMap, SequenceDataset, read_table, training_batches
dataset = SequenceDataset.from_sequences([[1, 2, 3]], num_items=3)
batches = training_batches(dataset, mode="prefixes", max_len=2, token_budget=4, max_sequences=2,
                           seed=0, num_epochs=1, prefetch=1)
print(sum(int(batch.seq_offsets[-1]) for batch in batches))
for ask in (batches.to_grain, lambda: read_table("a.csv", columns=ColumnMap("u", "i"))):
    try:
        ask()
    except ImportError as error:
        print(error)
try:
    training_batches(dataset, mode="words", max_len=2, token_budget=4, max_sequences=2, seed=0)
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.splitlines() == [
        "3",
        "to_grain needs grain: install jaxrec[data].",
        "read_table needs polars: install jaxrec[data].",
        "mode is 'words'; expected 'sequences', 'windows' or 'prefixes'.",
    ], run.stderr


@settings(deadline=None, max_examples=50)
@given(
    histories=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), max_size=12),
    max_len=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    budget=st.none() | st.integers(8, 20),
)
def test_evaluation_asks_every_user_once_in_order(histories, max_len, batch_size, budget):
    targets = np.arange(1, len(histories) + 1, dtype=np.int32)
    eval_set = EvalSet(SequenceDataset.from_sequences(histories, num_items=20), targets)
    asked, shapes = [], set()
    for batch, rows in eval_batches(
        eval_set, max_len=max_len, batch_size=batch_size, token_budget=budget
    ):
        shapes.add(tuple(len(field) for field in (*batch, rows)))
        for slot, row in enumerate(rows.tolist()):
            start, end = batch.seq_offsets[slot : slot + 2]
            if row == -1:
                assert start == end
                assert batch.target_ids[slot] == 0
                continue
            asked.append(row)
            assert batch.item_ids[start:end].tolist() == histories[row][-max_len:]
            assert (batch.target_positions[slot], batch.target_ids[slot]) == (end - 1, row + 1)
    assert asked == list(range(len(histories)))
    assert len(shapes) == min(len(histories), 1)


def test_evaluation_refuses_small_budgets_and_empty_histories():
    eval_set = EvalSet(
        SequenceDataset.from_sequences([[1, 2, 3], []], num_items=3), np.array([1, 2], np.int32)
    )
    with pytest.raises(ValueError, match="a budget of at least 3"):
        next(eval_batches(eval_set, max_len=5, batch_size=2, token_budget=2))
    with pytest.raises(ValueError, match="the history in row 1 is empty"):
        next(eval_batches(eval_set, max_len=5, batch_size=2))
    with pytest.raises(ValueError, match="2 histories but 1 targets"):
        EvalSet(eval_set.histories, np.array([1], np.int32))
    with pytest.raises(ValueError, match=r"targets\[1\] is 4; expected 1\.\.3"):
        EvalSet(eval_set.histories, np.array([1, 4], np.int32))
