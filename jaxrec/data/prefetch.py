"""A background thread that works ahead of a resumable iterator without disturbing its state."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from jaxrec.ops.jagged import JaggedBatch


@runtime_checkable
class ResumableIterator(Protocol):
    """An iterator of batches whose place can be stored as JSON and taken up again."""

    def __iter__(self) -> Iterator[JaggedBatch]:
        """Itself."""
        ...

    def __next__(self) -> JaggedBatch:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch returned."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a place that `get_state` returned."""
        ...

    def close(self) -> None:
        """Frees what the iterator holds; it may be used again afterwards."""
        ...


class PrefetchIterator:
    """Makes the next `depth` batches in a thread while the caller uses the current one.

    The sequence of batches and the states are those of `source`: `get_state` is the place behind
    the last batch *returned*, however far the thread is ahead. Errors of the source surface
    at the batch where they happened. `source` must not be used by anyone else.

    Args:
      place: done to every batch in the thread, such as `jax.device_put`: it is on the device when
        it is asked for.
    """

    def __init__(
        self,
        source: ResumableIterator,
        depth: int,
        *,
        place: Callable[[JaggedBatch], JaggedBatch] | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected at least 1.")
        self._source = source
        self._depth = depth
        self._place = place
        self._state = source.get_state()
        self._worker: tuple[threading.Thread, threading.Event, queue.Queue] | None = None

    def __iter__(self) -> "PrefetchIterator":
        return self

    def __next__(self) -> JaggedBatch:
        if self._worker is None:
            self._worker = self._start()
        batch, state, error = self._worker[2].get()
        if error is not None:
            self.close()
            raise error
        self._state = state
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch returned."""
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Drops what was prepared and continues from `state`."""
        self.close()
        self._source.set_state(state)
        self._state = self._source.get_state()

    def close(self) -> None:
        """Stops the thread; the next batch starts it again at the right place."""
        if self._worker is None:
            return
        thread, stop, _ = self._worker
        self._worker = None
        stop.set()
        thread.join()

    def _start(self) -> tuple[threading.Thread, threading.Event, queue.Queue]:
        self._source.set_state(self._state)
        ready: queue.Queue = queue.Queue(maxsize=self._depth)
        stop = threading.Event()
        # The thread holds no reference to self, so that a forgotten iterator is collected.
        thread = threading.Thread(
            target=_work,
            args=(self._source, self._place, ready, stop),
            name="jaxrec-prefetch",
            daemon=True,
        )
        thread.start()
        return thread, stop, ready

    def __del__(self):
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker[1].set()


def _work(
    source: ResumableIterator,
    place: Callable[[JaggedBatch], JaggedBatch] | None,
    ready: queue.Queue,
    stop: threading.Event,
) -> None:
    error = None
    while error is None and not stop.is_set():
        batch, state = None, None
        try:
            batch = next(source)
            batch = batch if place is None else place(batch)
            state = source.get_state()
        except BaseException as caught:  # handed to the caller, StopIteration included
            error = caught
        while not stop.is_set():
            try:
                ready.put((batch, state, error), timeout=0.05)
                break
            except queue.Full:
                continue
