"""Orbax's manager of a run's checkpoints, as `CheckpointStore` uses it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_manager(
    folder: Path, kept: Callable[[Sequence[int]], set[int]] | None
) -> ocp.CheckpointManager:
    """Opens a folder of steps with "state" (arrays) and "meta" (JSON).

    Of several processes each opens it for itself: none waits for another one inside Orbax.

    Args:
      folder: of the steps; one that writes makes it, and removes what is half written.
      kept: of some steps those to keep; None does not write.
    """
    writing = kept is not None
    processes = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        own = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(own, {own}, f"process-{own}")
        if writing:
            folder.mkdir(exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=writing and jax.process_count() == 1,
        read_only=not writing,
        cleanup_tmp_directories=writing,
        preservation_policy=None if kept is None else _Keep(kept),
        multiprocessing_options=processes,
    )
    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


class _Keep:
    """Orbax's question which checkpoints to preserve, answered by a function."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]
