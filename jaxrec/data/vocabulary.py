"""Raw ids (the strings of a data file) and the dense numbers that models use for them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A two-way map between raw ids and dense numbers.

    Number `first_index + i` stands for `ids[i]`. Items start at 1 (0 is padding), users at 0.

    Attributes:
      kind: what is numbered, "item" or "user"; used in error messages.
      ids: the raw ids, all different; NumPy variable-width strings [size].
      first_index: the number of `ids[0]`.
    """

    kind: str
    ids: np.ndarray
    first_index: int

    @classmethod
    def create(cls, kind: str, raw_ids: Iterable[str], *, first_index: int) -> "Vocabulary":
        """Numbers `raw_ids` in the order given; a repeated id is an error that names it."""
        ids = np.array(list(raw_ids), dtype=np.dtypes.StringDType())
        vocabulary = cls(kind, ids, first_index)
        if len(vocabulary._numbers) != len(ids):
            seen: set[str] = set()
            repeated = next(raw for raw in ids.tolist() if raw in seen or seen.add(raw))
            raise ValueError(f"{kind} id {repeated!r} is given twice; ids must be unique.")
        return vocabulary

    @property
    def size(self) -> int:
        """How many ids there are (padding not counted)."""
        return len(self.ids)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, raw_id: object) -> bool:
        return raw_id in self._numbers

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {raw: self.first_index + i for i, raw in enumerate(self.ids.tolist())}

    def index_of(self, raw_id: str) -> int:
        """The number of one raw id; an unknown one is a ValueError that names it."""
        try:
            return self._numbers[raw_id]
        except KeyError:
            hint = f" (ids are strings: pass {str(raw_id)!r})" if str(raw_id) in self else ""
            raise ValueError(
                f"unknown {self.kind} id {raw_id!r}: it is not among the {self.size} "
                f"{self.kind}s of this vocabulary{hint}."
            ) from None

    def indices_of(self, raw_ids: Sequence[str]) -> Int32[np.ndarray, "n"]:
        """The numbers of many raw ids; an unknown one is a ValueError that names it."""
        return np.fromiter(map(self.index_of, raw_ids), dtype=np.int32, count=len(raw_ids))

    def raw_of(self, index: int | np.integer) -> str:
        """The raw id of one number; padding and numbers out of range are a ValueError."""
        if not self.first_index <= index < self.first_index + self.size:
            raise ValueError(
                f"{self.kind} number {index} is outside {self.first_index}.."
                f"{self.first_index + self.size - 1}" + (" (0 is padding)." if index == 0 else ".")
            )
        return str(self.ids[index - self.first_index])

    def select(self, indices: Int[np.ndarray, "n"]) -> "Vocabulary":
        """A vocabulary of only these numbers, renumbered in the order given."""
        return Vocabulary(self.kind, self.ids[indices - self.first_index], self.first_index)

    def save(self, path: str | Path) -> None:
        """Writes one `.npz` file (no pickle) atomically: readers see the old file or the new."""
        encoded = [raw.encode() for raw in self.ids.tolist()]
        ends = np.cumsum([len(raw) for raw in encoded], dtype=np.int64)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(
                    file,
                    kind=np.array(self.kind),
                    first_index=np.int64(self.first_index),
                    ends=ends,
                    text=np.frombuffer(b"".join(encoded), dtype=np.uint8),
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            missing = {"kind", "first_index", "ends", "text"} - set(stored.files)
            if missing:
                raise ValueError(
                    f"{path} is not a vocabulary: it lacks {', '.join(sorted(missing))}. "
                    "Give a file written by Vocabulary.save."
                )
            text, ends = stored["text"].tobytes(), stored["ends"].tolist()
            starts = [0, *ends][:-1]
            raw_ids = [text[a:b].decode() for a, b in zip(starts, ends, strict=True)]
            return cls.create(str(stored["kind"]), raw_ids, first_index=int(stored["first_index"]))


class Numbering(dict[str, int]):
    """Numbers raw ids in order of first appearance; looking one up is enough to number it."""

    def __init__(self, *, first_index: int):
        super().__init__()
        self.first_index = first_index

    def __missing__(self, raw_id: str) -> int:
        number = self[raw_id] = self.first_index + len(self)
        return number

    def vocabulary(self, kind: str) -> Vocabulary:
        """The ids numbered so far."""
        return Vocabulary.create(kind, self, first_index=self.first_index)


def number_values(
    values: Int[np.ndarray, "n"], *, first_index: int
) -> tuple[Int32[np.ndarray, "n"], Int[np.ndarray, "u"]]:
    """Numbers integers in order of first appearance.

    Returns:
      the number of each value, and the distinct values in number order.
    """
    distinct, first_seen, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first_seen)
    number = np.empty(len(order), dtype=np.int32)
    number[order] = np.arange(first_index, first_index + len(order), dtype=np.int32)
    return number[inverse], distinct[order]
