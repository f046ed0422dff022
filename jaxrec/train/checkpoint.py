"""Checkpoints of a run: atomic, asynchronous, verified, the newest and the best kept.

Orbax writes them. Added here: checksums, so that a damaged checkpoint is noticed and the one
before it used; the comparison of configurations; recovery from a failed save; and a lock, so that
two runs never share a folder.
"""

import json
import math
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrec.functional import leaf_names
from jaxrec.orbax_log import hush_orbax, unhush_orbax
from jaxrec.train.config_diff import check_same_config
from jaxrec.train.fingerprint import fingerprints
from jaxrec.train.folder_lock import FolderInUse, lock_folder
from jaxrec.typing import PyTree

STEPS_FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, or a save failed and training went on."""


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
      keep: newest checkpoints kept, at least 1.
      best_metric: the checkpoint with the largest is kept too (the earliest of equals); None
        keeps only the newest.
      read_only: takes no lock and writes nothing.

    Raises:
      CheckpointError: another live process uses the folder, or (read_only) it does not exist.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 1,
        best_metric: str | None = None,
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1 checkpoint")
        self.folder = Path(folder).absolute()
        self.best_metric = best_metric
        self._keep, self._read_only = keep, read_only
        self._scores: dict[int, float] = {}
        self._lock = self._take_lock()
        self._hush = hush_orbax()
        try:
            self._manager = self._open_manager()
            self._scores = self._read_scores()
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if error_type is None:
                raise
            warnings.warn(str(error), CheckpointWarning, stacklevel=2)  # the first error matters

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, one being written included, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the largest `best_metric`, the earliest of equals; None without any."""
        if self.best_metric is None:
            raise CheckpointError("the store was opened without best_metric, so no step is best")
        scored = [(score, -step) for step, score in self._scores.items() if step in self.steps]
        return -max(scored)[1] if scored else None

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
          CheckpointError: it could not be written (disk full, no permission), or the step has a
            checkpoint already. Complete checkpoints are untouched.
        """
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(f"the save before this one failed: {error}", CheckpointWarning, 2)
        if step in self.steps:
            raise CheckpointError(f"{self.folder} already holds a checkpoint of step {step}")
        meta = _sealed(
            iterator=iterator_state,
            config=config,
            metrics=metrics or {},
            progress=progress or {},
            arrays=fingerprints(state),
        )
        if jax.default_backend() == "cpu":  # there a "host copy" would be the donated buffer
            state = jax.tree.map(jnp.copy, state)
        self._note_score(step, meta["metrics"])
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._recover(error) from error

    def wait(self) -> None:
        """Blocks until the save under way is complete; raises `CheckpointError` if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._recover(error) from error

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
            warning, and (unless read_only) moves them to `folder/damaged`; "best" and a number
            never do.
          config: compared with the saved one.
          may_differ: dotted fields (or their parents) that the comparison leaves out.

        Raises:
          CheckpointError: nothing to restore, damaged, or arrays of other shapes than asked for.
          ConfigMismatch: names every field that differs.
        """
        self.wait()
        reasons: dict[int, str] = {}
        for candidate in self._candidates(step):
            try:
                restored = self._read(candidate, abstract_state, config, may_differ)
            except _DamagedError as error:
                reasons[candidate] = str(error)
                continue
            self._pass_over(reasons, candidate)
            return restored
        found = "; ".join(f"step {number}: {reason}" for number, reason in reasons.items())
        raise CheckpointError(
            f"no usable checkpoint in {self.folder / STEPS_FOLDER}: {found or 'there is none'}. "
            "Restore the folder from a copy, or start again in another folder."
        )

    def close(self) -> None:
        """Completes the save under way and gives the folder free; raises if the save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._let_go()

    def _take_lock(self) -> TextIO | None:
        if self._read_only:
            if not self.folder.is_dir():
                raise CheckpointError(f"there is no folder {self.folder}")
            return None
        if jax.process_index() != 0:  # the first process of a run holds it for all
            return None
        try:
            return lock_folder(self.folder)
        except FolderInUse as error:
            raise CheckpointError(
                f"{self.folder} is in use by {error}; two runs in one folder would overwrite each "
                "other. Wait for it, stop it, or give this run another folder."
            ) from error

    def _let_go(self) -> None:
        unhush_orbax(self._hush)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open_manager(self) -> ocp.CheckpointManager:
        writing = not self._read_only
        options = ocp.CheckpointManagerOptions(
            create=writing,
            read_only=self._read_only,
            cleanup_tmp_directories=writing,
            preservation_policy=_KeepNewestAndBest(self) if writing else None,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        folder = self.folder / STEPS_FOLDER
        return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def _recover(self, error: Exception) -> CheckpointError:
        """Starts Orbax anew, which lists what is on disk and removes what is half written."""
        self._manager = self._open_manager()
        self._scores = self._read_scores()
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {_first_line(error)}. Complete "
            f"checkpoints are untouched (steps {self.steps}); {free / 1e6:.0f} MB are free there. "
            "Make room or give another folder; the state in memory is unharmed."
        )

    def _kept(self, steps: Sequence[int]) -> set[int]:
        kept = set(sorted(steps)[-self._keep :])
        if self.best_metric is not None and self.best_step is not None:
            kept.add(self.best_step)
        return kept

    def _note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        score = metrics.get(self.best_metric) if self.best_metric is not None else None
        if score is not None and not math.isnan(score):
            self._scores[step] = score

    def _read_scores(self) -> dict[int, float]:
        """Scores of the checkpoints on disk; a damaged one is not the best."""
        self._scores = {}
        for step in self.steps if self.best_metric is not None else ():
            try:
                self._note_score(step, self._read_meta(step)["metrics"])
            except _DamagedError:
                continue
        return self._scores

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

    def _pass_over(self, reasons: Mapping[int, str], used: int) -> None:
        """Warns of damaged checkpoints and sets them aside, where no later save meets them."""
        for step, reason in reasons.items():
            where = "left where it is"
            if not self._read_only:
                where = f"moved to {self._set_aside(step)}"
            warnings.warn(
                f"the checkpoint of step {step} is damaged ({reason}) and was {where}; using step "
                f"{used} instead",
                CheckpointWarning,
                stacklevel=3,
            )
        if reasons and not self._read_only:
            self._manager.reload()

    def _set_aside(self, step: int) -> Path:
        target = self.folder / DAMAGED_FOLDER / str(step)
        for attempt in range(1, 1000):
            if not target.exists():
                break
            target = target.with_name(f"{step}-{attempt}")
        target.parent.mkdir(exist_ok=True)
        if jax.process_index() == 0:
            (self.folder / STEPS_FOLDER / str(step)).rename(target)
        self._scores.pop(step, None)
        return target

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            meta = dict(restored["meta"])
        except Exception as error:
            raise _DamagedError(f"its meta data cannot be read: {_first_line(error)}") from error
        if meta.pop("crc32", None) != _crc32(meta):
            raise _DamagedError("its meta data do not have the checksum they were saved with")
        return meta

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
        _check_same_arrays(step, meta["arrays"], abstract_state)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:
            raise _DamagedError(f"its arrays cannot be read: {_first_line(error)}") from error
        state = restored["state"]
        read = fingerprints(state)
        wrong = [name for name, saved in meta["arrays"].items() if read[name] != saved]
        if wrong:
            raise _DamagedError(f"{', '.join(wrong[:5])} differ from what was saved")
        return Restored(
            step, state, meta["iterator"], meta["config"], meta["metrics"], meta["progress"]
        )


