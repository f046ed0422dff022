"""A lock, so that two runs never write to one folder."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

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
