"""Samples on their own on the host: out of one jagged batch, and into another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxrec.distributed.balance import Pieces
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.typing import PADDING_ID

COLUMNS = 3
"""Of a token: item id, timestamp, and the target asked at it (padding where there is none)."""


class Samples(NamedTuple):
    """N sequences with all that belongs to them, one after the other.

    Attributes:
      lengths: tokens of each; i64[N], above 0.
      tokens: item id, timestamp and target of each token; i32[T, 3].
    """

    lengths: Int64[np.ndarray, "N"]
    tokens: Int32[np.ndarray, "T C"]

    @property
    def starts(self) -> Int64[np.ndarray, "N"]:
        """Number of each sample's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, chosen: Int[np.ndarray, "K"]) -> "Samples":
        """Some of them, in the order given."""
        lengths = self.lengths[chosen]
        return Samples(lengths, self.tokens[_ranges(self.starts[chosen], lengths)])

    def cut(self, pieces: Pieces) -> "Samples":
        """The pieces of them that an outlier policy has made."""
        starts = self.starts[pieces.samples] + pieces.starts
        return Samples(pieces.lengths, self.tokens[_ranges(starts, pieces.lengths)])


def join(parts: Sequence[Samples]) -> Samples:
    """All samples of all parts."""
    none = Samples(np.zeros(0, np.int64), np.zeros((0, COLUMNS), np.int32))
    parts = [none, *parts]
    return Samples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def unpack(batch: JaggedBatch) -> Samples:
    """The samples of a batch on the host. Sequences without tokens are taken for unused slots.

    Raises:
      ValueError: two targets at one token, or one at a token of no sequence.
    """
    offsets = np.asarray(batch.seq_offsets).astype(np.int64)
    lengths, used = np.diff(offsets), int(offsets[-1])
    tokens = np.zeros((used, COLUMNS), np.int32)
    tokens[:, 0] = np.asarray(batch.item_ids)[:used]
    tokens[:, 1] = np.asarray(batch.timestamps)[:used]
    ids, positions = np.asarray(batch.target_ids), np.asarray(batch.target_positions)
    real = ids != PADDING_ID
    if len(np.unique(positions[real])) < real.sum() or (positions[real] >= used).any():
        raise ValueError(
            "a batch has two targets at one token, or one outside its sequences: such samples "
            "cannot be exchanged"
        )
    tokens[positions[real], 2] = ids[real]
    return Samples(lengths[lengths > 0], tokens)


def pack(
    samples: Samples, *, token_budget: int, max_sequences: int, max_targets: int
) -> JaggedBatch:
    """A batch of static shape that holds the samples in their order.

    Raises:
      ValueError: more tokens, sequences or targets than it has room for.
    """
    used, targets = len(samples.tokens), np.flatnonzero(samples.tokens[:, 2] != PADDING_ID)
    for what, count, room in (
        ("tokens", used, token_budget),
        ("samples", len(samples.lengths), max_sequences),
        ("targets", len(targets), max_targets),
    ):
        if count > room:
            raise ValueError(f"{count} {what} do not fit a batch with room for {room}")
    item_ids = np.full(token_budget, PADDING_ID, np.int32)
    timestamps = np.zeros(token_budget, np.int32)
    item_ids[:used], timestamps[:used] = samples.tokens[:, 0], samples.tokens[:, 1]
    seq_offsets = np.full(max_sequences + 1, used, np.int32)
    seq_offsets[0] = 0
    seq_offsets[1 : len(samples.lengths) + 1] = np.cumsum(samples.lengths)
    target_positions = np.zeros(max_targets, np.int32)
    target_ids = np.full(max_targets, PADDING_ID, np.int32)
    target_positions[: len(targets)] = targets
    target_ids[: len(targets)] = samples.tokens[targets, 2]
    return JaggedBatch(item_ids, seq_offsets, target_positions, target_ids, timestamps)


def stack(batches: Sequence[JaggedBatch]) -> JaggedBatch:
    """Batches of one shape as one, with the rank in front of every array."""
    return JaggedBatch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0] … starts[0] + lengths[0] - 1, then the same of the next, in one array."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
