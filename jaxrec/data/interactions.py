"""Interactions: who touched which item when, as NumPy columns in a fixed order."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxrec.data.vocabulary import Vocabulary

type TimeUnit = Literal["s", "ms", "us", "ns"]

TICKS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class ReadReport:
    """What reading did to the rows of a file, so that nothing vanishes unseen.

    Attributes:
      source: the file, or the name of the generator.
      rows_read: events found, before anything was left out.
      rows_filtered: events left out because the caller asked (event type, minimum rating).
      duplicates_dropped: repeats of the same user, item and timestamp that were left out.
      out_of_order: events earlier than the one before them of the same user; they were sorted.
      single_event_users: users with one event: they cannot be trained or evaluated on.
    """

    source: str
    rows_read: int
    rows_filtered: int = 0
    duplicates_dropped: int = 0
    out_of_order: int = 0
    single_event_users: int = 0


@dataclass(frozen=True, eq=False)
class Interactions:
    """n events, all events of a user together, in time order.

    Users stand in number order; events of one user with equal timestamps keep the order they
    had in the file. Without timestamps the file's order is the time order.

    Attributes:
      user_index: user numbers from 0; i32[n].
      item_index: item numbers from 1; i32[n].
      timestamps: seconds since 1970; i64[n]; None where the source has none.
      users: raw user ids, numbered from 0.
      items: raw item ids, numbered from 1.
      report: what was read and left out.
    """

    user_index: Int32[np.ndarray, "n"]
    item_index: Int32[np.ndarray, "n"]
    timestamps: Int64[np.ndarray, "n"] | None
    users: Vocabulary
    items: Vocabulary
    report: ReadReport

    @property
    def num_users(self) -> int:
        """Users in the vocabulary."""
        return self.users.size

    @property
    def num_items(self) -> int:
        """Items in the vocabulary, padding not counted."""
        return self.items.size

    def __len__(self) -> int:
        return len(self.user_index)


def build_interactions(
    user_index: Int32[np.ndarray, "n"],
    item_index: Int32[np.ndarray, "n"],
    timestamps: Int[np.ndarray, "n"] | None,
    *,
    users: Vocabulary,
    items: Vocabulary,
    source: str,
    rows_filtered: int = 0,
    time_unit: TimeUnit = "s",
) -> Interactions:
    """Sorts events by user and time (stably) and drops repeats of user, item and timestamp.

    Repeats are dropped only where there are timestamps: in a bare sequence the same item twice
    is two events. Comparisons use the full resolution of `timestamps`; seconds are kept.

    Cost: two sorts at worst, none where the rows already are in order.
    """
    rows_read = len(user_index)
    order = _time_order(user_index, timestamps)
    out_of_order = 0
    if order is not None:
        if timestamps is not None:
            out_of_order = _count_out_of_order(user_index, timestamps)
            timestamps = timestamps[order]
        user_index, item_index = user_index[order], item_index[order]
    if timestamps is not None:
        keep = _first_of_repeats(user_index, item_index, timestamps)
        if not keep.all():
            user_index, item_index, timestamps = (
                user_index[keep],
                item_index[keep],
                timestamps[keep],
            )
        timestamps = timestamps.astype(np.int64) // TICKS_PER_SECOND[time_unit]
    counts = np.bincount(user_index, minlength=users.size)
    report = ReadReport(
        source=source,
        rows_read=rows_read + rows_filtered,
        rows_filtered=rows_filtered,
        duplicates_dropped=rows_read - len(user_index),
        out_of_order=out_of_order,
        single_event_users=int((counts == 1).sum()),
    )
    return Interactions(user_index, item_index, timestamps, users, items, report)


def _time_order(
    user_index: Int32[np.ndarray, "n"], timestamps: Int[np.ndarray, "n"] | None
) -> np.ndarray | None:
    """The stable permutation into (user, time) order; None where the rows already are in it."""
    same_user = user_index[1:] == user_index[:-1]
    in_order = user_index[1:] > user_index[:-1]
    if timestamps is None:
        return None if (same_user | in_order).all() else np.argsort(user_index, kind="stable")
    in_order |= same_user & (timestamps[1:] >= timestamps[:-1])
    return None if in_order.all() else np.lexsort((timestamps, user_index))


def _count_out_of_order(user_index: np.ndarray, timestamps: np.ndarray) -> int:
    """Events earlier than the one before them of the same user, in file order."""
    by_user = np.argsort(user_index, kind="stable")
    users, times = user_index[by_user], timestamps[by_user]
    return int(((users[1:] == users[:-1]) & (times[1:] < times[:-1])).sum())


def _first_of_repeats(
    user_index: np.ndarray, item_index: np.ndarray, timestamps: np.ndarray
) -> np.ndarray:
    """Marks the rows to keep: the first of each (user, item, timestamp)."""
    keep = np.ones(len(user_index), dtype=bool)
    tied = (user_index[1:] == user_index[:-1]) & (timestamps[1:] == timestamps[:-1])
    if not tied.any():
        return keep
    # Only rows that share user and time with a neighbour can repeat each other.
    candidates = np.flatnonzero(np.append(tied, False) | np.insert(tied, 0, False))
    columns = [column[candidates] for column in (item_index, timestamps, user_index)]
    order = np.lexsort(columns)
    repeats = np.logical_and.reduce([c[order][1:] == c[order][:-1] for c in columns])
    keep[candidates[order[1:][repeats]]] = False
    return keep
