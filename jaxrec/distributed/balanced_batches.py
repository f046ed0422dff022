"""The pipeline stage that balances: batches of all ranks in, evenly loaded ones out."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxrec.distributed.balance import (
    HSTU_H100,
    CostModel,
    Order,
    OutlierPolicy,
    Plan,
    Quality,
    Strategy,
    plan,
    treat_outliers,
)
from jaxrec.distributed.sample_buffer import Samples, join, pack, stack, unpack
from jaxrec.distributed.transport import Finish, Transport
from jaxrec.ops.jagged import JaggedBatch


@runtime_checkable
class BatchSource(Protocol):
    """Batches of one rank with a place to resume at, as `jaxrec.data.training_batches` gives."""

    def __next__(self) -> JaggedBatch:
        """The next batch; of one shape for all batches and ranks."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


@dataclass(frozen=True)
class BalanceConfig:
    """How batches are balanced.

    Attributes:
      strategy, cost, order: see `balance.plan`.
      token_budget: token slots of a balanced batch; None keeps the source's.
      max_sequences: sequences of a balanced batch; None keeps the source's. Ranks with long
        samples get few and others more, so leave some room above the source's.
      outlier_tokens: samples longer than this are outliers; None has none.
      outliers: what becomes of them; see `balance.treat_outliers`. Deferred ones come back all
        together with the first batch for which there is one for each rank, or behind the last.
    """

    strategy: Strategy = "lpt"
    cost: CostModel = HSTU_H100
    order: Order = "longest_first"
    token_budget: int | None = None
    max_sequences: int | None = None
    outlier_tokens: int | None = None
    outliers: OutlierPolicy = "defer"


class BalanceStats(NamedTuple):
    """What was done for the last batch.

    Attributes:
      quality: of its plan; None before the first.
      cut_tokens: lost to the policy "cap" on this process's ranks, since the start.
      held: outliers that are held back on this process's ranks now.
    """

    quality: Quality | None
    cut_tokens: int
    held: int


@dataclass
class _Stage:
    """A batch on its way: its lengths are gathered, then it is planned, then samples move.

    A row of the gathered lengths begins with whether that rank's source has ended.
    """

    samples: list[Samples]
    state: dict[str, Any]
    rows: Finish[np.ndarray]
    planned: "Future[_Planned] | None" = None
    moved: Finish[list[Samples]] | None = None
    quality: Quality | None = None
    last: bool = False


class _Planned(NamedTuple):
    lengths: np.ndarray
    plan: Plan
    last: bool


