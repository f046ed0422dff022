"""Filtering of rare users and items, and splits into training and evaluation."""

from dataclasses import dataclass, replace

import numpy as np

from jaxrec.data.dataset import EvalSet, SequenceDataset, dataset_of
from jaxrec.data.interactions import Interactions


@dataclass(frozen=True)
class SplitReport:
    """How many users stand where.

    Attributes:
      num_users: users of the interactions; rows of `Split.train`.
      valid_users: users with a validation target.
      test_users: users with a test target.
      train_only_users: users with neither.
      single_event_users: of these, users with one event: no sample comes of them.
    """

    num_users: int
    valid_users: int
    test_users: int
    train_only_users: int
    single_event_users: int


@dataclass(frozen=True, eq=False)
class Split:
    """Training sequences (row u is user u) and two sets of evaluation questions."""

    train: SequenceDataset
    valid: EvalSet
    test: EvalSet
    report: SplitReport


def filter_min_count(
    interactions: Interactions, *, min_user: int = 1, min_item: int = 1, iterate: bool = True
) -> Interactions:
    """Keeps users with at least `min_user` events and items with at least `min_item`.

    Users and items are counted together and dropped together. With `iterate` this repeats until
    nothing changes, which gives the k-core; otherwise it happens once, on the given counts.
    Those left are renumbered in their old order; users and items without events vanish.

    Raises:
      ValueError: nothing is left.
    """
    kept = np.arange(len(interactions))
    while True:
        users, items = interactions.user_index[kept], interactions.item_index[kept]
        enough = (np.bincount(users, minlength=1) >= min_user)[users]
        enough &= (np.bincount(items, minlength=1) >= min_item)[items]
        kept = kept[enough]
        if not iterate or enough.all():
            break
    if not len(kept):
        raise ValueError(
            f"no event is left with min_user={min_user} and min_item={min_item} "
            f"({len(interactions)} events before). Lower them."
        )
    user_numbers, user_index = np.unique(interactions.user_index[kept], return_inverse=True)
    item_numbers, item_index = np.unique(interactions.item_index[kept], return_inverse=True)
    times = interactions.timestamps
    return replace(
        interactions,
        user_index=user_index.astype(np.int32),
        item_index=(item_index + 1).astype(np.int32),
        timestamps=None if times is None else times[kept],
        users=interactions.users.select(user_numbers),
        items=interactions.items.select(item_numbers),
    )


def leave_one_out(interactions: Interactions) -> Split:
    """Holds out the last two events of every user with at least three.

    Test asks for the last item given all before it, the validation item included. Validation
    asks for the one before, given all before that. Training sees neither. Users with fewer than
    three events stay whole in training only.
    """
    whole = dataset_of(interactions)
    lengths = whole.lengths
    evaluated = np.flatnonzero(lengths >= 3)
    held_out = np.where(lengths >= 3, 2, 0)
    return _split(
        whole,
        train_lengths=lengths - held_out,
        valid=(evaluated, lengths[evaluated] - 2),
        test=(evaluated, lengths[evaluated] - 1),
    )


def time_split(interactions: Interactions, *, valid_from: int, test_from: int) -> Split:
    """Splits at two moments, the same for all users, so that training never sees the future.

    Training has the events before `valid_from`. Validation asks for a user's first event in
    [valid_from, test_from), test for the first from `test_from` on, each given everything
    before it; users without events before it are not asked.

    Args:
      interactions: events with timestamps.
      valid_from: seconds since 1970.
      test_from: seconds since 1970, later than `valid_from`. See `time_cutoffs`.

    Raises:
      ValueError: no timestamps, or moments that leave a part empty.
    """
    times = _timestamps(interactions)
    if not valid_from < test_from:
        raise ValueError(f"valid_from={valid_from} must be before test_from={test_from}.")
    whole = dataset_of(interactions)
    num_users = interactions.num_users
    before_valid, before_test = (
        np.bincount(interactions.user_index[times < moment], minlength=num_users)
        for moment in (valid_from, test_from)
    )
    valid_users = np.flatnonzero((before_valid > 0) & (before_test > before_valid))
    test_users = np.flatnonzero((before_test > 0) & (whole.lengths > before_test))
    parts = {
        "train (before valid_from)": before_valid.sum(),
        "valid (users with events before and after valid_from)": len(valid_users),
        "test (users with events before and after test_from)": len(test_users),
    }
    for part, size in parts.items():
        if not size:
            raise ValueError(
                f"{part} is empty with valid_from={valid_from}, test_from={test_from}; events "
                f"run from {times.min()} to {times.max()}. Move the moments inside."
            )
    return _split(
        whole,
        train_lengths=before_valid,
        valid=(valid_users, before_valid[valid_users]),
        test=(test_users, before_test[test_users]),
    )


def time_cutoffs(
    interactions: Interactions, *, train: float = 0.8, valid: float = 0.1
) -> tuple[int, int]:
    """The moments before which the shares `train` and `train + valid` of all events lie.

    Returns:
      `(valid_from, test_from)` for `time_split`, in seconds since 1970.
    """
    if min(train, valid) <= 0 or train + valid >= 1:
        raise ValueError(f"train={train} and valid={valid} must be positive and sum below 1.")
    valid_from, test_from = np.quantile(
        _timestamps(interactions), [train, train + valid], method="higher"
    )
    return int(valid_from), int(test_from)


def _timestamps(interactions: Interactions) -> np.ndarray:
    if interactions.timestamps is None:
        raise ValueError(
            f"{interactions.report.source} has no timestamps, which a split by time needs. "
            "Use leave_one_out."
        )
    return interactions.timestamps


def _split(
    whole: SequenceDataset,
    *,
    train_lengths: np.ndarray,
    valid: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> Split:
    asked = np.union1d(valid[0], test[0])
    report = SplitReport(
        num_users=len(whole),
        valid_users=len(valid[0]),
        test_users=len(test[0]),
        train_only_users=len(whole) - len(asked),
        single_event_users=int((whole.lengths == 1).sum()),
    )
    train = whole.take(np.arange(len(whole)), train_lengths)
    return Split(train, _eval_set(whole, *valid), _eval_set(whole, *test), report)


def _eval_set(whole: SequenceDataset, rows: np.ndarray, lengths: np.ndarray) -> EvalSet:
    """Asks for the event behind the first `lengths[i]` of sequence `rows[i]`."""
    targets = whole.item_ids[whole.seq_offsets[rows] + lengths]
    return EvalSet(whole.take(rows, lengths), targets, rows.astype(np.int32))
