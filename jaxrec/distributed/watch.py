"""Notices that another process is lost, says which, and ends this one.

A collective that waits for a dead process never returns, and where it does, with an error, that
does not say who is missing. So every process counts aloud in a dictionary that all of them read.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from jaxrec.distributed.key_value import KeyValue
from jaxrec.distributed.roll_call import Peer

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run is saved and goes on when started again
EXIT_PEER_LOST = 76

_now = time.monotonic


class Watch:
    """Two threads: one counts and reads, one looks who has been silent for too long.

    A process that stands still itself (stopped, or its host asleep) begins anew to listen when it
    wakes. Ends this process with `EXIT_PEER_LOST`, not by an exception: the main thread may be
    inside a collective.

    Args:
      peers: all processes by their numbers.
      own: the number of this one.
      coordinator: address of process 0.
      timeout: seconds of silence.

    Cost: five reads and writes a time-out.
    """

    def __init__(
        self, peers: Sequence[Peer], own: int, coordinator: tuple[str, int], timeout: float | int
    ):
        self._peers, self._own, self._timeout = peers, own, timeout
        self._coordinator = coordinator
        self._interval = timeout / 5
        self._alive, self._ended = KeyValue("alive"), KeyValue("ended")
        self._counts: dict[int, str] = {}
        self._endings: dict[int, dict[str, Any]] = {}
        self._dead: set[int] = set()
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self._listen_anew()
        self._handler = _C_HANDLER(self._on_abort)
        self._threads = [
            threading.Thread(target=loop, name="jaxrec-watch", daemon=True)
            for loop in (self._count, self._look)
        ]

    def start(self) -> None:
        """Begins to count and to look."""
        # JAX's client aborts the process as soon as process 0 is gone, with a stack trace.
        ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, self._handler)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the watching; the others see this process as gone in good order."""
        self._closed.set()
        ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _DEFAULT)
        for thread in self._threads:
            thread.join(self._timeout)

    def announce_end(self, how: str, text: str = "") -> None:
        """Tells the others that this process is done ("left"), or has failed with an error."""
        self._ended.set(str(self._own), json.dumps({"how": how, "text": text}))

    def wait_for_verdict(self) -> None:
        """Returns if no other process is found lost in the time that this takes to show."""
        time.sleep(self._timeout + 2 * self._interval)
        with self._ending:  # held by whoever is ending this process
            pass

    def wait_until_heard(self) -> None:
        """Process 0 stays until the others have read why it ends, as they read it from here."""
        end = _now() + 2 * self._interval + 1
        everyone = {peer.process for peer in self._peers}
        while self._own == 0 and _now() < end and everyone - self._endings.keys() - self._dead:
            time.sleep(self._interval / 4)
            self._read()

    @property
    def left(self) -> set[int]:
        """Processes that have ended in good order."""
        return {number for number, ending in self._endings.items() if ending["how"] == "left"}

    def _listen_anew(self) -> None:
        self._contact = self._looked = _now()
        self._last_sign = dict.fromkeys(range(len(self._peers)), _now())

    def _count(self) -> None:
        count = 0
        while not self._closed.is_set():
            count += 1
            try:
                self._alive.set(str(self._own), str(count))
                self._read()
            except Exception:  # process 0 does not answer; whether for long, `_look` decides
                pass
            self._closed.wait(self._interval)

    def _read(self) -> None:
        for key, value in self._alive.all().items():
            if self._counts.get(int(key)) != value:
                self._counts[int(key)], self._last_sign[int(key)] = value, _now()
        self._endings = {int(key): json.loads(text) for key, text in self._ended.all().items()}
        self._contact = _now()

    def _look(self) -> None:
        while not self._closed.wait(self._interval / 2):
            if _now() - self._looked > self._timeout / 2:
                self._listen_anew()  # it was this process that stood still
                continue
            self._looked = _now()
            self._hear_endings()
            if _now() - self._contact > self._timeout:
                self._lost(0, _now() - self._contact)
            for peer in self._peers:
                silent = _now() - self._last_sign[peer.process]
                present = peer.process not in {*self.left, self._own}
                if present and silent > self._timeout:
                    self._lost(peer.process, silent)

    def _hear_endings(self) -> None:
        for number, ending in dict(self._endings).items():
            if number == self._own or ending["how"] == "left":
                continue
            if ending["how"] == "failed":
                self._end(f"{self._peers[number]} ended with {ending['text']}")
            self._end(f"{ending['text']} (so {self._peers[number]} says)")

    def _lost(self, number: int, silent: float) -> None:
        self._dead.add(number)
        what = ", which serves the coordinator," if number == 0 else ""
        self._end(
            f"{self._peers[number]}{what} is lost: its last sign of life was {silent:.1f} s ago, "
            f"the time-out is {self._timeout:g} s"
        )

    def _on_abort(self, number: int) -> None:
        """JAX gives up; if process 0 is gone that is why, else the abort goes on."""
        try:
            socket.create_connection(self._coordinator, timeout=1).close()
        except OSError:
            silent = _now() - self._last_sign[0]
            self._end(
                f"{self._peers[0]}, which serves the coordinator, is lost: its last sign of life "
                f"was {silent:.1f} s ago, and nothing listens at its address any more",
                tell=False,
            )

    def _end(self, why: str, *, tell: bool = True) -> None:
        """Says why, to the others as well, and ends this process."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to end the process
        print(
            f"\njaxrec: {why}. This is {self._peers[self._own]}, which ends with exit code "
            f"{EXIT_PEER_LOST}; start all processes again, and the run goes on from its last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        if tell:
            telling = threading.Thread(target=self._tell, args=(why,), daemon=True)
            telling.start()
            telling.join(2 * self._interval + 2)  # process 0 may be the one that is silent
        os._exit(EXIT_PEER_LOST)

    def _tell(self, why: str) -> None:
        try:
            self.announce_end("lost", why)
            self.wait_until_heard()
        except Exception:  # process 0 is gone, and with it those who would listen
            pass


_C_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_DEFAULT = ctypes.cast(0, _C_HANDLER)  # SIG_DFL
