"""What Orbax logs, kept from the terminal: its failures come back as exceptions."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("jaxrec.orbax")


class OrbaxLogFilter(logging.Filter):
    """Hands Orbax's records of the absl logger on to the logger "jaxrec.orbax", at DEBUG.

    Orbax logs a failed save several times, with tracebacks, from its background threads.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False, so that absl drops the record, for those of Orbax alone."""
        if "orbax" not in Path(record.pathname).parts:
            return True
        _log.debug(record.getMessage())
        return False


def hush_orbax() -> OrbaxLogFilter:
    """Installs the filter; `unhush_orbax` takes it away."""
    hush = OrbaxLogFilter()
    logging.getLogger("absl").addFilter(hush)
    return hush


def unhush_orbax(hush: OrbaxLogFilter) -> None:
    """Takes away what `hush_orbax` returned."""
    logging.getLogger("absl").removeFilter(hush)


@contextmanager
def hushed_orbax() -> Iterator[None]:
    """Keeps Orbax quiet inside a `with`."""
    hush = hush_orbax()
    try:
        yield
    finally:
        unhush_orbax(hush)
