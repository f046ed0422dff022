"""Stopping cleanly on SIGINT and SIGTERM, all processes after the same step."""

import json
import signal
import threading
from types import FrameType
from typing import Any

from jaxrec.distributed.agreement import Agreement


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a wish to stop; a second one acts as usual.

    Of several processes all make one and ask it at the same steps. Signalling one of them is
    enough: the wish is heard by process 0 where the loop looks at its results, and all stop where
    it does so the next time.

    Attributes:
      caught: the name of this process's signal; empty while there was none.
    """

    def __init__(self):
        self.caught = ""
        self._together = Agreement()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def stop_after(self, step: int, *, checked: bool) -> str:
        """The name of the signal because of which training ends after this step; else empty.

        Args:
          checked: the step's results, which all processes took part in, have been fetched. So
            what process 0 wrote when it had fetched those of an earlier step is there to be read.

        Cost: of several processes, a call or two of 1 ms where `checked`; else nothing.
        """
        if self._together.alone:
            return self.caught
        if not checked:
            return ""
        notes = self._together.notes("stop")
        if self.caught:
            notes.set(f"wish {self._together.own}", self.caught)
        said = notes.all()
        wishes = [text for key, text in sorted(said.items()) if key.startswith("wish")]
        if "decision" in said:
            after, why = json.loads(said["decision"])
            return why if step > after else ""
        if self._together.is_first and wishes:
            notes.set("decision", json.dumps([step, wishes[0]]))
        return ""

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self._previous[number])
