"""Lists of files with sizes and hashes, by which a copy is found damaged before it is read."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

type Manifest = dict[str, list[Any]]
"""{path below the folder: [bytes, SHA-256]}; JSON as it is."""


def list_files(folder: Path) -> Manifest:
    """All files below `folder`. Cost: reads each once, in pieces."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): [file.stat().st_size, _sha256(file)] for file in files
    }


def find_damage(
    folder: Path, files: Mapping[str, Sequence[Any]], *, contents: bool = True
) -> str | None:
    """Names the first file that is missing, of another size or altered; None if all is well.

    Args:
      folder: where the files should be; others beside them do not matter.
      files: what `list_files` gave.
      contents: also compare the SHA-256, which reads every file.
    """
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None
             for name in files}  # fmt: skip
    for name, (size, _) in files.items():
        if sizes[name] is None:
            return f"{folder / name} is missing"
        if sizes[name] != size:
            return f"{folder / name} has {sizes[name]} bytes of {size}"
    for name, (_, digest) in files.items() if contents else ():
        if _sha256(folder / name) != digest:
            return f"{folder / name} was altered: its SHA-256 is another than when it was written"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
