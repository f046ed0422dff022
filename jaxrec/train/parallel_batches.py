"""The batches of a run on many devices: the same ones whatever the number of devices.

A run's *global batch* is the next S batches of its data, S being the number of sources: a setting
of the run. Of W devices each reads the part of S / W sources, balanced or not. So a run that goes
on with other devices or processes goes on with the same global batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Int64, UInt32

from jaxrec.data import PrefetchIterator, TrainingBatches
from jaxrec.data.pipeline import BatchIterator
from jaxrec.data.samples import make_batch
from jaxrec.distributed import BalanceConfig, BalancedBatches, InProcess, OverMesh
from jaxrec.distributed.sample_buffer import stack
from jaxrec.ops.jagged import JaggedBatch


class GlobalBatches:
    """The samples of global batches; every process reads all their numbers, not their tokens.

    Args:
      batches: of one source; those of all sources are batch after batch of it.
      num_sources: S.

    Cost: 20 µs a source and global batch, besides the tokens of the parts that are made.
    """

    def __init__(self, batches: TrainingBatches, num_sources: int):
        self.settings, self.num_sources = batches.settings, num_sources
        self._samples = batches.samples
        self._iterator = BatchIterator(batches.samples, batches.settings)
        self.start = self._iterator.get_state()
        self._last: tuple[dict[str, Any], list[Int64[np.ndarray, "_"]], dict[str, Any]] | None
        self._last = None

    def read(self, place: dict[str, Any]) -> tuple[list[Int64[np.ndarray, "_"]], dict[str, Any]]:
        """The samples of each source in the global batch at a place, and the place behind it.

        Raises:
          ValueError: the place is one of other data or settings.
        """
        if self._last is None or self._last[0] != place:
            self._iterator.set_state(place)
            parts = [self._iterator.next_sample_ids() for _ in range(self.num_sources)]
            self._last = place, parts, self._iterator.get_state()
        return self._last[1], self._last[2]

    def make(self, parts: Sequence[Int64[np.ndarray, "_"]]) -> JaggedBatch:
        """One batch of the samples of some sources."""
        settings = self.settings
        return make_batch(
            self._samples,
            np.concatenate(parts),
            token_budget=len(parts) * settings.token_budget,
            max_sequences=len(parts) * settings.max_sequences,
        )


class RankSource:
    """What one rank reads of the global batches: those of sources `first` to `first + count`."""

    def __init__(self, batches: GlobalBatches, first: int, count: int):
        self._batches, self._own = batches, slice(first, first + count)
        self._place = batches.start

    def __iter__(self) -> "RankSource":
        return self

    def __next__(self) -> JaggedBatch:
        parts, self._place = self._batches.read(self._place)
        return self._batches.make(parts[self._own])

    def get_state(self) -> dict[str, Any]:
        """The place of the whole run: the same for all ranks."""
        return self._place

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place."""
        self._batches.read(state)
        self._place = state

    def close(self) -> None:
        """Nothing is held."""


class _AsRead:
    """Batches of local ranks as they were read, with the ranks in front."""

    def __init__(self, sources: Sequence[RankSource]):
        self._sources = sources

    def __iter__(self) -> "_AsRead":
        return self

    def __next__(self) -> JaggedBatch:
        return stack([next(source) for source in self._sources])

    def get_state(self) -> dict[str, Any]:
        return {"sources": [source.get_state() for source in self._sources]}

    def set_state(self, state: dict[str, Any]) -> None:
        for source, place in zip(self._sources, state["sources"], strict=True):
            source.set_state(place)

    def close(self) -> None:
        pass


class RankBatch(NamedTuple):
    """A batch of every device, and the items it names.

    Attributes:
      rows: numbers of the items, rising, the first padding, V behind the last; i32[W, N].
      batch, negatives: name items by their place in `rows`; i32[W, S] negatives.
      log_q: of the items; f32[W, N].
      dropout_key: key data; u32[W, K].
    """

    rows: Int32[Array, "W N"]
    batch: JaggedBatch
    negatives: Int32[Array, "W S"]
    log_q: Float[Array, "W N"]
    dropout_key: UInt32[Array, "W K"]


class PreparedBatch(NamedTuple):
    """What a step needs of its batch.

    Attributes:
      ids: items whose rows are looked up; i32[W, N], padding where there is none.
      ranks: the batch.
      learning_rate: of the step; f32.
    """

    ids: Int32[Array, "W N"]
    ranks: RankBatch
    learning_rate: Float[Array, ""]


class StepInput(NamedTuple):
    """What a step is given: its batch, and the one that follows if the step is to know it."""

    batch: PreparedBatch
    following: PreparedBatch | None

    @property
    def item_ids(self) -> Int32[Array | np.ndarray, "W T"]:
        """Token slots of all devices."""
        return self.batch.ranks.batch.item_ids


