"""Arrays that several processes hold: each writes its pieces, and any number reads them again.

`folder/parts/<step>/<process>/` has a file for each piece and `pieces.json`, which says where in
which array it belongs. Orbax's own saves of several processes wait for each other at barriers, so
that a full disk in one makes all others wait for minutes. Here no process waits before it has told
how it went, and the step is there once process 0, told by all, commits it.
"""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxrec.array_files import write_array
from jaxrec.distributed.agreement import Agreement
from jaxrec.functional import leaf_names
from jaxrec.typing import PyTree

STEPS_FOLDER = "checkpoints"
PARTS_FOLDER = "parts"
DAMAGED_FOLDER = "damaged"
LIST_FILE = "pieces.json"


class Piece(NamedTuple):
    """A box of an array: [start, stop] along each axis."""

    name: str
    box: list[list[int]]
    values: Shaped[np.ndarray, "..."]


class SharedSave:
    """A save under way: all processes write, tell, and hear whether the step is complete.

    Args:
      agreement: of the store.
      folder: of the step's parts.
      state: read before this returns.
      commit: makes the step complete, in process 0; gives the steps there are then.

    Cost: the pieces of this process in host memory until they are written.
    """

    def __init__(
        self, agreement: Agreement, folder: Path, state: PyTree, commit: Callable[[], list[int]]
    ):
        self._agreement, self._folder, self._commit = agreement, folder, commit
        self._pieces = own_pieces(state)
        self._failure, self._steps = "", []
        self._thread = threading.Thread(target=self._run, name="jaxrec-save")
        self._thread.start()

    def wait(self) -> list[int]:
        """The steps there are after it.

        Raises:
          OSError: it failed, in all processes alike; the message says in which first.
        """
        self._thread.join()
        if self._failure:
            raise OSError(self._failure)
        return self._steps

    def _run(self) -> None:
        failure = ""
        try:
            write_part(self._folder / str(self._agreement.own), self._pieces)
        except Exception as error:  # to be told, whatever it is
            failure = f"{type(error).__name__}: {error}"
        self._pieces = []
        try:
            self._failure = self._agreement.first_failure("written", failure)
            self._steps = self._agreement.from_first("committed", self._conclude)
        except Exception as error:
            self._failure = self._failure or f"{type(error).__name__}: {error}"

    def _conclude(self) -> list[int]:
        """In process 0, when nobody writes any more."""
        try:
            return [] if self._failure else self._commit()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._failure:
                shutil.rmtree(self._folder, ignore_errors=True)


def own_pieces(state: PyTree) -> list[Piece]:
    """What this process writes of a state, copied to the host; the state may be donated then.

    Every value is written once: a shard by the process that holds its first copy, and an array
    that is no process's alone, but made alike by all, by process 0.
    """
    pieces = []
    for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if shared:
            pieces += [
                Piece(name, _box(shard.index, leaf.shape), np.array(shard.data))
                for shard in leaf.addressable_shards
                if shard.replica_id == 0
            ]
        elif jax.process_index() == 0:
            pieces.append(Piece(name, [[0, size] for size in leaf.shape], np.array(leaf)))
    return pieces


def write_part(folder: Path, pieces: Sequence[Piece]) -> None:
    """Writes a process's pieces into a folder that must not be there yet.

    Raises:
      OSError: disk full, no permission.
    """
    folder.mkdir(parents=True)
    listed = []
    for number, piece in enumerate(pieces):
        file = f"{number}.npy"
        write_array(folder / file, piece.values)
        listed.append([piece.name, piece.box, file])
    (folder / LIST_FILE).write_text(json.dumps(listed))


def read_parts(folder: Path, count: int, abstract_state: PyTree) -> PyTree:
    """Puts a state together, on the devices that `abstract_state` names.

    Args:
      folder: of the step.
      count: parts that were written.

    Raises:
      ValueError, OSError: files are missing or damaged.

    Cost: each process reads the pieces that its devices' shares touch.
    """
    pieces: dict[str, list[tuple[list[list[int]], Path]]] = {}
    for part in range(count):
        own = folder / str(part)
        for name, box, file in json.loads((own / LIST_FILE).read_text()):
            pieces.setdefault(name, []).append((box, own / file))
    leaves, structure = jax.tree.flatten(abstract_state)
    names = leaf_names(abstract_state)
    read = [
        _assembled(name, leaf, pieces.get(name, []))
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, read)


def remove_parts(folder: Path, steps: Sequence[int]) -> None:
    """Removes what belongs to no step: a save that was cut off, or a step no longer kept."""
    parts = folder / PARTS_FOLDER
    for step in parts.iterdir() if parts.is_dir() else ():
        if not step.name.isdecimal() or int(step.name) not in steps:
            shutil.rmtree(step, ignore_errors=True)


def set_aside(folder: Path, step: int) -> Path:
    """Moves a damaged step out of the way, with its parts; gives where it is now."""
    target = folder / DAMAGED_FOLDER / str(step)
    for attempt in range(1, 1000):
        if not target.exists():
            break
        target = target.with_name(f"{step}-{attempt}")
    target.parent.mkdir(exist_ok=True)
    (folder / STEPS_FOLDER / str(step)).rename(target)
    parts = folder / PARTS_FOLDER / str(step)
    if parts.exists():
        parts.rename(target / PARTS_FOLDER)
    return target


def _box(index: Sequence[slice], shape: Sequence[int]) -> list[list[int]]:
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return [[start, stop] for start, stop, _ in bounds]


def _assembled(name: str, leaf: Any, pieces: Sequence[tuple[list[list[int]], Path]]) -> jax.Array:
    dtype, files = jnp.dtype(leaf.dtype), {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        wanted = _box(index or (), leaf.shape)
        values = np.empty([stop - start for start, stop in wanted], dtype)
        filled = 0
        for box, file in pieces:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            if file not in files:
                files[file] = np.load(file, mmap_mode="r").view(dtype)
            part = files[file][_slices(common, box)]
            values[_slices(common, wanted)] = part
            filled += part.size
        if filled != values.size:
            raise ValueError(f"{values.size - filled} values of {name} are in no file")
        return values

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _slices(bounds: Sequence[Sequence[int]], within: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(bounds, within, strict=True))
