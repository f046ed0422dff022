"""What the processes of a run tell each other and decide together, outside of their collectives."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable

import jax

from jaxrec.distributed.key_value import KeyValue

_numbers = itertools.count()
POLL_S, SLOWEST_POLL_S = 0.005, 0.25


class AgreementError(RuntimeError):
    """Processes did not answer in time, or the first one failed; the message says which and why."""


class Agreement:
    """All processes make one at the same place of the program, and call it in the same order.

    Alone, a process agrees with itself at no cost.

    Args:
      timeout: seconds to wait for the others, which may be at work. A lost one ends this process
        sooner; see `Watch`.
      alone: this process makes it for itself, whatever others there are.
    """

    def __init__(self, timeout: float | int = 600.0, *, alone: bool = False):
        self.own, self.count = jax.process_index(), 1 if alone else jax.process_count()
        self._timeout, self._calls = timeout, Counter[str]()
        self._topic = "" if alone else f"agreement/{next(_numbers)}"

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process acts for all."""
        return self.alone or self.own == 0

    def notes(self, what: str) -> KeyValue:
        """A dictionary of its own for the processes of this agreement."""
        return KeyValue(f"{self._topic}/{what}")

    def exchange(self, what: str, text: str) -> list[str]:
        """Every process's text, by their numbers.

        Args:
          what: a name; calls of one name are told apart by their order, so one thread makes them.

        Raises:
          AgreementError: some have not said theirs within the time-out; the message has their
            numbers.

        Cost: about 1 ms, and waiting for the last; no device takes part.
        """
        if self.alone:
            return [text]
        call = self._calls[what]
        self._calls[what] += 1
        store = self.notes(f"{what}/{call}")
        store.set(str(self.own), text)
        end, pause = time.monotonic() + self._timeout, POLL_S
        while len(said := store.all()) < self.count:
            if time.monotonic() > end:
                missing = sorted({*range(self.count)} - set(map(int, said)))
                raise AgreementError(
                    f"processes {', '.join(map(str, missing))} did not say how {what!r} went "
                    f"within {self._timeout:g} s"
                )
            time.sleep(pause)
            pause = min(SLOWEST_POLL_S, 1.5 * pause)
        if call:  # whoever is here has read all of the call before
            self.notes(f"{what}/{call - 1}").delete(str(self.own))
        return [said[str(number)] for number in range(self.count)]

    def from_first[T](self, what: str, make: Callable[[], T]) -> T:
        """What process 0 makes, in all processes; ready for JSON.

        Raises:
          AgreementError: `make` failed in process 0 (where its own exception is raised), or it did
            not answer.
        """
        if self.alone:
            return make()
        answer = {}
        failure = None
        if self.is_first:
            try:
                answer = {"value": make()}
            except Exception as error:
                answer, failure = {"error": str(error)}, error
        answer = json.loads(self.exchange(what, json.dumps(answer))[0])
        if failure is not None:
            raise failure
        if "error" in answer:
            raise AgreementError(answer["error"])
        return answer["value"]

    def first_failure(self, what: str, failure: str) -> str:
        """Of all processes' failures the first, with its process's number; empty if all are."""
        failures = self.exchange(what, failure)
        told = [f"process {n}: {text}" for n, text in enumerate(failures) if text]
        return failure if self.alone else told[0] if told else ""
