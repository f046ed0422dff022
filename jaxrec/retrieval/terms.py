"""Attribute values as terms: hashing, and the catalogue that a filter's terms are looked up in.

A term is a (feature, value) pair. All of this runs on the host, in NumPy's uint64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt32, UInt64

from jaxrec.retrieval.filters import FilterError, value_text

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SEPARATOR = "\0"


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def hash_texts(texts: Sequence[str], seed: int) -> UInt64[np.ndarray, "n"]:
    """64 bits a text: a sum of one random-looking number for each (position, byte).

    A sum needs no loop over positions, so texts of any lengths are hashed at once.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    ends = np.cumsum(lengths)
    data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
    position = (np.arange(len(data)) - np.repeat(ends - lengths, lengths)).astype(np.uint64)
    start = _mix(np.array([seed], np.uint64) * _GOLDEN + _GOLDEN)
    parts = _mix(((position << np.uint64(8)) | data) * _GOLDEN + start)
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(parts, dtype=np.uint64)])
    sums = totals[ends] - totals[ends - lengths]
    return _mix(sums + lengths.astype(np.uint64) * _GOLDEN + start)


def row_hashes(term_hashes: UInt64[np.ndarray, "n"], num_hashes: int) -> UInt32[np.ndarray, "n K"]:
    """The K numbers that select a term's Bloom rows, all derived from its 64 bits."""
    steps = (np.arange(1, num_hashes + 1, dtype=np.uint64) * _GOLDEN)[None]
    return (_mix(term_hashes[:, None] + steps) >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True, eq=False)
class TermCatalog:
    """The terms of a catalogue, numbered 0..V-1 in the order of their hashes.

    Compared by identity: it is static to `jax.jit`, and large.

    Attributes:
      features: names, sorted.
      seed: of the hash; chosen so that no two terms collide.
      hashes: sorted; u64[V].
      head_rows: exact Bloom row of a term, -1 for terms of the tail; i32[V].
    """

    features: tuple[str, ...]
    seed: int
    hashes: UInt64[np.ndarray, "V"]
    head_rows: Int32[np.ndarray, "V"]

    def lookup(self, terms: Sequence[tuple[str, str]]) -> Int32[np.ndarray, "n"]:
        """Numbers of (feature, value) pairs; -1 for those that no item has.

        An unknown pair is taken for a known one with probability V / 2^64.
        """
        if not terms or not len(self.hashes):
            return np.full(len(terms), -1, np.int32)
        hashes = hash_texts([f + _SEPARATOR + v for f, v in terms], self.seed)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, places, -1).astype(np.int32)


@dataclass(frozen=True)
class ItemTerms:
    """Which item has which term: pairs without repeats, ordered by item and then by term.

    Attributes:
      num_items: N.
      items, terms: item number and term number of each pair; i32[n].
    """

    num_items: int
    items: Int32[np.ndarray, "n"]
    terms: Int32[np.ndarray, "n"]


def collect_terms(features: Mapping[str, Any]) -> tuple[ItemTerms, TermCatalog]:
    """The pairs of a catalogue and its terms; every term is still in the tail.

    Args:
      features: for each name one entry an item: a value, a list of values, or None for no value.

    Raises:
      FilterError: features of different lengths (naming both), a value that is neither string nor
        integer (naming feature and item), or an unusable name.
    """
    if not features:
        raise FilterError("features is empty; expected {name: one entry an item}")
    lengths = {name: len(column) for name, column in features.items()}
    num_items = next(iter(lengths.values()))
    for name, length in lengths.items():
        if length != num_items:
            first = next(iter(lengths))
            raise FilterError(
                f"feature {name!r} has {length} entries and {first!r} has {num_items}; "
                "expected one entry an item in each"
            )
        if not name or _SEPARATOR in name:
            raise FilterError(f"{name!r} cannot be the name of a feature")
    texts: list[str] = []
    items, ranks = [], []
    for name, column in features.items():
        column_items, values, column_ranks = _column(name, column)
        items.append(column_items)
        ranks.append(column_ranks + len(texts))
        texts.extend(name + _SEPARATOR + value for value in values)
    seed, hashes = _collision_free(texts)
    order = np.argsort(hashes)
    number = np.empty(len(texts), np.int64)
    number[order] = np.arange(len(texts))
    terms = number[np.concatenate(ranks)]
    pairs = np.unique(np.concatenate(items) * max(len(texts), 1) + terms)
    catalog = TermCatalog(
        tuple(sorted(features)), seed, hashes[order], np.full(len(texts), -1, np.int32)
    )
    owners, terms = np.divmod(pairs, max(len(texts), 1))
    return ItemTerms(num_items, owners.astype(np.int32), terms.astype(np.int32)), catalog


def _collision_free(texts: list[str]) -> tuple[int, UInt64[np.ndarray, "n"]]:
    """A seed under which all texts have hashes of their own; the first nearly always will do."""
    for seed in range(16):
        hashes = hash_texts(texts, seed)
        if len(np.unique(hashes)) == len(texts):
            return seed, hashes
    raise FilterError("16 hash functions in a row collide on the catalogue's values")


def _column(name: str, column: Any) -> tuple[Int[np.ndarray, "n"], list[str], Int[np.ndarray, "n"]]:
    """(item of each pair, distinct values as text, value number of each pair) of one feature."""
    if hasattr(column, "__array__"):  # NumPy, JAX or a data frame's column
        column = np.asarray(column)
    if isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "iubU":
        values, inverse = np.unique(column, return_inverse=True)
        return np.arange(len(column)), [value_text(value) for value in values], inverse
    items: list[int] = []
    ranks: list[int] = []
    numbers: dict[str, int] = {}
    for item, entry in enumerate(column):
        for value in _entry_values(entry):
            try:
                text = value_text(value)
            except FilterError as error:
                raise FilterError(f"feature {name!r} of item {item}: {error}") from None
            items.append(item)
            ranks.append(numbers.setdefault(text, len(numbers)))
    return np.array(items, np.int64), list(numbers), np.array(ranks, np.int64)


def _entry_values(entry: Any) -> Sequence[Any]:
    if entry is None:
        return ()
    if isinstance(entry, np.ndarray):
        return tuple(entry.ravel())
    if isinstance(entry, list | tuple | set | frozenset):
        return tuple(entry)
    return (entry,)
