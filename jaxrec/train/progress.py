"""What a run shows and writes while it goes: progress bar, JSON lines, TensorBoard."""

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

LOG_FILE = "log.jsonl"


class Progress:
    """Shows how far a run is; this one shows nothing."""

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows the figures of a step."""

    def note(self, text: str) -> None:
        """Prints a line without disturbing the bar."""

    def close(self) -> None:
        """Ends the display."""


class PlainProgress(Progress):
    """One line every `every_s` seconds, for logs and where rich is missing."""

    def __init__(self, first_step: int, num_steps: int, *, every_s: float = 30.0):
        self.num_steps, self.every_s = num_steps, every_s
        self.first_step, self.started = first_step, time.monotonic()
        self.last_shown = self.started

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Prints the figures if it is time."""
        now = time.monotonic()
        if now - self.last_shown < self.every_s:
            return
        self.last_shown = now
        per_step = (now - self.started) / max(1, step - self.first_step)
        left = per_step * (self.num_steps - step)
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.note(f"step {step}/{self.num_steps}  {shown}  {left:,.0f} s left")

    def note(self, text: str) -> None:
        """Prints the line."""
        print(text, flush=True)


class RichProgress(Progress):
    """A live bar with loss, tokens a second and the time left."""

    def __init__(self, first_step: int, num_steps: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(),
        )
        self.task = self.bar.add_task("training", total=num_steps, completed=first_step, figures="")
        self.bar.start()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Moves the bar."""
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.bar.update(self.task, completed=step, figures=shown)

    def note(self, text: str) -> None:
        """Prints the line above the bar."""
        self.bar.console.print(text, highlight=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.stop()


def make_progress(first_step: int, num_steps: int) -> Progress:
    """The live bar on a terminal that has rich, plain lines elsewhere.

    Of several processes only the first shows anything.
    """
    if jax.process_index() > 0:
        return Progress()
    if sys.stdout.isatty():
        try:
            return RichProgress(first_step, num_steps)
        except ImportError:
            pass
    return PlainProgress(first_step, num_steps)


class Log:
    """Keeps the figures of a run; this one keeps none."""

    def write(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Adds the figures of a step."""

    def close(self) -> None:
        """Ends the log."""


class RunLog(Log):
    """`log.jsonl`, one object a line, and TensorBoard events where tensorboardX is installed.

    Opening it for a resumed run drops the lines of steps past the restored one, so that the file
    reads as if the run had never stopped. What cannot be written (disk full) is kept and written
    with a later line; training goes on.
    """

    def __init__(self, folder: Path, first_step: int):
        self._unwritten = b""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        kept = [record for record in _records(path) if record["step"] <= first_step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
        scratch.replace(path)
        self._file = path.open("ab", buffering=0)
        self._board = _tensorboard(folder / "tensorboard", first_step)

    def write(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._unwritten += json.dumps({"step": step, "kind": kind, **figures}).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            warnings.warn(f"{self._file.name} lags behind: {error}", stacklevel=2)
        if self._board is not None:
            for name, value in figures.items():
                if not isinstance(value, list):  # TensorBoard draws scalars alone
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes both logs."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def make_log(folder: Path, first_step: int) -> Log:
    """The files of a run; of several processes only the first writes any."""
    return RunLog(folder, first_step) if jax.process_index() == 0 else Log()


def read_log(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's log, all or of one kind ("train", "eval")."""
    records = _records(Path(folder) / LOG_FILE)
    return [record for record in records if kind is None or record["kind"] == kind]


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log but for a last one cut short by a crash; none if it is absent."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if not {"step", "kind"} <= set(record):
                raise ValueError("keys are missing")
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not an object with step and kind: {line.strip()[:80]!r}. "
                "Delete or repair the line."
            ) from error
        records.append(record)
    return records


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
