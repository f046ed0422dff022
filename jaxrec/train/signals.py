"""Stopping cleanly on SIGINT and SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a wish to stop; a second one acts as usual.

    Attributes:
      caught: the signal's name; empty while there was none.
    """

    def __init__(self):
        self.caught = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self._previous[number])
