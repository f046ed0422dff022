"""Sequences of many users in memory: one flat array and offsets (CSR)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxrec.data.interactions import Interactions

_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """U item sequences in time order.

    Sequence u is `item_ids[seq_offsets[u]:seq_offsets[u + 1]]`; it may be empty.

    Attributes:
      item_ids: item numbers in 1..num_items; i32[n].
      timestamps: seconds since `first_timestamp`; zeros where there are no times; i32[n].
      seq_offsets: non-decreasing, from 0 to n; i64[U + 1].
      num_items: items in the vocabulary; a model's table has num_items + 1 rows.
      first_timestamp: what `timestamps` counts from, in seconds since 1970. All parts of a split
        share it.

    Raises:
      ValueError: arrays that contradict each other, item numbers out of range.
    """

    item_ids: Int32[np.ndarray, "n"]
    timestamps: Int32[np.ndarray, "n"]
    seq_offsets: Int64[np.ndarray, "U1"]
    num_items: int
    first_timestamp: int = 0

    def __post_init__(self):
        offsets, n = self.seq_offsets, len(self.item_ids)
        if len(self.timestamps) != n:
            raise ValueError(f"{n} item_ids but {len(self.timestamps)} timestamps; expected equal.")
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
            raise ValueError(f"seq_offsets must be non-decreasing from 0 to {n}, one more than U.")
        if n and not (self.item_ids.min() >= 1 and self.item_ids.max() <= self.num_items):
            bad = int(np.argmax((self.item_ids < 1) | (self.item_ids > self.num_items)))
            raise ValueError(
                f"item_ids[{bad}] is {self.item_ids[bad]}; expected 1..{self.num_items} "
                "(0 is padding)."
            )

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        num_items: int,
        timestamps: Sequence[Sequence[int]] | None = None,
    ) -> "SequenceDataset":
        """Packs lists of item numbers, with seconds since any common start where given."""
        lengths = [len(sequence) for sequence in sequences]
        if timestamps is not None and [len(times) for times in timestamps] != lengths:
            raise ValueError("timestamps must have the lengths of sequences.")
        flat = np.array([item for sequence in sequences for item in sequence], dtype=np.int32)
        times = np.zeros(len(flat), dtype=np.int32)
        if timestamps is not None:
            times = np.array([time for row in timestamps for time in row], dtype=np.int32)
        return cls(flat, times, offsets_of(np.array(lengths, dtype=np.int64)), num_items)

    @property
    def lengths(self) -> Int64[np.ndarray, "U"]:
        """Events of each sequence; i64[U]."""
        return np.diff(self.seq_offsets)

    def __len__(self) -> int:
        return len(self.seq_offsets) - 1

    def sequence(self, row: int | np.integer) -> Int32[np.ndarray, "L"]:
        """The item numbers of one sequence, a view; a row out of range is an IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}.")
        return self.item_ids[self.seq_offsets[row] : self.seq_offsets[row + 1]]

    def take(self, rows: Int[np.ndarray, "R"], lengths: Int[np.ndarray, "R"]) -> "SequenceDataset":
        """A copy of the first `lengths[i]` events of sequence `rows[i]`, for every i."""
        tokens = concatenated_ranges(self.seq_offsets[rows], lengths)
        return SequenceDataset(
            self.item_ids[tokens],
            self.timestamps[tokens],
            offsets_of(lengths),
            self.num_items,
            self.first_timestamp,
        )


@dataclass(frozen=True, eq=False)
class EvalSet:
    """U questions: which item follows this history?

    Attributes:
      histories: what is known before each target; never empty.
      targets: the item that followed; i32[U].
      user_index: the user's number in the interactions (a row of `Split.train`); i32[U].
    """

    histories: SequenceDataset
    targets: Int32[np.ndarray, "U"]
    user_index: Int32[np.ndarray, "U"] | None = None

    def __post_init__(self):
        if len(self.targets) != len(self.histories):
            raise ValueError(
                f"{len(self.histories)} histories but {len(self.targets)} targets; expected equal."
            )
        wrong = (self.targets < 1) | (self.targets > self.histories.num_items)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"targets[{row}] is {self.targets[row]}; expected 1..{self.histories.num_items} "
                "(0 is padding)."
            )

    def __len__(self) -> int:
        return len(self.targets)


def dataset_of(interactions: Interactions) -> SequenceDataset:
    """All events as one sequence a user: row u is user number u."""
    counts = np.bincount(interactions.user_index, minlength=interactions.num_users)
    seconds, first = np.zeros(len(interactions), dtype=np.int32), 0
    if interactions.timestamps is not None and len(interactions):
        first, last = int(interactions.timestamps.min()), int(interactions.timestamps.max())
        if last - first > _INT32_MAX:
            raise ValueError(
                f"timestamps span {last - first} seconds (68 years fit). Are they in another "
                "unit? Pass time_unit to the reader."
            )
        seconds = (interactions.timestamps - first).astype(np.int32)
    return SequenceDataset(
        interactions.item_index, seconds, offsets_of(counts), interactions.num_items, first
    )


def offsets_of(lengths: Int[np.ndarray, "U"]) -> Int64[np.ndarray, "U1"]:
    """Offsets of consecutive sequences of these lengths: 0, then the running total."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concatenated_ranges(
    starts: Int[np.ndarray, "R"], lengths: Int[np.ndarray, "R"]
) -> Int64[np.ndarray, "t"]:
    """starts[0], starts[0] + 1, … (lengths[0] of them), then those of range 1, and so on."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
