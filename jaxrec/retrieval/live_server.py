"""Serving an index that changes: queries never wait, and compaction goes on beside them."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Key

from jaxrec.retrieval.bloom_index import FilterLike
from jaxrec.retrieval.fresh import FreshFullError, LiveIndex
from jaxrec.retrieval.ivf_index import SearchResult

type _Array = jax.Array | np.ndarray
type _Update = Callable[[LiveIndex], LiveIndex]


class LiveServer:
    """Holds the newest `LiveIndex` for any number of threads.

    Every update makes a new index and replaces one reference, so a query sees the index as it was
    when the query began, with all of an update or nothing of it. Updates are applied one after the
    other. Those that arrive during a compaction take effect at once, and again on the compacted
    index before it takes over: nothing is lost.

    Until a query's last use of it, the index that it began with stays in memory: at most one copy
    of the fresh part an update, and during a compaction a second main part.
    """

    def __init__(self, index: LiveIndex, *, key: Key[jax.Array, ""] | None = None):
        """Args: index: where to start; key: seeds compactions; None takes key 0."""
        self._index = index
        self._key = jax.random.key(0) if key is None else key
        self._updating = threading.Lock()
        self._compacting = threading.Lock()
        self._since: list[_Update] | None = None  # updates since a compaction began

    @property
    def index(self) -> LiveIndex:
        """The newest index. It never changes; later updates make others."""
        return self._index

    def search(
        self,
        queries: Float[_Array, "Q D"],
        filters: Sequence[FilterLike],
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude: Int[_Array, "Q X"] | None = None,
    ) -> SearchResult:
        """`LiveIndex.search` of the newest index; filters and not plans, as a catalogue may change.

        The first query after a compaction compiles for the new sizes; see `compact`.
        """
        index = self._index
        plan = index.compile(filters)
        return index.search(queries, plan, k=k, nprobe=nprobe, exact=exact, exclude=exclude)

    def upsert(
        self,
        ids: Int[_Array, "M"] | Sequence[int],
        embeddings: Float[_Array, "rows D"],
        features: Mapping[str, Any],
        columns: Mapping[str, _Array] | None = None,
    ) -> None:
        """`LiveIndex.upsert`; compacts first where the fresh part is full.

        Arguments must not be written to until a compaction that may be under way is over.

        Raises:
          FreshFullError: more items than the fresh part's capacity in one update.
          ValueError: as `LiveIndex.upsert`; nothing was changed.
        """
        while True:
            try:
                return self._apply(lambda index: index.upsert(ids, embeddings, features, columns))
            except FreshFullError:
                if len(ids) > self._index.capacity:
                    raise
            with self._compacting:
                if self._free_rows() < len(ids):  # another thread may have made room
                    self._compact()

    def delete(self, ids: Int[_Array, "M"] | Sequence[int]) -> None:
        """`LiveIndex.delete`.

        Raises:
          ValueError: an id that the index does not hold; nothing was changed.
        """
        self._apply(lambda index: index.delete(ids))

    def compact(self, *, warm_up: Callable[[LiveIndex], Any] | None = None, **options: Any) -> None:
        """Compacts the index while queries and updates go on, then swaps it in.

        A compaction that is under way is awaited first.

        Args:
          warm_up: called with the compacted index before it takes over, to compile the searches
            that it will see; its shapes are new.
          options: of `LiveIndex.compact`, but the key.

        Raises:
          ValueError: what `LiveIndex.compact` raises, or a new capacity too small for the updates
            that arrived meanwhile. The former index stays in use, and nothing is lost.
        """
        with self._compacting:
            self._compact(warm_up, **options)

    def compact_in_background(
        self, *, warm_up: Callable[[LiveIndex], Any] | None = None, **options: Any
    ) -> "Future[None]":
        """`compact` in a thread of its own; the future holds what it raises."""
        done: Future[None] = Future()

        def run():
            try:
                self.compact(warm_up=warm_up, **options)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=run, name="compaction", daemon=True).start()
        return done

    def _apply(self, update: _Update) -> None:
        with self._updating:
            self._index = update(self._index)
            if self._since is not None:
                self._since.append(update)

    def _free_rows(self) -> int:
        return int((np.asarray(self._index.fresh.ivf.row_ids) < 0).sum())

    def _compact(self, warm_up: Callable[[LiveIndex], Any] | None = None, **options: Any) -> None:
        with self._updating:
            begun, self._since = self._index, []
            self._key, key = jax.random.split(self._key)
        try:
            compacted = begun.compact(key=key, **options)
            if warm_up is not None:
                warm_up(compacted)
            compacted, done = self._replay(compacted, 0)  # most of them, while others still arrive
            with self._updating:
                self._index, _ = self._replay(compacted, done)
        finally:
            with self._updating:
                self._since = None

    def _replay(self, index: LiveIndex, done: int) -> tuple[LiveIndex, int]:
        """The index with the updates from number `done` on, and how many these are by now."""
        updates = list(self._since or [])
        for update in updates[done:]:
            index = update(index)
        return index, len(updates)
