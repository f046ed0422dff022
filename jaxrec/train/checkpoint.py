"""Checkpoints of a run: atomic, asynchronous, verified, the newest and the best kept.

Orbax writes them. Added here: checksums, so that a damaged checkpoint is noticed and the one
before it used; the comparison of configurations; and a lock, so that two runs never share a
folder.
"""

import fcntl
import json
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from jaxrec.train.config_diff import check_same_config
from jaxrec.typing import PyTree

STEPS_FOLDER = "checkpoints"
LOCK_FILE = "lock"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, or a save failed and will be tried again."""


class Restored(NamedTuple):
    """What `CheckpointStore.restore` returns."""

    step: int
    state: PyTree
    iterator_state: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]
    progress: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in `folder/checkpoints/<step>`; holds the folder's lock.

    Args:
      folder: of the run; made if absent.
      keep: newest checkpoints kept.
      best_metric: the checkpoint with the largest is kept too; None keeps only the newest.
      read_only: takes no lock and writes nothing.

    Raises:
      CheckpointError: another live process uses the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 1,
        best_metric: str | None = None,
        read_only: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self.best_metric = best_metric
        self._lock = None if read_only else _lock(self.folder)
        policies: list[Any] = [preserve.LatestN(max(keep, 1))]
        if best_metric is not None:
            best = preserve.BestN(
                get_metric_fn=lambda m: m.get(best_metric, -np.inf),
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=None if read_only else preserve.AnyPreservationPolicy(policies),
        )
        self._manager = ocp.CheckpointManager(
            self.folder / STEPS_FOLDER,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        iterator_state: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        A failure while writing shows in `wait` or `close`, or as a warning in the next `save`.

        Raises:
          CheckpointError: it could not be written (disk full, no permission). Complete
            checkpoints are untouched.
        """
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(f"the save before this one failed: {error}", CheckpointWarning, 2)
        if jax.default_backend() == "cpu":  # there a "host copy" would be the donated buffer
            state = jax.tree.map(jnp.copy, state)
        meta = {
            "iterator": dict(iterator_state),
            "config": dict(config),
            "metrics": dict(metrics or {}),
            "progress": dict(progress or {}),
            "checksums": _checksums(state),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics=dict(metrics) if metrics else None,
                force=True,
            )
        except Exception as error:
            raise self._save_error(error) from error

    def wait(self) -> None:
        """Blocks until the save under way is complete; raises `CheckpointError` if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error

    def _save_error(self, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {error}. Complete checkpoints "
            f"are untouched (steps {self.steps}); {free / 1e6:.0f} MB are free there. Make room "
            "or give another folder; the state in memory is unharmed."
        )

    def restore(
        self,
        abstract_state: PyTree,
        *,
        step: int | str = "latest",
        config: Mapping[str, Any] | None = None,
        may_differ: tuple[str, ...] = (),
    ) -> Restored:
        """Reads a checkpoint onto the devices that `abstract_state` names.

        Args:
          abstract_state: shapes, dtypes and shardings wanted (arrays will do), on any number of
            devices; see `jaxrec.sharding.abstract_like`.
          step: a number, "latest" or "best". "latest" passes over damaged checkpoints, with a
            warning; "best" and a number never do.
          config: compared with the saved one.
          may_differ: dotted fields (or their parents) that the comparison leaves out.

        Raises:
          CheckpointError: nothing to restore, or damaged.
          ConfigMismatch: names every field that differs.
        """
        candidates = self._candidates(step)
        reasons = []
        for candidate in candidates:
            try:
                restored = self._read(candidate, abstract_state, config, may_differ)
            except _Damaged as error:
                reasons.append(f"step {candidate}: {error}")
                continue
            for reason in reasons:
                warnings.warn(
                    f"checkpoint passed over, using step {candidate} instead; {reason}",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return restored
        raise CheckpointError(
            f"no usable checkpoint in {self.folder / STEPS_FOLDER}: "
            + ("; ".join(reasons) or "there is none")
            + ". Restore the folder from a copy, or start again in another folder."
        )

    def _candidates(self, step: int | str) -> list[int]:
        steps = self.steps[::-1]
        if step == "latest":
            return steps
        if step == "best":
            best = self.best_step
            return [] if best is None else [best]
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; it has {steps}")
        return [int(step)]

    @property
    def best_step(self) -> int | None:
        """The step with the largest `best_metric` among the checkpoints that carry it."""
        if self.best_metric is None:
            raise CheckpointError("the store was opened without best_metric, so no step is best")
        scored = []
        for step in self.steps:
            metrics = self._read_meta(step).get("metrics", {})
            if self.best_metric in metrics:
                scored.append((metrics[self.best_metric], -step))
        return -max(scored)[1] if scored else None

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            return dict(restored["meta"])
        except Exception as error:
            raise _Damaged(f"its meta data cannot be read ({_first_line(error)})") from error

    def _read(
        self,
        step: int,
        abstract_state: PyTree,
        config: Mapping[str, Any] | None,
        may_differ: tuple[str, ...],
    ) -> Restored:
        meta = self._read_meta(step)
        if config is not None:
            check_same_config(meta["config"], config, may_differ)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:
            raise _Damaged(f"its arrays cannot be read ({_first_line(error)})") from error
        state = restored["state"]
        if _checksums(state) != meta["checksums"]:
            raise _Damaged("its arrays do not have the checksums they were saved with")
        return Restored(
            step, state, meta["iterator"], meta["config"], meta["metrics"], meta["progress"]
        )

    def close(self) -> None:
        """Completes the save under way and gives the folder free."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None


class _Damaged(CheckpointError):
    """This one checkpoint is not usable; another may be."""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _checksums(state: PyTree) -> list[int] | None:
    """CRC-32 of every leaf's bytes; None where this process does not hold all of them."""
    leaves = jax.tree.leaves(state)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return None
    return [
        zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data) for leaf in leaves
    ]


def _lock(folder: Path) -> Any:
    """Takes the folder for this process; the system frees it when the process ends, however."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK_FILE, "a+")  # noqa: SIM115 - held as long as the store
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(
            f"{folder} is in use by {holder}; two runs in one folder would overwrite each other. "
            "Wait for it, stop it, or give this run another folder."
        ) from error
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file
