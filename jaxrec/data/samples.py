"""Training samples and queries as views of sequences, packed into jagged batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxrec.data.dataset import SequenceDataset, concatenated_ranges, offsets_of
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.typing import PADDING_ID

type SampleMode = Literal["sequences", "windows", "prefixes"]


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Numbers the training samples of a dataset without copying a token.

    In mode "sequences" every sequence with at least two events is one sample: its inputs are the
    last `max_len` events before the last, and every input has a target, the event behind it. Mode
    "windows" leaves nothing of longer sequences out: from the end, they are cut into as many such
    samples as it takes. In mode "prefixes" every event but a sequence's first is a sample: it is
    the only target, the `max_len` events before it are input. Samples are numbered in the order of
    their last token.

    Memory: 8 bytes a sequence.
    """

    dataset: SequenceDataset
    mode: SampleMode
    max_len: int

    def __post_init__(self):
        if self.mode not in ("sequences", "windows", "prefixes"):
            raise ValueError(
                f"mode is {self.mode!r}; expected 'sequences', 'windows' or 'prefixes'."
            )
        if self.max_len < 1:
            raise ValueError(f"max_len is {self.max_len}; expected at least 1.")

    @cached_property
    def _offsets(self) -> np.ndarray:
        per_sequence = np.maximum(self.dataset.lengths - 1, 0)
        if self.mode == "sequences":
            per_sequence = np.minimum(per_sequence, 1)
        elif self.mode == "windows":
            per_sequence = -(-per_sequence // self.max_len)
        return offsets_of(per_sequence)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def spans(
        self, sample_ids: Int[np.ndarray, "S"]
    ) -> tuple[Int64[np.ndarray, "S"], Int64[np.ndarray, "S"]]:
        """Where the inputs of samples lie in `dataset.item_ids`: starts, and ends (exclusive).

        The token at `end` is the last target.
        """
        offsets = self._offsets
        rows = np.searchsorted(offsets, sample_ids, side="right") - 1
        starts = self.dataset.seq_offsets[rows]
        if self.mode == "prefixes":
            ends = starts + (sample_ids - offsets[rows]) + 1
        else:
            later = offsets[rows + 1] - 1 - sample_ids  # windows of the same sequence
            ends = self.dataset.seq_offsets[rows + 1] - 1 - later * self.max_len
        return np.maximum(starts, ends - self.max_len), ends


def make_batch(
    samples: SampleIndex,
    sample_ids: Sequence[int] | Int[np.ndarray, "S"],
    *,
    token_budget: int,
    max_sequences: int,
) -> JaggedBatch:
    """Packs training samples, in the order given, into one batch of static shape.

    Args:
      samples: the numbered samples.
      sample_ids: numbers in [0, len(samples)).
      token_budget: T, the token slots of the batch.
      max_sequences: B, the sequences of the batch.

    Returns:
      a batch of NumPy arrays. M is `max_sequences` in mode "prefixes" (target b belongs to sequence
      b), otherwise `token_budget` (targets follow the tokens one to one).

    Raises:
      ValueError: a sample number out of range, more samples or tokens than fit.

    Cost: O(T); no Python loop over samples or tokens.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(samples)):
        bad = ids[(ids < 0) | (ids >= len(samples))][0]
        raise ValueError(f"sample {bad} does not exist; there are {len(samples)} samples.")
    starts, ends = samples.spans(ids)
    tokens, packed = _pack(
        samples.dataset, starts, ends, token_budget=token_budget, max_sequences=max_sequences
    )
    following = samples.dataset.item_ids
    if samples.mode != "prefixes":
        positions = np.arange(len(tokens), dtype=np.int32)
        return _with_targets(packed, positions, following[tokens + 1], slots=token_budget)
    last = np.asarray(packed.seq_offsets)[1 : len(ids) + 1] - 1
    return _with_targets(packed, last, following[ends], slots=max_sequences)


def bucket_sizes(token_budget: int, num_buckets: int) -> tuple[int, ...]:
    """`token_budget` and its halves, quarters …, rising; whole multiples of 8 below the budget."""
    sizes = {-(-(token_budget >> n) // 8) * 8 for n in range(1, num_buckets)}
    return (*sorted(size for size in sizes if 0 < size < token_budget), token_budget)


def cut_to_bucket(batch: JaggedBatch, sizes: Sequence[int]) -> JaggedBatch:
    """The batch with as many token slots as the first of `sizes` that holds all its tokens.

    As only unused slots go, it says the same. Targets that stand beside the tokens, one a slot, are
    cut likewise. A program is compiled for each size that occurs.

    Args:
      batch: of NumPy arrays, from `make_batch`.
      sizes: rising; the last is the batch's own.
    """
    slots, used = len(batch.item_ids), int(batch.seq_offsets[-1])
    size = next(size for size in (*sizes, slots) if size >= used)
    if size >= slots:
        return batch
    if len(batch.target_ids) == slots:
        batch = batch._replace(
            target_positions=batch.target_positions[:size], target_ids=batch.target_ids[:size]
        )
    return batch._replace(item_ids=batch.item_ids[:size], timestamps=batch.timestamps[:size])


def make_query_batch(
    histories: SequenceDataset,
    rows: Sequence[int] | Int[np.ndarray, "S"],
    *,
    max_len: int,
    token_budget: int,
    max_sequences: int,
    targets: Int32[np.ndarray, "U"] | None = None,
) -> JaggedBatch:
    """Packs whole histories to be asked for their next item: position b is b's last token.

    Args:
      histories: sequences that end where the question is asked.
      rows: which of them.
      max_len: the most events of a history; earlier ones are cut.
      token_budget: T, the token slots of the batch.
      max_sequences: B and M of the batch.
      targets: the item that followed each history (all of them, not only `rows`), where known;
        otherwise `target_ids` holds padding and `seq_offsets` tells which questions are real.

    Raises:
      ValueError: an empty history (named by its row), a row out of range, more than fits.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(histories)):
        bad = chosen[(chosen < 0) | (chosen >= len(histories))][0]
        raise ValueError(f"row {bad} does not exist; there are {len(histories)} histories.")
    starts, ends = histories.seq_offsets[chosen], histories.seq_offsets[chosen + 1]
    if (starts == ends).any():
        raise ValueError(
            f"the history in row {chosen[starts == ends][0]} is empty: there is no token to ask "
            "at. Leave the row out, or answer it with popular items."
        )
    _, packed = _pack(
        histories,
        np.maximum(starts, ends - max_len),
        ends,
        token_budget=token_budget,
        max_sequences=max_sequences,
    )
    last = np.asarray(packed.seq_offsets)[1 : len(chosen) + 1] - 1
    ids = np.full(len(chosen), PADDING_ID, np.int32) if targets is None else targets[chosen]
    return _with_targets(packed, last, ids, slots=max_sequences)