class _DamagedError(CheckpointError):
    """This one checkpoint is not usable; another may be."""


class _KeepNewestAndBest:
    """Orbax's question which checkpoints to preserve, answered by the store."""

    def __init__(self, store: CheckpointStore):
        self.store = store

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.store._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def _sealed(**meta: Any) -> dict[str, Any]:
    """As JSON would return it, with a checksum of its own."""
    plain = json.loads(json.dumps(meta))
    return {**plain, "crc32": _crc32(plain)}


def _crc32(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _check_same_arrays(step: int, saved: Mapping[str, list], abstract_state: PyTree) -> None:
    """Tells a checkpoint of other arrays from a damaged one."""
    names = leaf_names(abstract_state)
    wanted = {
        name: [str(leaf.dtype), list(leaf.shape)]
        for name, leaf in zip(names, jax.tree.leaves(abstract_state), strict=True)
    }
    lines = []
    for name in sorted(wanted.keys() | saved.keys()):
        before = "absent" if name not in saved else f"{saved[name][0]}{saved[name][1]}"
        now = "absent" if name not in wanted else f"{wanted[name][0]}{wanted[name][1]}"
        if before != now:
            lines.append(f"{name}: saved {before}, asked for {now}")
    if lines:
        shown = "\n  ".join(lines[:20])
        raise CheckpointError(
            f"the checkpoint of step {step} holds other arrays:\n  {shown}\nBuild the model and "
            "the optimizer with the saved configuration."
        )
