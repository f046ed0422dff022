"""What may go wrong with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxrec.distributed.agreement import AgreementError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, or a save failed and training went on."""


class DamagedError(CheckpointError):
    """This one checkpoint is not usable; another may be."""


@contextmanager
def told_by_others() -> Iterator[None]:
    """What another process could not do is a checkpoint's error here."""
    try:
        yield
    except AgreementError as error:
        raise CheckpointError(str(error)) from error


def first_line(error: Exception) -> str:
    """What an error says, short enough to stand inside another's message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