class ParallelBatches:
    """Batches of all devices, numbered by step, with one place for the whole run.

    Args:
      batches: global batches.
      mesh, axis: devices; they divide the number of sources.
      balance: how samples are exchanged between devices; None leaves them where they were read.
      prepare: done to each batch, arrays over the mesh with the ranks in front, and its step.
      with_following: whether a step is given the batch behind its own.

    Raises:
      ValueError: outliers are to be deferred in a run of several processes.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        mesh: Mesh,
        axis: str,
        balance: BalanceConfig | None,
        *,
        prepare: Callable[[int, JaggedBatch], PreparedBatch],
        with_following: bool,
    ):
        alone = jax.process_count() == 1
        if not alone and balance is not None and _holds_back(balance):
            raise ValueError(
                "outliers='defer' keeps samples back in each process, which a checkpoint of "
                f"{jax.process_count()} processes does not hold; use 'cap' or 'split'"
            )
        transport = InProcess(mesh.size) if alone else OverMesh(mesh, axis)
        share = batches.num_sources // mesh.size
        sources = [RankSource(batches, share * rank, share) for rank in transport.local_ranks]
        stage = _AsRead(sources)
        if balance is not None:
            stage = BalancedBatches(sources, transport, _with_room(balance, batches, share))
        # Over a mesh the stage starts collectives: only from the thread that starts the steps.
        self._stage = PrefetchIterator(stage, 2) if alone else stage
        self._num_local, self._prepare = len(sources), prepare
        self._by_rank = NamedSharding(mesh, PartitionSpec(axis))
        self._num_ranks, self._with_following = mesh.size, with_following
        self._balanced = balance is not None
        self._holds_back = balance is not None and _holds_back(balance)
        self._begin(0, {"stream": batches.start, "held": []})

    def __iter__(self) -> "ParallelBatches":
        return self

    def __next__(self) -> StepInput:
        batch, self._place = self._next or self._read()
        self._next = self._read() if self._with_following else None
        return StepInput(batch, self._next[0] if self._next else None)

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch returned, ready for JSON; no process has its own."""
        return self._place

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place, which may be one of another number of devices.

        Raises:
          ValueError: the place is one of other data or settings, or of balanced batches that keep
            outliers back where these do not.
        """
        held = state["held"]
        place: dict[str, Any] = {"sources": [state["stream"]] * self._num_local}
        if self._balanced:
            place |= {"held": _dealt(held, self._num_local), "cut_tokens": 0, "shape": None}
        elif any(held):
            raise ValueError(
                f"the run holds {sum(map(len, held))} outliers back, which batches without "
                "balance would lose: resume it with the balance it had"
            )
        self._stage.set_state(place)
        self._begin(state["step"], state)

    def close(self) -> None:
        """Stops reading ahead."""
        self._stage.close()

    def _begin(self, step: int, state: dict[str, Any]) -> None:
        self._step = step
        self._place = {**state, "step": step}
        self._next: tuple[PreparedBatch, dict[str, Any]] | None = None

    def _read(self) -> tuple[PreparedBatch, dict[str, Any]]:
        """The next batch, and the place behind it."""
        batch = jax.tree.map(self._placed, next(self._stage))
        prepared = self._prepare(self._step, batch)
        self._step += 1
        state = self._stage.get_state()
        held = state.get("held", []) if self._holds_back else []
        place = {"stream": state["sources"][0], "held": held, "step": self._step}
        return prepared, place

    def _placed(self, rows: np.ndarray) -> jax.Array:
        shape = (self._num_ranks, *rows.shape[1:])
        return jax.make_array_from_process_local_data(self._by_rank, rows, shape)


def _dealt(held: list[list[Any]], num_ranks: int) -> list[list[Any]]:
    """Samples that ranks hold back, dealt to another number of ranks."""
    if len(held) == num_ranks:
        return held
    everything = [sample for rank in held for sample in rank]
    return [everything[rank::num_ranks] for rank in range(num_ranks)]


def _holds_back(config: BalanceConfig) -> bool:
    return config.outlier_tokens is not None and config.outliers == "defer"


def _with_room(config: BalanceConfig, batches: GlobalBatches, share: int) -> BalanceConfig:
    """The room of a rank that reads `share` sources, from that of one source."""
    settings = batches.settings
    tokens = config.token_budget or -(-settings.token_budget * 5 // 4)
    sequences = config.max_sequences or 2 * settings.max_sequences
    return replace(config, token_budget=share * tokens, max_sequences=share * sequences)
