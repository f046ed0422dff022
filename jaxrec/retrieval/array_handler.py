"""Arrays as one item of an Orbax checkpoint, streamed: Orbax itself copies all of them first."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import future

from jaxrec.array_files import read_array, write_array


class ArrayHandler(ocp.AsyncCheckpointHandler):
    """Writes named arrays as 00000.npy and so on; which is which, the caller has to know."""

    async def async_save(self, directory: Any, args: "SaveArrays") -> list[future.Future]:
        """Writes the arrays, in their order, once Orbax has made the directory."""
        written = future.CommitFutureAwaitingContractedSignals(self._write(directory, args))
        return [written]

    def save(self, directory: Any, args: "SaveArrays") -> None:
        """Writes the arrays into a directory that is there."""
        asyncio.run(self._write(directory, args))

    async def _write(self, directory: Any, args: "SaveArrays") -> None:
        for number, array in enumerate(args.arrays.values()):
            write_array(Path(directory) / f"{number:05}.npy", array)

    def restore(self, directory: Any, args: "RestoreArrays") -> dict[str, Any]:
        """The arrays by name, on the default device."""
        return {
            name: read_array(Path(directory) / f"{number:05}.npy", dtype)
            for number, (name, dtype) in enumerate(args.dtypes.items())
        }


@ocp.args.register_with_handler(ArrayHandler, for_save=True)
@dataclass
class SaveArrays(ocp.args.CheckpointArgs):
    """Arrays by name, none of them empty or of keys."""

    arrays: Mapping[str, Any]


@ocp.args.register_with_handler(ArrayHandler, for_restore=True)
@dataclass
class RestoreArrays(ocp.args.CheckpointArgs):
    """Dtypes by name, in the order in which the arrays were saved."""

    dtypes: Mapping[str, str]
