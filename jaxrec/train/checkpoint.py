"""Checkpoints of a run: atomic, asynchronous, verified, the newest and the best kept.

Orbax writes them. Added here: checksums, so that a damaged checkpoint is noticed and the one
before it used; the comparison of configurations; recovery from a failed save; and a lock, so that
two runs never share a folder. Of several processes each writes its pieces of the arrays (see
`checkpoint_parts`), and Orbax, in process 0, the rest.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrec.distributed.agreement import Agreement
from jaxrec.orbax_log import hush_orbax, unhush_orbax
from jaxrec.train.checkpoint_errors import (
    CheckpointError,
    CheckpointWarning,
    DamagedError,
    first_line,
    told_by_others,
)
from jaxrec.train.checkpoint_meta import other_arrays, sealed, unsealed
from jaxrec.train.checkpoint_parts import (
    PARTS_FOLDER,
    STEPS_FOLDER,
    SharedSave,
    read_parts,
    remove_parts,
    set_aside,
)
from jaxrec.train.config_diff import check_same_config
from jaxrec.train.fingerprint import fingerprints
from jaxrec.train.folder_lock import FolderInUse, lock_for_all
from jaxrec.train.orbax_manager import open_manager
from jaxrec.typing import PyTree


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

    Of several processes all make the store and call `save`, `wait`, `restore` and `close` in the
    same order, on one folder that all see. What fails in one of them fails in all. A checkpoint is
    read again by any number of processes and devices.

    Args:
      folder: of the run; made if absent.
      keep: newest checkpoints kept, at least 1.
      best_metric: the checkpoint with the largest is kept too (the earliest of equals); None
        keeps only the newest.
      read_only: takes no lock and writes nothing; each process for itself.

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
        self._saving: SharedSave | None = None
        self._together = Agreement(alone=read_only)
        self._lock = self._take_lock()
        self._hush = hush_orbax()
        try:
            self._open()
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
        return sorted(self._manager.all_steps() if self._together.alone else self._steps)

    @property
    def best_step(self) -> int | None:
        """The step with the largest `best_metric`, the earliest of equals; None without any."""
        if self.best_metric is None:
            raise CheckpointError("the store was opened without best_metric, so no step is best")
        return self._best_of(self.steps)

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
        meta = {
            "iterator": iterator_state,
            "config": config,
            "metrics": metrics or {},
            "progress": progress or {},
            "arrays": fingerprints(state),
        }
        self._note_score(step, meta["metrics"])
        if not self._together.alone:
            meta = sealed(**meta, parts=self._together.count)
            parts = self.folder / PARTS_FOLDER / str(step)
            commit = partial(self._commit, step, meta)
            self._saving = SharedSave(self._together, parts, state, commit)
            return
        if jax.default_backend() == "cpu":  # there a "host copy" would be the donated buffer
            state = jax.tree.map(jnp.copy, state)
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(sealed(**meta))}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._recover(error) from error

    def wait(self) -> None:
        """Blocks until the save under way is complete; raises `CheckpointError` if it failed."""
        saving, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            if saving is not None:
                self._steps = saving.wait()
                if not self._together.is_first:
                    self._manager.reload()
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
            except DamagedError as error:
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
        try:
            with told_by_others():
                return lock_for_all(self.folder, self._together)
        except FolderInUse as error:
            raise CheckpointError(str(error)) from error

    def _let_go(self) -> None:
        unhush_orbax(self._hush)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        """Opens what is there, process 0 first, which clears away what is half written."""

        def first() -> dict[str, Any]:
            self._manager = self._open_manager()
            if not self._read_only:
                remove_parts(self.folder, self._manager.all_steps())
            self._steps = list(self._manager.all_steps())
            return {"steps": self._steps, "scores": list(self._read_scores().items())}

        with told_by_others():
            found = self._together.from_first("opened", first)
        self._steps, self._scores = found["steps"], dict(found["scores"])
        if not self._together.is_first:
            self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        """Orbax's; of several processes only the first one's writes."""
        writing = not self._read_only and self._together.is_first
        return open_manager(self.folder / STEPS_FOLDER, self._kept if writing else None)

    def _commit(self, step: int, meta: Mapping[str, Any]) -> list[int]:
        """Makes a step complete whose parts all processes have written; gives all steps."""
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()
        steps = list(self._manager.all_steps())
        remove_parts(self.folder, steps)
        return steps

    def _recover(self, error: Exception) -> CheckpointError:
        """Starts Orbax anew, which lists what is on disk and removes what is half written."""
        with told_by_others():
            self._open()
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {first_line(error)}. Complete "
            f"checkpoints are untouched (steps {self.steps}); {free / 1e6:.0f} MB are free there. "
            "Make room or give another folder; the state in memory is unharmed."
        )

    def _kept(self, steps: Sequence[int]) -> set[int]:
        best = self._best_of(steps)
        return {*sorted(steps)[-self._keep :], *([] if best is None else [best])}

    def _best_of(self, steps: Sequence[int]) -> int | None:
        scored = [(score, -step) for step, score in self._scores.items() if step in steps]
        return -max(scored)[1] if scored else None

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
            except DamagedError:
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
        if not reasons:
            return
        places = {str(step): "left where it is" for step in reasons}
        if not self._read_only:
            with told_by_others():
                places = self._together.from_first(
                    "set aside",
                    lambda: {str(s): f"moved to {set_aside(self.folder, s)}" for s in reasons},
                )
            self._manager.reload()
            self._steps = [step for step in self._steps if step not in reasons]
        for step, reason in reasons.items() if self._together.is_first else ():
            warnings.warn(
                f"the checkpoint of step {step} is damaged ({reason}) and was {places[str(step)]}; "
                f"using step {used} instead",
                CheckpointWarning,
                stacklevel=3,
            )
        for step in reasons:
            self._scores.pop(step, None)

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            meta = unsealed(restored["meta"])
        except Exception as error:
            raise DamagedError(f"its meta data cannot be read: {first_line(error)}") from error
        if meta is None:
            raise DamagedError("its meta data do not have the checksum they were saved with")
        return meta

    def _read_arrays(self, step: int, meta: Mapping[str, Any], abstract_state: PyTree) -> PyTree:
        try:
            if "parts" in meta:
                folder = self.folder / PARTS_FOLDER / str(step)
                return read_parts(folder, meta["parts"], abstract_state)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise DamagedError(f"its arrays cannot be read: {first_line(error)}") from error

    def _in_all[T](self, what: str, read: Callable[[], T]) -> T:
        """What is read, or an error in all processes if it is damaged for one."""
        value, failure = None, ""
        try:
            value = read()
        except DamagedError as error:
            failure = str(error)
        with told_by_others():
            failure = self._together.first_failure(what, failure)
        if failure:
            raise DamagedError(failure)
        return cast(T, value)

    def _read(
        self,
        step: int,
        abstract_state: PyTree,
        config: Mapping[str, Any] | None,
        may_differ: tuple[str, ...],
    ) -> Restored:
        meta = self._in_all("read meta", lambda: self._read_meta(step))
        if config is not None:
            check_same_config(meta["config"], config, may_differ)
        if lines := other_arrays(meta["arrays"], abstract_state):
            shown = "\n  ".join(lines[:20])
            raise CheckpointError(
                f"the checkpoint of step {step} holds other arrays:\n  {shown}\nBuild the model "
                "and the optimizer with the saved configuration."
            )
        state = self._in_all("read arrays", lambda: self._read_arrays(step, meta, abstract_state))
        read = fingerprints(state)
        wrong = [name for name, saved in meta["arrays"].items() if read[name] != saved]
        if wrong:
            raise DamagedError(f"{', '.join(wrong[:5])} differ from what was saved")
        return Restored(
            step, state, meta["iterator"], meta["config"], meta["metrics"], meta["progress"]
        )