class BalancedBatches:
    """Balances the batches of all ranks, two batches ahead of the one returned.

    Every rank reads its own samples. The lengths of batch n + 2 are gathered, batch n + 1 is
    planned (on a thread) and its samples set moving, and batch n is returned, all while the step
    before runs. Every sample of the sources is in exactly one balanced batch, but for tokens that
    the outlier policy cuts (and counts). Which samples are trained on together changes only where
    outliers are deferred; the loss over all ranks, weighted by `global_mean`, does not change.

        stage = BalancedBatches(sources, InProcess(8), BalanceConfig(max_sequences=64))
        batches = PrefetchIterator(stage, depth=1)      # in one process: all of it on a thread

    With `OverMesh` collectives are started by `next`, so that all processes start them in the
    order of their steps; do not prefetch it then, its own stages are the prefetching. (To defer
    outliers it also waits for a gather of their numbers.)

    Args:
      sources: one for each local rank of the transport. One that ends before the others gives
        no more samples; the stage ends when all have ended and nothing is held back.
      transport: `InProcess` or `OverMesh`.
      config: how.

    Iterating gives batches with the local ranks in front: item_ids i32[R, T] and so on.

    Raises:
      ValueError: not one source for each local rank; later, where samples or tokens do not fit
        the balanced batches (see `balance.assign`).
    """

    def __init__(self, sources: Sequence[BatchSource], transport: Transport, config: BalanceConfig):
        if len(sources) != len(transport.local_ranks):
            raise ValueError(
                f"{len(sources)} sources for the local ranks {transport.local_ranks}; expected one "
                "for each"
            )
        self._sources, self._transport, self._config = list(sources), transport, config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxrec-balance")
        self._shape: list[int] | None = None  # T, B and M of the sources, from the first batch
        places = [source.get_state() for source in self._sources]
        held = [[] for _ in places]
        self._start_from({"sources": places, "held": held, "cut_tokens": 0, "shape": None})

    def __iter__(self) -> Iterator[JaggedBatch]:
        return self

    def __next__(self) -> JaggedBatch:
        while len(self._stages) < 3 and not self._finished:
            self._push(*self._read())
            self._advance()
        stage = self._stages[0]
        if stage.last or self._finished:
            self._finished = True
            raise StopIteration
        self._stages.popleft()
        assert stage.moved is not None
        tokens, sequences, targets = self._room
        batches = [
            pack(own, token_budget=tokens, max_sequences=sequences, max_targets=targets)
            for own in stage.moved()
        ]
        self._state, self._quality = stage.state, stage.quality
        return stack(batches)

    @property
    def stats(self) -> BalanceStats:
        """Figures of the last batch returned."""
        held = sum(len(rank) for rank in self._state["held"])
        return BalanceStats(self._quality, self._state["cut_tokens"], held)

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch returned, ready for JSON; outliers held are in it."""
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place; what was on its way is dropped.

        Raises:
          ValueError: the state is of another number of ranks, or of another stage.
        """
        wanted = {"sources", "held", "cut_tokens", "shape"}
        if set(state) != wanted or len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"the state of {len(self._sources)} balanced sources was expected, with "
                f"{', '.join(sorted(wanted))}"
            )
        for source, place in zip(self._sources, state["sources"], strict=True):
            source.set_state(place)
        self._start_from(state)

    def close(self) -> None:
        """Drops what is on its way and frees the sources; it may be used again afterwards."""
        self.set_state(self._state)
        for source in self._sources:
            source.close()

    # Stages.

    def _start_from(self, state: dict[str, Any]) -> None:
        self._state, self._quality = state, None
        self._stages: deque[_Stage] = deque()
        self._held = [join([_from_lists(tokens) for tokens in rank]) for rank in state["held"]]
        self._cut_tokens, self._finished = state["cut_tokens"], False
        self._set_shape(state["shape"])

    def _read(self) -> tuple[list[Samples], list[bool]]:
        """The next samples of every source, none of those that have ended; outliers treated."""
        samples, ended = [], []
        for source in self._sources:
            batch = next(source, None)
            ended.append(batch is None)
            if batch is not None and self._shape is None:
                ids, offsets, targets = batch.item_ids, batch.seq_offsets, batch.target_ids
                self._set_shape([len(ids), len(offsets) - 1, len(targets)])
            samples.append(join([]) if batch is None else self._cut(unpack(batch)))
        if self._shape is None:
            raise ValueError("no source has a batch, so the shape of batches is not known")
        if self._defers:
            samples = self._hold_back(samples, ended)
        return samples, ended

    @property
    def _defers(self) -> bool:
        return self._config.outlier_tokens is not None and self._config.outliers == "defer"

    def _set_shape(self, shape: list[int] | None) -> None:
        """Takes over the shape of the sources' batches, and what follows from it."""
        self._shape = shape
        if shape is None:
            return
        config, (tokens, sequences, targets) = self._config, shape
        room = config.token_budget or tokens, config.max_sequences or sequences
        # Targets are one for each sequence, or one for each token; see jaxrec.data.make_batch.
        self._room = (*room, room[1] if targets == sequences else room[0])
        self._width = 1 + sequences + (self._transport.num_ranks if self._defers else 0)
        if config.outlier_tokens is not None and config.outliers == "split":
            if targets == sequences != tokens:
                raise ValueError(
                    "outliers are to be split, but samples have one target each, at their end: the "
                    "other pieces would teach nothing; use 'cap' or 'defer'"
                )
            self._width += tokens // config.outlier_tokens

    def _cut(self, samples: Samples) -> Samples:
        config = self._config
        if config.outlier_tokens is None or config.outliers == "defer":
            return samples
        pieces = treat_outliers(samples.lengths, config.outlier_tokens, config.outliers)
        self._cut_tokens += pieces.cut_tokens
        return samples.cut(pieces)

    def _hold_back(self, samples: list[Samples], ended: list[bool]) -> list[Samples]:
        """Takes outliers into the hold, or lets all of them out; all ranks decide alike."""
        limit = self._config.outlier_tokens
        assert limit is not None
        short, waiting = [], []
        for held, own in zip(self._held, samples, strict=True):
            is_long = own.lengths > limit
            short.append(own.take(np.flatnonzero(~is_long)))
            waiting.append(join([held, own.take(np.flatnonzero(is_long))]))
        rows = [[len(own.lengths), end] for own, end in zip(waiting, ended, strict=True)]
        counts = self._transport.gather(np.array(rows, np.int64))()
        if counts[:, 0].sum() < self._transport.num_ranks and not counts[:, 1].all():
            self._held = waiting
            return short
        self._held = [join([]) for _ in self._sources]
        return [join([own, late]) for own, late in zip(short, waiting, strict=True)]

    def _push(self, samples: list[Samples], ended: list[bool]) -> None:
        """Sends a batch on its way, by starting to gather its lengths."""
        rows = np.zeros((len(samples), self._width), np.int64)
        for row, own, end in zip(rows, samples, ended, strict=True):
            row[0] = end
            row[1 : len(own.lengths) + 1] = own.lengths
        state = {
            "sources": [source.get_state() for source in self._sources],
            "held": [_to_lists(own) for own in self._held],
            "cut_tokens": self._cut_tokens,
            "shape": self._shape,
        }
        self._stages.append(_Stage(samples, state, self._transport.gather(rows)))

    def _advance(self) -> None:
        """Has the newest batch planned on the thread; starts to move the others' samples."""
        for number, stage in enumerate(self._stages):
            if stage.planned is None:
                stage.planned = self._thread.submit(self._plan, stage.rows)
            if stage.moved is None and number < len(self._stages) - 1:
                planned = stage.planned.result()
                stage.quality, stage.last = planned.plan.quality, planned.last
                stage.moved = self._transport.move(stage.samples, planned.lengths, planned.plan)
                stage.samples = []

    def _plan(self, rows: Finish[np.ndarray]) -> _Planned:
        gathered, config = rows(), self._config
        lengths = gathered[:, 1:]
        sources = np.repeat(np.arange(len(lengths)), (lengths > 0).sum(axis=1))
        found = plan(
            lengths[lengths > 0],
            self._transport.num_ranks,
            strategy=config.strategy,
            cost=config.cost,
            samples_per_rank=self._room[1],
            token_budget=self._room[0],
            order=config.order,
            sources=sources,
        )
        return _Planned(lengths, found, bool(gathered[:, 0].all() and not lengths.any()))


def _to_lists(samples: Samples) -> list[list[list[int]]]:
    return (
        [rows.tolist() for rows in np.split(samples.tokens, samples.starts[1:])]
        if len(samples.lengths)
        else []
    )


def _from_lists(tokens: list[list[int]]) -> Samples:
    return Samples(np.array([len(tokens)], np.int64), np.array(tokens, np.int32))
