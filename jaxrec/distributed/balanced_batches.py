"""The pipeline stage that balances: batches of all ranks in, evenly loaded ones out."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
    """A batch on its way: lengths are being gathered, then samples moved."""

    samples: list[Samples]
    state: dict[str, Any]
    lengths: Finish[np.ndarray]
    planned: "Future[tuple[np.ndarray, Plan]] | None" = None
    moved: Finish[list[Samples]] | None = None
    quality: Quality | None = field(default=None)


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
    order of their steps; do not prefetch it then, its own stages are the prefetching.

    Args:
      sources: one for each local rank of the transport, all with the same number of batches.
      transport: `InProcess` or `OverMesh`.
      config: how.

    Raises:
      ValueError: as many sources as local ranks are expected.

    Returns batches with the local ranks in front: item_ids i32[R, T] and so on.
    """

    def __init__(self, sources: Sequence[BatchSource], transport: Transport, config: BalanceConfig):
        if len(sources) != len(transport.local_ranks):
            raise ValueError(
                f"{len(sources)} sources for the local ranks {transport.local_ranks}; expected one "
                "for each"
            )
        self._sources, self._transport, self._config = list(sources), transport, config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxrec-balance")
        self._room: tuple[int, int, int] | None = None
        self._start_from(self._places(), cut_tokens=0)

    def __iter__(self) -> Iterator[JaggedBatch]:
        return self

    def __next__(self) -> JaggedBatch:
        while len(self._stages) < 3 and not self._exhausted:
            self._read()
            self._advance()
        if not self._stages:
            raise StopIteration
        self._advance(everything=self._exhausted)
        stage = self._stages.popleft()
        assert stage.moved is not None
        assert self._room is not None
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
        wanted = {"sources", "held", "cut_tokens", "flushed"}
        if set(state) != wanted or len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"the state of {len(self._sources)} balanced sources was expected, with "
                f"{', '.join(sorted(wanted))}"
            )
        for source, place in zip(self._sources, state["sources"], strict=True):
            source.set_state(place)
        self._start_from(state, state["cut_tokens"])

    def close(self) -> None:
        """Drops what is on its way and frees the sources; it may be used again afterwards."""
        self.set_state(self._state)
        for source in self._sources:
            source.close()

    # Stages.

    def _places(self) -> dict[str, Any]:
        sources = [source.get_state() for source in self._sources]
        held = [[] for _ in self._sources]
        return {"sources": sources, "held": held, "cut_tokens": 0, "flushed": False}

    def _start_from(self, state: dict[str, Any], cut_tokens: int) -> None:
        self._state, self._quality = state, None
        self._stages: deque[_Stage] = deque()
        self._held = [join([_from_lists(tokens) for tokens in rank]) for rank in state["held"]]
        self._cut_tokens, self._exhausted = cut_tokens, state["flushed"]

    def _read(self) -> None:
        """Takes the next batch of every source, or what is held back behind the last."""
        samples, at_end = [], False
        try:
            batches = [next(source) for source in self._sources]
        except StopIteration:
            batches, at_end, self._exhausted = [], True, True
        if batches and self._room is None:
            self._room = self._make_room(batches[0])
        if at_end and self._config.outliers != "defer":
            return
        samples = (
            [self._cut(unpack(batch)) for batch in batches]
            if batches
            else [join([]) for _ in self._sources]
        )
        if self._config.outlier_tokens is not None and self._config.outliers == "defer":
            samples = self._hold_back(samples, at_end=at_end)
            if samples is None:
                return
        elif at_end:
            return
        self._push(samples, flushed=at_end)

    def _make_room(self, batch: JaggedBatch) -> tuple[int, int, int]:
        config, sequences = self._config, len(batch.seq_offsets) - 1
        tokens = config.token_budget or len(batch.item_ids)
        wanted = config.max_sequences or sequences
        # Targets are one for each token, or one for each sequence; see jaxrec.data.make_batch.
        per_sequence = len(batch.target_ids) == sequences
        return tokens, wanted, wanted if per_sequence else tokens

    def _cut(self, samples: Samples) -> Samples:
        config = self._config
        if config.outlier_tokens is None or config.outliers == "defer":
            return samples
        pieces = treat_outliers(samples.lengths, config.outlier_tokens, config.outliers)
        self._cut_tokens += pieces.cut_tokens
        return samples.cut(pieces)

    def _hold_back(self, samples: list[Samples], *, at_end: bool) -> list[Samples] | None:
        """Swaps outliers into the hold, or all of them out; the decision is that of all ranks."""
        limit = self._config.outlier_tokens
        assert limit is not None
        long = [own.lengths > limit for own in samples]
        waiting = [
            join([held, own.take(np.flatnonzero(is_long))])
            for held, own, is_long in zip(self._held, samples, long, strict=True)
        ]
        counts = np.array([[len(own.lengths), at_end] for own in waiting], np.int64)
        everyone = self._transport.gather(counts)()
        total = int(everyone[:, 0].sum())
        if at_end and not total:
            return None
        short = [
            own.take(np.flatnonzero(~is_long)) for own, is_long in zip(samples, long, strict=True)
        ]
        if total < self._transport.num_ranks and not at_end:
            self._held = waiting
            return short
        self._held = [join([]) for _ in self._sources]
        return [join([own, late]) for own, late in zip(short, waiting, strict=True)]

    def _push(self, samples: list[Samples], *, flushed: bool) -> None:
        """Sends a batch on its way, by starting to gather its lengths."""
        assert self._room is not None
        # A fixed width: what one rank may hold of a batch, whatever the others do.
        width = self._room[0]
        lengths = np.zeros((len(samples), width), np.int64)
        for row, own in zip(lengths, samples, strict=True):
            row[: len(own.lengths)] = own.lengths
        state = {
            "sources": [source.get_state() for source in self._sources],
            "held": [_to_lists(own) for own in self._held],
            "cut_tokens": self._cut_tokens,
            "flushed": flushed,
        }
        self._stages.append(_Stage(samples, state, self._transport.gather(lengths)))

    def _advance(self, *, everything: bool = False) -> None:
        """Moves the samples of all but the newest batch, in order, and plans that on the thread."""
        for number, stage in enumerate(self._stages):
            if stage.planned is None:
                stage.planned = self._thread.submit(self._plan, stage.lengths)
            newest = number == len(self._stages) - 1
            if stage.moved is None and (everything or not newest):
                lengths, found = stage.planned.result()
                stage.quality = found.quality
                stage.moved = self._transport.move(stage.samples, lengths, found)
                stage.samples = []

    def _plan(self, gathered: Finish[np.ndarray]) -> tuple[np.ndarray, Plan]:
        lengths, config = gathered(), self._config
        assert self._room is not None
        flat = lengths[lengths > 0]
        sources = np.repeat(np.arange(len(lengths)), (lengths > 0).sum(axis=1))
        found = plan(
            flat,
            self._transport.num_ranks,
            strategy=config.strategy,
            cost=config.cost,
            samples_per_rank=self._room[1],
            token_budget=self._room[0],
            order=config.order,
            sources=sources,
        )
        return lengths, found


def _to_lists(samples: Samples) -> list[list[list[int]]]:
    return (
        [rows.tolist() for rows in np.split(samples.tokens, samples.starts[1:])]
        if len(samples.lengths)
        else []
    )


def _from_lists(tokens: list[list[int]]) -> Samples:
    return Samples(np.array([len(tokens)], np.int64), np.array(tokens, np.int32))
