"""What a run shows and writes while it goes: progress bar, JSON lines, TensorBoard."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

LOG_FILE = "log.jsonl"


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows the figures of a step."""

    def note(self, text: str) -> None:
        """Prints a line without disturbing the bar."""

    def close(self) -> None:
        """Ends the display."""


class PlainProgress:
    """One line every `every_s` seconds, for logs and where rich is missing."""

    def __init__(self, first_step: int, num_steps: int, *, every_s: float = 30.0):
        self.num_steps, self.every_s = num_steps, every_s
        self.first_step, self.started = first_step, time.monotonic()
        self.last_shown = self.started

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last_shown < self.every_s:
            return
        self.last_shown = now
        per_step = (now - self.started) / max(1, step - self.first_step)
        left = per_step * (self.num_steps - step)
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.note(f"step {step}/{self.num_steps}  {shown}  {left:,.0f} s left")

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class RichProgress:
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
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.bar.update(self.task, completed=step, figures=shown)

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def make_progress(first_step: int, num_steps: int) -> Progress:
    """The live bar on a terminal that has rich, plain lines elsewhere."""
    if sys.stdout.isatty():
        try:
            return RichProgress(first_step, num_steps)
        except ImportError:
            pass
    return PlainProgress(first_step, num_steps)


class RunLog:
    """`log.jsonl`, one object a line, and TensorBoard events where tensorboardX is installed.

    Opening it for a resumed run drops the lines of steps past the restored one, so that the file
    reads as if the run had never stopped.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= first_step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(kept))
        scratch.replace(path)
        self._file = path.open("a")
        self._board = _tensorboard(folder / "tensorboard", first_step)

    def write(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Appends one line and flushes it."""
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes both logs."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's log, all or of one kind ("train", "eval")."""
    lines = [json.loads(line) for line in _whole_lines(Path(folder) / LOG_FILE)]
    return [line for line in lines if kind is None or line["kind"] == kind]


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file but for a last one cut short by a crash; none if it is absent."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