def _pack(
    dataset: SequenceDataset,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    token_budget: int,
    max_sequences: int,
) -> tuple[np.ndarray, JaggedBatch]:
    """Copies spans one after the other; returns the token numbers and a batch without targets."""
    lengths = ends - starts
    total = int(lengths.sum())
    if len(starts) > max_sequences:
        raise ValueError(f"{len(starts)} sequences do not fit in max_sequences={max_sequences}.")
    if total > token_budget:
        raise ValueError(f"{total} tokens do not fit in token_budget={token_budget}.")
    tokens = concatenated_ranges(starts, lengths)
    item_ids = np.full(token_budget, PADDING_ID, dtype=np.int32)
    timestamps = np.zeros(token_budget, dtype=np.int32)
    item_ids[:total] = dataset.item_ids[tokens]
    timestamps[:total] = dataset.timestamps[tokens]
    seq_offsets = np.full(max_sequences + 1, total, dtype=np.int32)
    seq_offsets[: len(starts) + 1] = offsets_of(lengths)
    nothing = np.zeros(0, dtype=np.int32)
    return tokens, JaggedBatch(item_ids, seq_offsets, nothing, nothing, timestamps)


def _with_targets(
    batch: JaggedBatch, positions: np.ndarray, ids: np.ndarray, *, slots: int
) -> JaggedBatch:
    target_positions = np.zeros(slots, dtype=np.int32)
    target_ids = np.full(slots, PADDING_ID, dtype=np.int32)
    target_positions[: len(positions)] = positions
    target_ids[: len(ids)] = ids
    return batch._replace(target_positions=target_positions, target_ids=target_ids)
