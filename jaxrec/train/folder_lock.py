"""A lock, so that two runs never write to one folder."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from jaxrec.distributed.agreement import Agreement, AgreementError

LOCK_FILE = "lock"


class FolderInUse(Exception):  # noqa: N818 - names what happened
    """Another process holds the folder; the argument says which."""


def lock_folder(folder: Path) -> TextIO:
    """Takes the folder for this process; held until the file is closed.

    The system frees it when the process ends, however it ends, so no lock is ever stale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK_FILE, "a+")  # noqa: SIM115 - held as long as the store
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise FolderInUse(holder or "another process") from error
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    return file


def lock_for_all(folder: Path, together: Agreement) -> TextIO | None:
    """Takes the folder in the first process, for all of them; None in the others.

    Raises:
      FolderInUse: another run holds it; the message says which and what to do.
      AgreementError: the same, in the other processes; or they see another folder than the first.
    """
    held: list[TextIO] = []

    def take() -> str:
        try:
            held.append(lock_folder(folder))
        except FolderInUse as error:
            raise FolderInUse(
                f"{folder} is in use by {error}; two runs in one folder would overwrite each "
                "other. Wait for it, stop it, or give this run another folder."
            ) from error
        return (folder / LOCK_FILE).read_text()

    wanted = together.from_first("locked", take)
    seen = (folder / LOCK_FILE).read_text() if (folder / LOCK_FILE).exists() else ""
    other = "" if seen == wanted else f"{folder} is not the folder of process 0"
    if failure := together.first_failure("looked", other):
        for file in held:
            file.close()
        raise AgreementError(f"{failure}; all processes need one that all of them see")
    return held[0] if held else None
