"""Batches for training (shuffled, packed, resumable at any batch) and for evaluation (in order).

The iterator is the library's own, whatever else is installed: its batches are a function of the
dataset, the settings, the seed and a place; its state is three numbers and the settings.
`TrainingBatches.to_grain` offers the same batches as a `grain.IterDataset`, for mixing, mapping
and Grain's checkpoint handlers; states are the same on both sides.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from jaxrec.data.dataset import EvalSet, SequenceDataset
from jaxrec.data.prefetch import PrefetchIterator, ResumableIterator
from jaxrec.data.samples import SampleIndex, SampleMode, make_batch, make_query_batch
from jaxrec.ops.jagged import JaggedBatch

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class BatchSettings:
    """What decides which samples stand in which batch; part of every stored state."""

    mode: SampleMode
    max_len: int
    token_budget: int
    max_sequences: int
    seed: int
    shuffle: bool
    num_epochs: int | None

    def __post_init__(self):
        for name in ("max_len", "token_budget", "max_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.token_budget < self.max_len:
            raise ValueError(
                f"token_budget={self.token_budget} is below max_len={self.max_len}: the longest "
                "sample would fit in no batch. Raise the budget or cut samples shorter."
            )
        if self.num_epochs is not None and self.num_epochs < 1:
            raise ValueError(f"num_epochs is {self.num_epochs}; expected None or at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected a number from 0.")


@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """All training batches of a dataset; iterate it, as often as wanted, from the start.

    Every sample stands in exactly one batch of an epoch, so an epoch's last batch may be
    partly empty. `training_batches` describes the rest.
    """

    samples: SampleIndex
    settings: BatchSettings
    prefetch: int = 0

    def __post_init__(self):
        if not len(self.samples):
            raise ValueError(
                "the dataset has no training sample: no sequence has two events or more."
            )
        if self.prefetch < 0:
            raise ValueError(f"prefetch is {self.prefetch}; expected 0 or more batches.")

    def __iter__(self) -> ResumableIterator:
        batches = BatchIterator(self.samples, self.settings)
        return PrefetchIterator(batches, self.prefetch) if self.prefetch else batches

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self.samples)

    @cached_property
    def num_batches_per_epoch(self) -> int:
        """Batches of the first epoch; later ones differ a little where the token budget binds.

        Cost: packs an epoch without copying tokens, about 20 µs a batch; computed once.
        """
        iterator = BatchIterator(self.samples, self.settings)
        count = 0
        while iterator.epoch == 0:
            iterator.next_sample_ids()
            count += 1
        return count

    def to_grain(self) -> "grain.IterDataset[JaggedBatch]":
        """The same batches and states as a Grain dataset (needs grain)."""
        try:
            import grain
        except ImportError as error:
            raise ImportError("to_grain needs grain: install jaxrec[data].") from error
        batches = self

        class GrainIterator(grain.DatasetIterator[JaggedBatch]):
            def __init__(self):
                super().__init__()
                self._batches = iter(batches)

            def __next__(self) -> JaggedBatch:
                return next(self._batches)

            def get_state(self) -> dict[str, Any]:
                return self._batches.get_state()

            def set_state(self, state: dict[str, Any]) -> None:
                self._batches.set_state(state)

            def close(self) -> None:
                self._batches.close()
                super().close()

        class GrainDataset(grain.IterDataset[JaggedBatch]):
            def __iter__(self) -> GrainIterator:
                return GrainIterator()

        return GrainDataset()


class BatchIterator:
    """Packs the samples of one epoch's order after the other; see `training_batches`."""

    def __init__(self, samples: SampleIndex, settings: BatchSettings):
        self._samples = samples
        self._settings = settings
        self._order: tuple[int, np.ndarray] | None = None
        self.epoch = 0
        self.position = 0
        self.batches = 0

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> JaggedBatch:
        settings = self._settings
        return make_batch(
            self._samples,
            self.next_sample_ids(),
            token_budget=settings.token_budget,
            max_sequences=settings.max_sequences,
        )

    def next_sample_ids(self) -> np.ndarray:
        """Moves on by one batch; returns its samples without copying their tokens."""
        settings = self._settings
        if settings.num_epochs is not None and self.epoch >= settings.num_epochs:
            raise StopIteration
        order = self._epoch_order()
        ids = order[self.position : self.position + settings.max_sequences]
        starts, ends = self._samples.spans(ids)
        tokens = np.cumsum(ends - starts)
        ids = ids[: np.searchsorted(tokens, settings.token_budget, side="right")]
        self.position += len(ids)
        self.batches += 1
        if self.position == len(order):
            self.epoch, self.position = self.epoch + 1, 0
        return ids

    def _epoch_order(self) -> np.ndarray:
        """The samples in this epoch's order: a function of (seed, epoch) alone."""
        if self._order is None or self._order[0] != self.epoch:
            order = np.arange(len(self._samples), dtype=np.int64)
            if self._settings.shuffle:
                np.random.default_rng([self._settings.seed, self.epoch]).shuffle(order)
            self._order = self.epoch, order
        return self._order[1]

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch returned, ready for JSON.

        Keys: epoch, position (samples of the epoch already used), batches (returned so far),
        and what must be equal to resume: num_samples, num_tokens and the settings.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "batches": self.batches,
            **self._identity(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues behind the batch after which `state` was taken.

        Raises:
          ValueError: the state lacks a key, or belongs to another dataset or other settings
            (named), which would give other batches.
        """
        identity = self._identity()
        missing = {"epoch", "position", "batches", *identity} - set(state)
        if missing:
            raise ValueError(f"the iterator state lacks {', '.join(sorted(missing))}.")
        for name, here in identity.items():
            if state[name] != here:
                raise ValueError(
                    f"the iterator state was taken with {name}={state[name]!r}, here it is "
                    f"{here!r}: the batches would differ. Restore the setting, or start afresh."
                )
        if (
            not 0 <= state["position"] < len(self._samples)
            or min(state["epoch"], state["batches"]) < 0
        ):
            raise ValueError(f"the iterator state is out of range: {state}.")
        self.epoch, self.position = state["epoch"], state["position"]
        self.batches = state["batches"]

    def _identity(self) -> dict[str, Any]:
        # How long training goes on changes no batch, so num_epochs may differ on resuming.
        settings = {k: v for k, v in asdict(self._settings).items() if k != "num_epochs"}
        dataset = self._samples.dataset
        return {
            "num_samples": len(self._samples),
            "num_tokens": len(dataset.item_ids),
            **settings,
        }

    def close(self) -> None:
        """Nothing is held; here so that every batch iterator can be closed."""


def training_batches(
    dataset: SequenceDataset,
    *,
    mode: SampleMode,
    max_len: int,
    token_budget: int,
    max_sequences: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    prefetch: int = 0,
) -> TrainingBatches:
    """Training batches of static shape: every epoch shuffled anew, packed greedily.

    Consecutive samples of the epoch's order go into a batch until the next would exceed
    `token_budget` or `max_sequences`. `iter(…)` gives an iterator with `get_state()` (small and
    JSON-able) and `set_state(state)`: from a stored state exactly the same batches follow, also
    with another `prefetch` and through `to_grain()`. The order comes from NumPy's default
    generator, so keep NumPy's version to resume a stored state.

    Args:
      dataset: training sequences; those with fewer than two events give no sample.
      mode: "sequences" (a sample a user, a target at every input), "windows" (as many as hold all
        of a user's events) or "prefixes" (a sample and a target for every event but the first);
        see `SampleIndex`.
      max_len: the most inputs of a sample; at most `token_budget`.
      token_budget: T of every batch.
      max_sequences: B of every batch.
      seed: decides the order together with the epoch's number.
      shuffle: False keeps the dataset's order.
      num_epochs: None never ends.
      prefetch: batches prepared ahead in a background thread; 0 for none.

    Raises:
      ValueError: no sample, or settings out of range.

    Memory: 8 bytes a sample, for the order of the current epoch.
    """
    settings = BatchSettings(
        mode=mode,
        max_len=max_len,
        token_budget=token_budget,
        max_sequences=max_sequences,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
    )
    return TrainingBatches(SampleIndex(dataset, mode, max_len), settings, prefetch)


def eval_batches(
    eval_set: EvalSet, *, max_len: int, batch_size: int, token_budget: int | None = None
) -> Iterator[tuple[JaggedBatch, Int32[np.ndarray, "B"]]]:
    """All questions in order, packed into batches of static shape.

    Args:
      eval_set: histories and targets.
      max_len: the most events of a history; earlier ones are cut.
      batch_size: B and M, the most questions of a batch.
      token_budget: T; None takes what `batch_size` histories can need at most.

    Yields:
      a batch, whose target b is the item that followed history b, and the row in `eval_set` of
      each of its sequences; i32[B], -1 for unused ones.

    Raises:
      ValueError: an empty history (named by its row), settings out of range.
    """
    lengths = np.minimum(eval_set.histories.lengths, max_len)
    longest = int(lengths.max(initial=1))
    budget = batch_size * longest if token_budget is None else token_budget
    if min(max_len, batch_size) < 1 or budget < longest:
        raise ValueError(
            f"max_len={max_len}, batch_size={batch_size} and token_budget={token_budget}: expected "
            f"at least 1, and a budget of at least {longest}, the longest history after cutting."
        )
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        used = int(ends[start] - lengths[start])
        stop = min(start + batch_size, int(np.searchsorted(ends, used + budget, side="right")))
        rows = np.full(batch_size, -1, dtype=np.int32)
        rows[: stop - start] = np.arange(start, stop)
        batch = make_query_batch(
            eval_set.histories,
            rows[: stop - start],
            max_len=max_len,
            token_budget=budget,
            max_sequences=batch_size,
            targets=eval_set.targets,
        )
        yield batch, rows
        start = stop
